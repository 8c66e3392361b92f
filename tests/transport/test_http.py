"""Requests over real sockets: what the network does to them, and what comes of it."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from tests.clocks import patient_clock
from tests.transport.settings import settings_in
from tests.transport.wire import Seen, Wire, serve
from veneer.errors import RegistryError, Unavailable, UsageError
from veneer.transport import Request, Transport


@pytest.fixture
async def transport(tmp_path: Path) -> AsyncIterator[Transport]:
    async with Transport(settings_in(tmp_path)) as transport:
        yield transport


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """A fast clock that does not take a busy machine for a stall."""
    return patient_clock()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


async def fetch(transport: Transport, url: str, limit: int = 1 << 20) -> bytes:
    async with await transport.send(Request("GET", url, "app")) as response:
        return await response.body(limit)


async def hello(seen: Seen, wire: Wire) -> None:
    await wire.answer(200, b"hello")


async def test_requests_share_a_connection_and_are_counted(transport: Transport) -> None:
    async with serve(hello) as server:
        for _ in range(3):
            assert await fetch(transport, f"http://{server.host}/x") == b"hello"
    assert server.connections == 1
    assert (transport.stats.requests, transport.stats.bytes_received) == (3, 15)
    headers = server.seen[0].headers
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("veneer/")
    assert headers["host"] == server.host


async def test_bodies_arrive_whole(transport: Transport) -> None:
    data = bytes(range(256)) * 4096

    async def stored(seen: Seen, wire: Wire) -> None:
        await wire.answer(201 if seen.body == data else 400)

    async with serve(stored) as server:
        request = Request("PUT", f"http://{server.host}/x", "app", {"Content-Type": "a/b"}, data)
        async with await transport.send(request) as response:
            assert response.status == 201
    assert server.seen[0].headers["content-length"] == str(len(data))


async def test_a_body_may_be_left_half_read(transport: Transport) -> None:
    async def large(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, bytes(4 << 20))

    async with serve(large) as server:
        async with await transport.send(Request("GET", f"http://{server.host}/", "app")) as response:
            assert len(await response.prefix(10)) == 10
        assert transport.stats.bytes_received < 1 << 20

        async def fail_inside() -> None:
            async with await transport.send(Request("GET", f"http://{server.host}/", "app")) as response:
                async for _ in response:
                    raise KeyError

        with pytest.raises(KeyError):
            await fail_inside()
        assert len(await fetch(transport, f"http://{server.host}/", 4 << 20)) == 4 << 20


async def test_the_rest_of_an_answer_is_waited_for_only_if_it_is_known_to_be_short(
    transport: Transport,
) -> None:
    async def begun(seen: Seen, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 404 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n")
        await trio.sleep_forever()

    async with serve(begun) as server:
        response = await transport.send(Request("GET", f"http://{server.host}/", "app"))
        with trio.fail_after(transport.stall_s / 2):
            await response.discard()


async def test_leaving_a_body_does_not_wait_for_it(transport: Transport) -> None:
    async def begun(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, b"begun", length=1 << 30)
        await trio.sleep_forever()

    async with serve(begun) as server:
        with trio.fail_after(transport.stall_s / 2):
            async with await transport.send(Request("GET", f"http://{server.host}/", "app")) as response:
                assert await response.prefix(2) == b"be"


async def test_short_rests_of_bodies_keep_the_connection(transport: Transport) -> None:
    async with serve(hello) as server:
        for _ in range(2):
            async with await transport.send(Request("GET", f"http://{server.host}/", "app")) as response:
                await response.discard()
    assert server.connections == 1


async def test_bodies_are_bounded(transport: Transport) -> None:
    async with serve(hello) as server:
        with pytest.raises(RegistryError, match="longer than the 4 bytes"):
            await fetch(transport, f"http://{server.host}/", 4)


async def test_refused_connection(transport: Transport) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(Unavailable, match=r"app: GET 127\.0\.0\.1:\d+: no connection: connection refused$"):
        await fetch(transport, f"http://127.0.0.1:{port}/")


async def test_unknown_name(transport: Transport) -> None:
    with pytest.raises(Unavailable, match="its name was not resolved") as caught:
        await fetch(transport, "https://registry.invalid/")
    assert "registry.invalid" in str(caught.value.hint)


@pytest.mark.parametrize("announced", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"])
@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_broken_connections(transport: Transport, announced: bytes, ending: str) -> None:
    async def broken(seen: Seen, wire: Wire) -> None:
        if announced:
            await wire.send(announced)
        await (wire.close() if ending == "close" else wire.reset())

    async with serve(broken) as server:
        with pytest.raises(Unavailable, match="the connection broke"):
            await fetch(transport, f"http://{server.host}/")


@pytest.mark.parametrize("announced", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"])
async def test_stalls(transport: Transport, announced: bytes, clock: trio.testing.MockClock) -> None:
    async def stalled(seen: Seen, wire: Wire) -> None:
        await wire.send(announced)
        await trio.sleep_forever()

    async with serve(stalled) as server:
        start = trio.current_time()
        with pytest.raises(Unavailable, match="stalled"):
            await fetch(transport, f"http://{server.host}/")
        assert trio.current_time() - start >= transport.stall_s


async def test_trickling_bodies_count_as_stalled(transport: Transport, clock: trio.testing.MockClock) -> None:
    """A server that sends a byte now and then would pass any time-out for silence."""

    async def trickle(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, length=1000)
        while True:
            await wire.send(b".")
            await trio.sleep(5)

    async with serve(trickle) as server:
        with pytest.raises(Unavailable, match="stalled"):
            await fetch(transport, f"http://{server.host}/")
    assert trio.current_time() < 60


async def test_nonsense_is_no_answer(transport: Transport) -> None:
    async def nonsense(seen: Seen, wire: Wire) -> None:
        await wire.send(b"\x00\x01\x02 what?\r\n\r\n")
        await wire.close()

    async with serve(nonsense) as server:
        with pytest.raises(Unavailable):
            await fetch(transport, f"http://{server.host}/")


async def test_unusable_addresses_and_headers(transport: Transport) -> None:
    for request in (
        Request("GET", "ftp://127.0.0.1/", "app"),
        Request("GET", "https://[::1/", "app"),
        Request("GET", "http://127.0.0.1:1/", "app", {"X": "a\r\nY: secret"}),
        Request("GET", "http://127.0.0.1:1/", "app", {"X": "\N{SNOWMAN}"}),
    ):
        with pytest.raises(RegistryError) as caught:
            await transport.send(request)
        assert "secret" not in str(caught.value)


async def test_loopback_without_tls_is_spoken_to_in_plain_http(transport: Transport) -> None:
    async with serve(hello) as server:
        assert await transport.base_url(server.host, "app") == f"http://{server.host}"
    assert await transport.base_url(server.host, "app") == f"http://{server.host}"  # asked only once


async def test_loopback_with_tls_and_a_private_authority(
    tmp_path: Path, server_tls: ssl.SSLContext, ca_file: Path
) -> None:
    async with (
        serve(hello, tls=server_tls) as server,
        Transport(settings_in(tmp_path, ca_file=ca_file)) as transport,
    ):
        base = await transport.base_url(server.host, "app")
        assert base == f"https://{server.host}"
        assert await fetch(transport, f"{base}/") == b"hello"


async def test_untrusted_certificates_are_no_reason_for_plain_http(
    transport: Transport, server_tls: ssl.SSLContext
) -> None:
    async with serve(hello, tls=server_tls) as server:
        base = await transport.base_url(server.host, "app")
        assert base == f"https://{server.host}"
        with pytest.raises(RegistryError, match="certificate is not trusted") as caught:
            await fetch(transport, f"{base}/")
    assert not caught.value.temporary
    assert "--ca-file" in str(caught.value.hint)


async def test_plain_http_at_an_https_address_has_a_hint(transport: Transport) -> None:
    async with serve(hello) as server:
        with pytest.raises(RegistryError, match="no TLS connection") as caught:
            await fetch(transport, f"https://{server.host}/")
    assert not caught.value.temporary
    assert "--insecure 127.0.0.1" in str(caught.value.hint)


async def test_only_named_hosts_and_loopback_may_do_without_tls(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, insecure=frozenset({"reg.example", "other.example:5000"}))
    async with Transport(settings) as transport:
        allowed = [
            "reg.example",
            "reg.example:5000",
            "other.example:5000",
            "localhost:5000",
            "127.0.0.1",
            "[::1]:1",
        ]
        refused = ["other.example", "other.example:5001", "registry.example", "x.reg.example"]
        assert [host for host in allowed + refused if transport.allows_plain(host)] == allowed
        assert await transport.base_url("registry.example", "app") == "https://registry.example"


async def test_unreachable_hosts_are_not_taken_for_plain_ones(transport: Transport) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    await listener.aclose()
    with pytest.raises(Unavailable):
        await transport.base_url(host, "app")


async def test_proxies_of_the_environment_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def proxy(seen: Seen, wire: Wire) -> None:
        await wire.answer(403 if seen.method == "CONNECT" else 200, b"through the proxy")

    async with serve(proxy) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hunter2@{server.host}")
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@{server.host}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        settings = settings_in(tmp_path, insecure=frozenset({"reg.example"}))
        async with Transport(settings) as transport:
            base = await transport.base_url("reg.example", "app")
            assert await fetch(transport, f"{base}/x") == b"through the proxy"
            with pytest.raises(RegistryError, match="the proxy refused") as caught:
                await fetch(transport, "https://registry.example/")
            assert "hunter2" not in str(caught.value)
    assert server.seen[1].target == "http://reg.example/x"


async def test_unusable_proxies_are_named_without_their_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "gopher://user:hunter2@proxy")
    async with Transport(settings_in(tmp_path)) as transport:
        with pytest.raises(UsageError) as caught:
            await fetch(transport, "https://registry.example/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_ca_files_are_checked(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"ca\.pem"):
        Transport(settings_in(tmp_path, ca_file=path))
