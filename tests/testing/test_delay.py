"""The distance that the proxy adds, measured on a mock clock, where it is exact."""

import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from trio.testing import MockClock

from veneer.serve.http import HTTPServer, open_port
from veneer.serve.message import Disconnect, Request, Response
from veneer.testing.delay import DelayProxy, delay_proxy

RTT_S = 0.5


@asynccontextmanager
async def distant(
    size: int, bits_per_s: float = math.inf
) -> AsyncIterator[tuple[DelayProxy, httpx.AsyncClient]]:
    """A server of ``size`` bytes behind a proxy."""

    async def handler(request: Request) -> Response:
        if request.path == "/reset":
            raise Disconnect(reset=True)
        return Response(200, (), (await request.read(1 << 20) + bytes(size),))

    listener = await open_port("127.0.0.1", 0)
    host, port = listener.socket.getsockname()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HTTPServer(handler).serve, listener)
        async with (
            delay_proxy(host, port, rtt_s=RTT_S, bits_per_s=bits_per_s) as proxy,
            httpx.AsyncClient(base_url=f"http://{proxy.host}", trust_env=False, timeout=1000) as client,
        ):
            yield proxy, client
        nursery.cancel_scope.cancel()


async def test_a_request_takes_a_round_trip_and_a_connection_another(jumping_clock: MockClock) -> None:
    async with distant(10) as (proxy, client):
        times = []
        for _ in range(3):
            start = trio.current_time()
            assert (await client.get("/")).content == bytes(10)
            times.append(trio.current_time() - start)
        assert times == pytest.approx([2 * RTT_S, RTT_S, RTT_S])
        assert proxy.connections == 1


async def test_all_connections_share_the_bandwidth(autojump_clock: MockClock) -> None:
    size = 1_000_000
    async with distant(size, bits_per_s=8_000_000) as (proxy, client):
        start = trio.current_time()
        ends: list[float] = []

        async def fetch() -> None:
            assert (await client.get("/")).content == bytes(size)
            ends.append(trio.current_time() - start)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch)
        # Never faster than the line; a little slower where the clock jumped before the next bytes were there.
        assert 3.0 + 2 * RTT_S <= max(ends) < 5.5
        assert min(ends) > 2.5  # side by side, not one after another
        assert 3 * size < proxy.bytes_down < 3 * size + 3000
        assert proxy.connections == 3


async def test_bytes_arrive_as_they_were_sent_in_both_directions(jumping_clock: MockClock) -> None:
    body = bytes(range(256)) * 3000
    async with distant(0) as (proxy, client):
        assert (await client.post("/", content=body)).content == body
        assert proxy.bytes_up > len(body)


async def test_resets_and_refusals_are_passed_on(jumping_clock: MockClock) -> None:
    async with distant(0) as (_, client):
        with pytest.raises(httpx.ReadError):
            await client.get("/reset")
    listener = await open_port("127.0.0.1", 0)
    host, port = listener.socket.getsockname()
    await listener.aclose()
    async with delay_proxy(host, port, rtt_s=RTT_S) as proxy, httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://{proxy.host}/")


async def test_it_runs_as_a_program() -> None:
    async def handler(request: Request) -> Response:
        return Response(200, (), (b"through",))

    listener = await open_port("127.0.0.1", 0)
    port = listener.socket.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "veneer.testing.delay",
        "--target",
        str(port),
        "--rtt-ms",
        "1",
        "--mbit",
        "1000",
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HTTPServer(handler).serve, listener)
        process = await trio.lowlevel.open_process(command, stderr=-1)
        assert process.stderr is not None
        async with process.stderr as errors:
            line = bytes(await errors.receive_some()).decode()
            async with httpx.AsyncClient(trust_env=False) as client:
                got = await client.get(f"http://{line.split()[0]}/")
            process.terminate()
            await process.wait()
        nursery.cancel_scope.cancel()
    assert got.content == b"through"
