"""The HTTP server on raw sockets: what is answered, what is refused, and what ends a connection."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import trio
import trustme
from trio.testing import MockClock

from veneer.serve.http import HTTPServer, Limits, RequestRecord, open_port
from veneer.serve.message import BodyTooLarge, Disconnect, FileRange, Handler, Request, Response, Sink, Stream

Connect = Callable[[], Awaitable[trio.SocketStream]]


@asynccontextmanager
async def serving(
    handler: Handler,
    *,
    limits: Limits | None = None,
    tls: ssl.SSLContext | None = None,
    on_response: Callable[[RequestRecord], None] = lambda _: None,
) -> AsyncIterator[tuple[HTTPServer, Connect]]:
    listener = await open_port("127.0.0.1", 0)
    address = listener.socket.getsockname()
    server = HTTPServer(handler, limits=limits, tls=tls, on_response=on_response)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)

        async def connect() -> trio.SocketStream:
            return await trio.open_tcp_stream(*address)

        yield server, connect
        nursery.cancel_scope.cancel()


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def talk(connect: Connect, data: bytes) -> bytes:
    async with await connect() as stream:
        await stream.send_all(data)
        return await everything(stream)


async def hello(request: Request) -> Response:
    return Response(200, (("X-Path", request.path),), (b"hello",))


def get(path: str = "/", extra: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving(hello) as (_, connect):
        answer = await talk(connect, get("/one") + get("/two", "Connection: close\r\n"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"/one") < answer.index(b"/two")
    assert answer.endswith(b"hello")


async def test_head_has_the_length_and_no_body() -> None:
    async with serving(hello) as (_, connect):
        answer = await talk(connect, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"Content-Length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_paths_are_decoded_and_absolute_targets_understood() -> None:
    async with serving(hello) as (_, connect):
        answer = await talk(connect, get("http://x/a%3Ab?q=1", "Connection: close\r\n"))
    assert b"X-Path: /a:b\r\n" in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (get("/%00"), b"400"),
        (get("/%ff"), b"400"),
        (get("*"), b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"x" * (65 << 10), b"431"),
        (get("/", "Content-Length: x\r\n"), b"400"),
    ],
)
async def test_what_is_not_a_request_is_refused(data: bytes, status: bytes) -> None:
    async with serving(hello) as (_, connect):
        answer = await talk(connect, data)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert (await talk(connect, get("/", "Connection: close\r\n"))).startswith(b"HTTP/1.1 200")


async def test_100_continue_is_sent_when_the_body_is_wanted_and_only_then() -> None:
    async def handler(request: Request) -> Response:
        if request.path == "/no":
            return Response(401)
        return Response(200, (), (await request.read(100),))

    head = (
        "POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    async with serving(handler) as (_, connect):
        async with await connect() as stream:
            await stream.send_all(head.format("/yes").encode())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
            await stream.send_all(b"body")
            assert (await stream.receive_some()).endswith(b"body")
        refused = await talk(connect, head.format("/no").encode())
    assert refused.startswith(b"HTTP/1.1 401")
    assert b"close" in refused


async def test_an_error_reaches_a_client_that_still_sends() -> None:
    async def handler(request: Request) -> Response:
        try:
            await request.read(1000)
        except BodyTooLarge:
            return Response(413)
        return Response(200)

    async with serving(handler) as (_, connect), await connect() as stream, trio.open_nursery() as nursery:
        size = 6 << 20
        await stream.send_all(f"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())

        async def send() -> None:
            await stream.send_all(bytes(size))

        nursery.start_soon(send)
        answer = await stream.receive_some()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"Connection: close" in answer  # or the client would send its next request here


async def test_a_small_unread_body_does_not_cost_the_connection() -> None:
    async with serving(hello) as (_, connect):
        request = b"POST /one HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
        answer = await talk(connect, request + get("/two", "Connection: close\r\n"))
    assert answer.count(b"HTTP/1.1 200") == 2


LIMITS = Limits(idle_s=100, head_s=10, receive_s=20, send_s=30)


@pytest.mark.parametrize(
    ("data", "seconds"),
    [(b"", 100), (b"GET / HT", 10), (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nbo", 20)],
)
async def test_slow_clients_are_cut_off(jumping_clock: MockClock, data: bytes, seconds: float) -> None:
    async def handler(request: Request) -> Response:
        await request.read(100)
        return Response(200)

    async with serving(handler, limits=LIMITS) as (_, connect):
        start = trio.current_time()
        assert await talk(connect, data) == b""
        assert trio.current_time() - start == pytest.approx(seconds)


async def test_a_request_that_drips_in_is_cut_off_all_the_same(jumping_clock: MockClock) -> None:
    async with serving(hello, limits=LIMITS) as (_, connect), await connect() as stream:
        start = trio.current_time()

        async def drip() -> None:
            for byte in get():
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(bytes([byte]))
                await trio.sleep(6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            assert await everything(stream) == b""
            assert trio.current_time() - start == pytest.approx(10)
            nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_read_is_cut_off(jumping_clock: MockClock, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.truncate(1 << 30)
    ended = trio.Event()

    async def handler(request: Request) -> Response:
        return Response(200, (), (FileRange(file, 0, 1 << 30),))

    async with (
        serving(handler, limits=LIMITS, on_response=lambda _: ended.set()) as (_, connect),
        await connect() as stream,
    ):
        start = trio.current_time()
        await stream.send_all(get())
        await ended.wait()
        assert trio.current_time() - start == pytest.approx(30)


async def test_stopping_finishes_what_is_under_way_and_drops_the_idle() -> None:
    arrived, release = trio.Event(), trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/slow":
            arrived.set()
            await release.wait()
        return Response(200, (), (b"done",))

    async with serving(handler) as (server, connect), await connect() as idle, await connect() as busy:
        await idle.send_all(get("/fast"))
        assert (await idle.receive_some()).endswith(b"done")
        await busy.send_all(get("/slow"))
        await arrived.wait()
        server.stop(grace_s=60)
        assert await everything(idle) == b""
        with pytest.raises(OSError):
            await connect()
        release.set()
        answer = await everything(busy)
    assert answer.endswith(b"done")
    assert b"Connection: close" in answer


async def test_the_grace_period_ends(jumping_clock: MockClock) -> None:
    async def handler(request: Request) -> Response:
        await trio.sleep_forever()
        raise AssertionError

    listener = await open_port("127.0.0.1", 0)
    server = HTTPServer(handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            await stream.send_all(get())
            await trio.sleep(1)
            server.stop(grace_s=5)
            assert await everything(stream) == b""
    assert trio.current_time() == pytest.approx(6)


async def test_streams_with_and_without_a_length() -> None:
    async def push(sink: Sink) -> None:
        for piece in (b"one ", b"two ", b"three"):
            await sink(piece)

    async def handler(request: Request) -> Response:
        return Response(200, (), Stream(push, 13 if request.path == "/known" else None))

    async with serving(handler) as (_, connect):
        known = await talk(connect, get("/known", "Connection: close\r\n"))
        unknown = await talk(connect, get("/unknown", "Connection: close\r\n"))
    assert known.endswith(b"\r\n\r\none two three")
    assert b"Content-Length: 13" in known
    assert unknown.endswith(b"\r\n\r\n4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n")


async def test_a_file_that_shrank_or_went_ends_the_connection_short(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))

    async def handler(request: Request) -> Response:
        path = file if request.path == "/short" else tmp_path / "gone"
        return Response(200, (), (b"start", FileRange(path, 50, 51)))

    async with serving(handler) as (_, connect):
        for path in ("/short", "/gone"):
            answer = await talk(connect, get(path))
            assert b"Content-Length: 56" in answer
            assert answer.endswith(b"start")


async def test_disconnects(tmp_path: Path) -> None:
    async def handler(request: Request) -> Response:
        raise Disconnect(reset=request.path == "/reset")

    async with serving(handler) as (_, connect):
        assert await talk(connect, get("/close")) == b""
        with pytest.raises(trio.BrokenResourceError):
            await talk(connect, get("/reset"))


async def test_a_client_that_leaves_half_way_disturbs_nobody(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.truncate(64 << 20)
    records: list[RequestRecord] = []
    ended = trio.Event()

    def note(record: RequestRecord) -> None:
        records.append(record)
        ended.set()

    async def handler(request: Request) -> Response:
        return Response(200, (), (FileRange(file, 0, 64 << 20),))

    async with serving(handler, on_response=note) as (_, connect):
        async with await connect() as stream:
            await stream.send_all(get())
            await stream.receive_some(1000)
        await ended.wait()
        assert 0 < records[0].bytes_sent < 64 << 20
        answer = await talk(connect, get("/", "Connection: close\r\n"))
    assert len(answer) > 64 << 20


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 10_000)
    scheme = ""

    async def handler(request: Request) -> Response:
        nonlocal scheme
        scheme = request.scheme
        return Response(200, (), (FileRange(file, 1, 2_000_000),))

    async with serving(handler, tls=server_side) as (_, connect):
        async with await connect() as plain:
            host = "{}:{}".format(*plain.socket.getpeername())
        async with httpx.AsyncClient(verify=client_side, trust_env=False) as client:
            for _ in range(2):
                got = await client.get(f"https://{host}/")
                assert got.content == file.read_bytes()[1:2_000_001]
        assert await talk(connect, b"not a handshake at all\r\n\r\n") != b"hello"
    assert scheme == "https"
