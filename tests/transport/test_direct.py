"""Connections without a library in between: when one is used again, and that answers end where they say."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.transport.settings import settings_in
from tests.transport.wire import Seen, Wire, serve
from veneer.errors import Unavailable
from veneer.transport import Request, Transport, connections
from veneer.transport.connections import IDLE_EXPIRY_S, MAX_CONNECTIONS


@pytest.fixture
async def transport(tmp_path: Path) -> AsyncIterator[Transport]:
    async with Transport(settings_in(tmp_path)) as transport:
        yield transport


async def fetch(transport: Transport, host: str, method: str = "GET", scheme: str = "http") -> bytes:
    async with await transport.send(Request(method, f"{scheme}://{host}/x", "app")) as response:
        return await response.body(1 << 20)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"Content-Length: 5\r\n\r\nright", b"right"),
        (b"Content-Length: 0\r\n\r\n", b""),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nright\r\n0\r\n\r\n", b"right"),
    ],
    ids=["counted", "empty", "chunked"],
)
@pytest.mark.parametrize(
    "behind", [b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\nwrong", b"HTTP/1.1 200 X\r\nA:"]
)
async def test_bytes_behind_an_answer_are_not_the_next_answer(
    transport: Transport, answer: bytes, body: bytes, behind: bytes
) -> None:
    async def talkative(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\n" + answer + behind)

    async with serve(talkative) as server:
        assert [await fetch(transport, server.host) for _ in range(3)] == [body] * 3
        assert server.connections == 3


async def test_nor_are_those_that_came_in_one_record_of_tls(tmp_path: Path) -> None:
    """They are decrypted already: nothing on the socket tells of them."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.num_tickets = 0
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def talkative(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\n")
        await wait_all_tasks_blocked()  # the head alone has been read
        await wire.send(b"right" + b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\nwrong")

    async with (
        serve(talkative, tls=context) as server,
        Transport(settings_in(tmp_path, ca_file=tmp_path / "ca.pem")) as transport,
    ):
        assert [await fetch(transport, server.host, scheme="https") for _ in range(3)] == [b"right"] * 3
        assert server.connections == 3


@pytest.mark.parametrize("begun", [True, False])
async def test_an_answer_that_is_left_half_way_is_not_read_on_by_the_next(
    transport: Transport, begun: bool
) -> None:
    async def slow(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\nContent-Length: 10\r\n\r\nfirst")
        if server.connections == 1:
            await trio.sleep_forever()
        await wire.send(b" half")

    async with serve(slow) as server:
        async with await transport.send(Request("GET", f"http://{server.host}/x", "app")) as response:
            if begun:
                assert await anext(aiter(response)) == b"first"
        with trio.fail_after(20):
            assert await fetch(transport, server.host) == b"first half"
        assert server.connections == 2


async def test_chunks_are_told_from_a_length_that_is_stated_besides(transport: Transport) -> None:
    async def both(seen: Seen, wire: Wire) -> None:
        head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\nContent-Length: 10\r\n\r\n"
        await wire.send(head + b"5\r\nhello\r\n0\r\n\r\n")

    async with serve(both) as server:
        assert [await fetch(transport, server.host) for _ in range(2)] == [b"hello"] * 2


async def test_no_more_idle_connections_are_kept_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_IDLE_CONNECTIONS", 2)
    waiting = 0
    go = trio.Event()

    async def together(seen: Seen, wire: Wire) -> None:
        nonlocal waiting, go
        waiting += 1
        if waiting == 4:
            go.set()
        await go.wait()
        await wire.answer(200, b"hello")

    async with Transport(settings_in(tmp_path)) as transport, serve(together) as server:
        for _ in range(2):
            waiting, go = 0, trio.Event()
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(fetch, transport, server.host)
        assert server.connections == 4 + 2


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_connection_that_the_server_has_closed_is_not_used_again(
    transport: Transport, ending: str
) -> None:
    async def once(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, b"hello")
        await (wire.close() if ending == "close" else wire.reset())

    async with serve(once) as server:
        for _ in range(3):
            assert await fetch(transport, server.host) == b"hello"
            await wait_all_tasks_blocked(0.02)
    assert server.connections == 3
    assert transport.stats.retries == 0


@pytest.mark.parametrize("head", ["HTTP/1.0 200 X\r\n", "HTTP/1.1 200 X\r\nConnection: foo, Close\r\n"])
async def test_who_announces_the_end_of_a_connection_is_believed(transport: Transport, head: str) -> None:
    async def last(seen: Seen, wire: Wire) -> None:
        await wire.send(f"{head}Content-Length: 5\r\n\r\nhello".encode())

    async with serve(last) as server:
        for _ in range(2):
            assert await fetch(transport, server.host) == b"hello"
    assert server.connections == 2


async def test_idle_connections_are_given_up_in_time(transport: Transport, mock_clock: MockClock) -> None:
    async def hello(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, b"hello")

    async with serve(hello) as server:
        await fetch(transport, server.host)
        mock_clock.jump(IDLE_EXPIRY_S / 2)
        await fetch(transport, server.host)
        assert server.connections == 1
        mock_clock.jump(IDLE_EXPIRY_S + 1)
        await fetch(transport, server.host)
        assert server.connections == 2


async def test_bodies_of_unknown_length(transport: Transport) -> None:
    async def framed(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await wire.send(b"6\r\n world\r\n0\r\n\r\n")

    async def until_close(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\n\r\nhello")
        await wire.close()

    async with serve(framed) as server:
        assert [await fetch(transport, server.host) for _ in range(2)] == [b"hello world"] * 2
        assert server.connections == 1
    async with serve(until_close) as server:
        assert await fetch(transport, server.host) == b"hello"


async def test_a_chunked_body_that_breaks_off_is_an_error(transport: Transport) -> None:
    async def short(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel")
        await wire.close()

    async with serve(short) as server:
        with pytest.raises(Unavailable):
            await fetch(transport, server.host)


async def test_answers_without_a_body_keep_the_connection(transport: Transport) -> None:
    async def bare(seen: Seen, wire: Wire) -> None:
        if seen.method == "HEAD":
            await wire.answer(200, length=1 << 30)
        elif seen.method == "GET":
            await wire.send(b"HTTP/1.1 204 X\r\n\r\n")
        else:
            await wire.send(b"HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n")

    async with serve(bare) as server:
        for method in ("HEAD", "GET", "HEAD", "POST", "HEAD"):
            assert await fetch(transport, server.host, method) == b""
    assert server.connections == 1


async def test_hints_ahead_of_an_answer_are_passed_over(transport: Transport) -> None:
    async def hinting(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        await wire.answer(200, b"hello")

    async with serve(hinting) as server:
        assert [await fetch(transport, server.host) for _ in range(2)] == [b"hello"] * 2
    assert server.connections == 1


@pytest.mark.parametrize("patient", [True, False])
async def test_an_answer_that_comes_before_the_request_has_ended_is_read(
    transport: Transport, patient: bool
) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1)
            await stream.send_all(b"HTTP/1.1 413 X\r\nContent-Length: 3\r\n\r\nbig")
            # Or else it is closed with the rest unread, and sending that fails.
            while patient and await stream.receive_some():
                pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, refuse, listeners)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"
        async with await transport.send(Request("PUT", url, "app", body=bytes(4 << 20))) as response:
            assert (response.status, await response.body(10)) == (413, b"big")
        nursery.cancel_scope.cancel()


async def test_no_more_connections_than_are_allowed(transport: Transport) -> None:
    running = most = 0
    go = trio.Event()

    async def slow(seen: Seen, wire: Wire) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == MAX_CONNECTIONS:
            go.set()
        await go.wait()
        running -= 1
        await wire.answer(200, b"hello")

    async with serve(slow) as server, trio.open_nursery() as nursery:
        for _ in range(MAX_CONNECTIONS + 8):
            nursery.start_soon(fetch, transport, server.host)
    assert most == MAX_CONNECTIONS


async def test_a_cancelled_request_gives_its_connection_up(transport: Transport) -> None:
    async def silent(seen: Seen, wire: Wire) -> None:
        await trio.sleep_forever()

    async with serve(silent) as server:
        for _ in range(MAX_CONNECTIONS + 1):
            with trio.move_on_after(0.01):
                await fetch(transport, server.host)

    async def hello(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, b"hello")

    async with serve(hello) as server:
        with trio.fail_after(60):
            assert await fetch(transport, server.host) == b"hello"
