"""A long line in user space: a TCP proxy with a round-trip time and a bandwidth, in a process of its own.

Like :mod:`veneer.testing.delay`, which is exact on a mock clock, but made to disturb what is measured as
little as possible: no event loop but ``select`` with its microseconds, buffers that are used again, and 500
pieces a second however fast the line is.

A connection pays one round trip for its handshake; every byte half of one each way; all connections share the
downstream bandwidth, two milliseconds' worth at a time, in turns. Not emulated: loss, slow start, and the
bandwidth of the other direction.

Protocol with whoever started it: it writes a line of JSON with its port, then one with its counters for each
line that it reads; ``reset`` ends all connections and sets the counters to zero, anything else leaves them.
It ends with its standard input.
"""

import argparse
import heapq
import json
import math
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence

__all__ = ["Line", "main"]

#: Seconds of traffic taken at a time, so that connections share the line evenly.
_TURN_S = 0.002
_LEAST_CHUNK = 32 << 10
_MOST_CHUNK = 512 << 10
#: Seconds of traffic that may wait for the line before the proxy stops reading, like a router's queue.
_QUEUE_S = 0.01
#: Bytes under way in one direction of one connection: 25 ms one way at 20 Gb/s.
_MOST_UNDER_WAY = 64 << 20
#: Times of arrival are kept for pieces that are at least so far apart.
_RESOLUTION_S = 0.002
_MAX_ARRIVALS = 4_096
#: Buffers kept for later: 64 MiB.
_MOST_SPARE = 128


class _Flow:
    """One direction of a connection: what is under way, and when each piece is due."""

    def __init__(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        self.source = source
        self.sink = sink
        self.down = down
        #: When, and the bytes; none are the end.
        self.pieces: deque[tuple[float, memoryview]] = deque()
        self.under_way = 0
        self.ended = False
        self.delivered = False
        #: The sink takes no more at the moment.
        self.blocked = False

    @property
    def takes(self) -> bool:
        """Whether it may read on, as far as it is concerned."""
        return not self.ended and self.under_way < _MOST_UNDER_WAY


class _Connection:
    """A client's socket, the server's, and both directions."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.flows = (_Flow(server, client, down=True), _Flow(client, server, down=False))


class Line:
    """The proxy. Used by one thread.

    Args:
        target: port on loopback.
        rtt_s: round-trip time.
        bytes_per_s: downstream, ``math.inf`` for as fast as it goes.
    """

    def __init__(self, target: int, rtt_s: float, bytes_per_s: float) -> None:
        self._target = target
        self._half_s = rtt_s / 2
        self._bytes_per_s = bytes_per_s
        turn = _MOST_CHUNK if math.isinf(bytes_per_s) else int(bytes_per_s * _TURN_S)
        self._chunk = min(max(turn, _LEAST_CHUNK), _MOST_CHUNK)
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        #: Connections whose handshake is under way: until when, order, socket.
        self._opening: list[tuple[float, int, socket.socket]] = []
        self._connections: list[_Connection] = []
        self._spare: list[bytearray] = []
        self._zero()

    def _zero(self) -> None:
        self._down = self._up = self._made = 0
        self._arrivals: list[tuple[float, int]] = []
        self._resolution_s = _RESOLUTION_S
        self._cpu_s = time.process_time()

    def counters(self) -> dict[str, object]:
        """What has passed through since the last reset; arrivals are :func:`time.monotonic`, bytes so far."""
        return {
            "bytes_down": self._down,
            "bytes_up": self._up,
            "connections": self._made,
            "cpu_s": time.process_time() - self._cpu_s,
            "arrivals": self._arrivals,
        }

    def reset(self) -> None:
        """End all connections and count from zero."""
        for connection in list(self._connections):
            self._drop(connection)
        for _, _, client in self._opening:
            client.close()
        self._opening.clear()
        self._free_at = 0.0
        self._zero()

    def serve(self, control: int) -> None:
        """Carry bytes until ``control`` ends; answer each line that comes there on standard output."""
        while True:
            now = time.monotonic()
            sources, wake_at = self._readers(now)
            readers: list[int | socket.socket] = [control, self._listener, *sources]
            writers = [flow.sink for c in self._connections for flow in c.flows if flow.blocked]
            wait_s = None if math.isinf(wake_at) else max(0.0, wake_at - now)
            readable, writable, _ = select.select(readers, writers, [], wait_s)
            if control in readable and not self._command(control):
                return
            if self._listener in readable:
                self._accept()
            self._open(time.monotonic())
            ready, free = set(readable), set(writable)
            for connection in list(self._connections):
                self._serve(connection, ready, free)
            if len(self._connections) > 1:
                self._connections.append(self._connections.pop(0))

    def _readers(self, now: float) -> tuple[list[socket.socket], float]:
        """Sockets worth looking at, and when something is due."""
        wake_at = self._opening[0][0] if self._opening else math.inf
        room_at = self._free_at - _QUEUE_S
        out = []
        for connection in self._connections:
            for flow in connection.flows:
                if flow.pieces and not flow.blocked:
                    wake_at = min(wake_at, flow.pieces[0][0])
                if not flow.takes:
                    continue
                if flow.down and room_at > now:
                    wake_at = min(wake_at, room_at)
                else:
                    out.append(flow.source)
        return out, wake_at

    def _command(self, control: int) -> bool:
        data = os.read(control, 4096)
        if data.strip() == b"reset":
            self.reset()
        if data:
            _tell(self.counters())
        return bool(data)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it was gone again
            return
        client.setblocking(False)
        self._made += 1
        heapq.heappush(self._opening, (time.monotonic() + 2 * self._half_s, self._made, client))

    def _open(self, now: float) -> None:
        while self._opening and self._opening[0][0] <= now:
            _, _, client = heapq.heappop(self._opening)
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(client)
                continue
            server.setblocking(False)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(_Connection(client, server))

    def _serve(
        self, connection: _Connection, readable: set[int | socket.socket], writable: set[socket.socket]
    ) -> None:
        try:
            for flow in connection.flows:
                if flow.sink in writable:
                    flow.blocked = False
                if flow.source in readable and flow.takes:
                    self._take(flow)
                self._deliver(flow)
        except OSError:
            self._drop(connection)  # a reset on one side is a reset on the other
            return
        if all(flow.delivered for flow in connection.flows):
            self._drop(connection, reset=False)

    def _take(self, flow: _Flow) -> None:
        now = time.monotonic()
        if flow.down and self._free_at - now > _QUEUE_S:
            return
        buffer = self._spare.pop() if self._spare else bytearray(self._chunk)
        size = flow.source.recv_into(buffer)
        leaves = now
        if flow.down:
            leaves = self._free_at = max(self._free_at, now) + size / self._bytes_per_s
        flow.pieces.append((leaves + self._half_s, memoryview(buffer)[:size]))
        flow.under_way += size
        flow.ended = not size

    def _deliver(self, flow: _Flow) -> None:
        now = time.monotonic()
        while flow.pieces and not flow.blocked and flow.pieces[0][0] <= now:
            due, piece = flow.pieces.popleft()
            if not piece:
                flow.sink.shutdown(socket.SHUT_WR)
                flow.delivered = True
                return
            try:
                sent = flow.sink.send(piece)
            except BlockingIOError:
                sent, flow.blocked = 0, True
            flow.under_way -= sent
            if sent < len(piece):
                flow.pieces.appendleft((due, piece[sent:]))
            elif len(self._spare) < _MOST_SPARE and isinstance(piece.obj, bytearray):
                self._spare.append(piece.obj)
            self._count(flow, sent, now)

    def _count(self, flow: _Flow, size: int, now: float) -> None:
        if not flow.down:
            self._up += size
            return
        self._down += size
        if self._arrivals and now - self._arrivals[-1][0] < self._resolution_s:
            self._arrivals[-1] = (self._arrivals[-1][0], self._down)
            return
        self._arrivals.append((now, self._down))
        if len(self._arrivals) > _MAX_ARRIVALS:
            self._arrivals = self._arrivals[1::2]
            self._resolution_s *= 2

    def _drop(self, connection: _Connection, *, reset: bool = True) -> None:
        self._connections.remove(connection)
        for end in connection.sockets:
            _reset(end) if reset else end.close()


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def _tell(document: object) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m veneer.lab.line")
    parser.add_argument("--target", type=int, required=True, metavar="PORT")
    parser.add_argument("--rtt-ms", type=float, default=0.0, metavar="MS")
    parser.add_argument("--mbit", type=float, default=0.0, metavar="N", help="0 is unlimited")
    options = parser.parse_args(arguments)
    rate = options.mbit * 1e6 / 8 if options.mbit else math.inf
    line = Line(options.target, options.rtt_ms / 1000, rate)
    _tell({"port": line.port})
    line.serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
