"""A TCP proxy that makes loopback feel like a distant network: round-trip time and limited bandwidth.

It works in user space because netem is missing where tests run. A connection pays one round trip for its
handshake, every byte half of one each way, and all connections together share the downstream rate, first come
first served. Not emulated: loss, slow start, upstream rate. Delays are absolute deadlines on trio's clock, so
errors do not add up, and a test on a mock clock measures them exactly.

Run as a program for demonstrations: ``python -m veneer.testing.delay --listen 6000 --target 5000 --rtt-ms 50
--mbit 100``.
"""

import argparse
import math
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from veneer.serve.http import open_port
from veneer.serve.registry import address

__all__ = ["DelayProxy", "delay_proxy"]

#: Bytes taken at a time: 1.3 ms at 100 Mb/s, so that connections share the line evenly.
_CHUNK = 16 << 10
#: Seconds of traffic that may wait for the line before the proxy stops reading, like a router's queue.
_QUEUE_S = 0.02
#: Chunks under way in one direction of one connection: 64 MiB, one second at 500 Mb/s.
_MAX_UNDER_WAY = 4_096


class DelayProxy:
    """Where the proxy is, and what has passed through it."""

    def __init__(self, host: str, rtt_s: float, bits_per_s: float) -> None:
        #: ``name:port`` of the listener.
        self.host = host
        self.bytes_down = 0
        self.bytes_up = 0
        self.connections = 0
        self._half_s = rtt_s / 2
        self._bytes_per_s = bits_per_s / 8
        self._free_at = -math.inf

    async def _carry(self, client: trio.SocketStream, target: tuple[str, int]) -> None:
        self.connections += 1
        async with client:
            await trio.sleep(2 * self._half_s)
            try:
                server = await trio.open_tcp_stream(*target)
            except OSError:
                _reset(client)
                return
            async with server:
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, client, server, False)
                        nursery.start_soon(self._pump, server, client, True)
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    # A reset on one side is a reset on the other.
                    _reset(client)
                    _reset(server)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, down: bool) -> None:
        """Carry one direction; end of input is carried like data."""
        entry, outlet = trio.open_memory_channel[tuple[float, bytes]](_MAX_UNDER_WAY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, outlet, sink, down)
            async with entry:
                while True:
                    data = bytes(await source.receive_some(_CHUNK))
                    await entry.send((await self._line(len(data), down) + self._half_s, data))
                    if not data:
                        return

    async def _line(self, length: int, down: bool) -> float:
        """Wait for room in the queue; the time at which ``length`` bytes have left it."""
        now = trio.current_time()
        if not down:
            return now
        self._free_at = max(self._free_at, now) + length / self._bytes_per_s
        leaves = self._free_at
        if leaves - now > _QUEUE_S:
            await trio.sleep_until(leaves - _QUEUE_S)
        return leaves

    async def _deliver(
        self, outlet: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream, down: bool
    ) -> None:
        async for due, data in outlet:
            await trio.sleep_until(due)
            if not data:
                await sink.send_eof()
                return
            if down:
                self.bytes_down += len(data)
            else:
                self.bytes_up += len(data)
            await sink.send_all(data)


def _reset(stream: trio.SocketStream) -> None:
    """Make the coming close of a socket a reset; it may be closed already."""
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def delay_proxy(
    target_host: str,
    target_port: int,
    *,
    rtt_s: float,
    bits_per_s: float = math.inf,
    port: int = 0,
) -> AsyncIterator[DelayProxy]:
    """Carry connections to the target while the block runs; ``proxy.host`` is where clients connect to."""
    listener = await open_port("127.0.0.1", port)
    proxy = DelayProxy(address(listener), rtt_s, bits_per_s)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def carry(stream: trio.SocketStream) -> None:
            await proxy._carry(stream, (target_host, target_port))

        nursery.start_soon(trio.serve_listeners, carry, [listener])
        try:
            yield proxy
        except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _run(options: argparse.Namespace) -> None:
    host, _, port = options.target.rpartition(":")
    rate = options.mbit * 1e6 if options.mbit else math.inf
    async with delay_proxy(
        host or "127.0.0.1", int(port), rtt_s=options.rtt_ms / 1000, bits_per_s=rate, port=options.listen
    ) as proxy:
        sys.stderr.write(f"{proxy.host} -> {options.target}: {options.rtt_ms:g} ms, {options.mbit:g} Mb/s\n")
        await trio.sleep_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the proxy until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m veneer.testing.delay", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--listen", type=int, default=0, metavar="PORT", help="port on 127.0.0.1; 0 takes a free one"
    )
    parser.add_argument(
        "--target", required=True, metavar="[HOST:]PORT", help="where connections are carried to"
    )
    parser.add_argument("--rtt-ms", type=float, default=0.0, metavar="MS", help="round-trip time")
    parser.add_argument("--mbit", type=float, default=0.0, metavar="N", help="downstream Mb/s; 0 is unlimited")
    try:
        trio.run(_run, parser.parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
