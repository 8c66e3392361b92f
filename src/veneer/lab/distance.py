"""Distances to the registry: a line that runs, its counters, and a check that it is as long as it should be.

A bench does not go on over a line that is off by more than the tolerance: its figures would be of another
network.
"""

import json
import math
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from veneer.errors import Unavailable, UsageError
from veneer.lab.records import Network, NetworkEvent
from veneer.lab.servers import end

__all__ = ["NETWORKS", "Counters", "Distance", "check_network", "distance", "parse_network"]

#: Those that comparisons are made for; others are written in the same way.
NETWORKS = ("0ms", "10ms-1gbit", "50ms-100mbit")

_NAME = re.compile(r"(?P<rtt>\d{1,4}(\.\d{1,3})?)ms(-(?P<rate>\d{1,6}(\.\d{1,3})?)(?P<unit>[mg])bit)?")
_ROUND_TRIPS = 9
#: Seconds of traffic that bandwidth is measured with.
_TRANSFER_S = 1.0
#: The same without a limit, in bytes.
_UNLIMITED = 256 << 20
#: Round trips may be off by a tenth, or by what a busy machine takes to wake up; bandwidth by a tenth.
_TOLERANCE = 0.1
_LATENCY_MS = 1.5
#: A line without limit that is slower than this is one.
_LEAST_MBIT = 1_000.0
_CLIENTS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Counters:
    """What has passed through a line since its reset.

    Args:
        bytes_down: towards the clients.
        bytes_up: towards the registry.
        connections: that clients made.
        cpu_s: processor time of the line's process.
        arrivals: time (:func:`time.monotonic`) and bytes that had come down until then.
    """

    bytes_down: int
    bytes_up: int
    connections: int
    cpu_s: float
    arrivals: tuple[tuple[float, int], ...]


class Distance:
    """A line that runs. Used by one thread."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.port = int(self._answer()["port"])

    def counters(self) -> Counters:
        """What has passed through so far."""
        return self._ask(b"counters\n")

    def reset(self) -> None:
        """End all connections and count from zero."""
        self._ask(b"reset\n")

    def _ask(self, command: bytes) -> Counters:
        assert self._process.stdin is not None
        self._process.stdin.write(command)
        self._process.stdin.flush()
        answer = self._answer()
        return Counters(
            answer["bytes_down"],
            answer["bytes_up"],
            answer["connections"],
            answer["cpu_s"],
            tuple((at, size) for at, size in answer["arrivals"]),
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable("the line to the registry broke: its process ended")
        document: dict[str, Any] = json.loads(line)
        return document


@contextmanager
def distance(network: Network, target: int) -> Iterator[Distance]:
    """A line of that length to a port of loopback, while the block runs."""
    argv = [sys.executable, "-m", "veneer.lab.line", "--target", str(target)]
    argv += ["--rtt-ms", str(network.rtt_ms), "--mbit", str(network.mbit)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    try:
        yield Distance(process)
    finally:
        end(process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def parse_network(text: str) -> Network:
    """A network from its name, such as ``0ms``, ``10ms-1gbit`` or ``50ms-100mbit``. Raises UsageError."""
    match = _NAME.fullmatch(text)
    rate = float(match["rate"] or 0) * (1000 if match["unit"] == "g" else 1) if match else 0.0
    if match is None or (match["rate"] and not rate):
        raise UsageError(f"invalid network {text!r}", hint="write it like 0ms, 10ms-1gbit or 50ms-100mbit")
    return Network(text, float(match["rtt"]), rate)


def check_network(network: Network, at_s: float) -> NetworkEvent:
    """Measure a line of that length. Raises Unavailable when it is off by more than the tolerance."""
    with _source() as port:
        near_ms, _ = _round_trips(port)
        with distance(network, port) as line:
            far_ms, connect_ms = _round_trips(line.port)
            size = int(network.mbit * 1e6 / 8 * _TRANSFER_S) or _UNLIMITED
            line.reset()
            mbit = _transfer(line.port, size, 1)
            mbit_shared = _transfer(line.port, size, _CLIENTS)
            used = line.counters()
    event = NetworkEvent(
        network.name,
        far_ms - near_ms,
        connect_ms - near_ms,
        mbit,
        mbit_shared,
        used.cpu_s / (used.bytes_down / 1e9),
        at_s,
    )
    _judge(network, event)
    return event


def _judge(network: Network, event: NetworkEvent) -> None:
    off_ms = max(_TOLERANCE * network.rtt_ms, _LATENCY_MS)
    pairs = [
        ("round trip", event.rtt_ms, network.rtt_ms - off_ms, network.rtt_ms + off_ms, "ms"),
        ("connection", event.connect_ms, 2 * (network.rtt_ms - off_ms), 2 * (network.rtt_ms + off_ms), "ms"),
    ]
    least, most = (1 - _TOLERANCE) * network.mbit or _LEAST_MBIT, (1 + _TOLERANCE) * network.mbit or math.inf
    pairs += [
        ("bandwidth", event.mbit, least, most, "Mb/s"),
        ("shared", event.mbit_shared, least, most, "Mb/s"),
    ]
    for what, value, low, high, unit in pairs:
        if not low <= value <= high:
            raise Unavailable(
                f"the line for {network.name} is not what it should be: {what} {value:.2f} {unit}, "
                f"not {low:.2f} to {high:.2f}",
                hint="try again when the machine is less busy",
            )


# A server of any number of bytes, and its clients.


@contextmanager
def _source() -> Iterator[int]:
    """Serve connections that ask, in 8 bytes, for a number of bytes; the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            # A client that goes, as every one does, may show as a reset here.
            with client, suppress(ConnectionResetError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                block = memoryview(bytes(_CHUNK))
                while request := client.recv(8, socket.MSG_WAITALL):
                    left = int.from_bytes(request, "big")
                    while left:
                        left -= client.send(block[:left])

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # closed below
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _round_trips(port: int) -> tuple[float, float]:
    """Medians in ms: of a request on an open connection, and on one that is opened for it."""
    open_ms, new_ms = [], []
    for _ in range(_ROUND_TRIPS):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _fetch(client, 1)
            new_ms.append(1000 * (time.monotonic() - began))
            began = time.monotonic()
            _fetch(client, 1)
            open_ms.append(1000 * (time.monotonic() - began))
    return statistics.median(open_ms), statistics.median(new_ms)


def _transfer(port: int, size: int, clients: int) -> float:
    """Mb/s of ``size`` bytes over some connections at once, from the first byte to the last."""
    ends: list[tuple[float, float]] = []

    def fetch() -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            ends.append(_fetch(client, size // clients))

    threads = [threading.Thread(target=fetch) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 8 * size / 1e6 / (max(last for _, last in ends) - min(first for first, _ in ends))


def _fetch(client: socket.socket, size: int) -> tuple[float, float]:
    """Ask for bytes; when the first came, and the last."""
    client.sendall(size.to_bytes(8, "big"))
    buffer = bytearray(min(size, _CHUNK))
    left, first = size, 0.0
    while left:
        got = client.recv_into(buffer, min(left, _CHUNK))
        if not got:
            raise Unavailable("the line to the registry broke while it was checked")
        first = first or time.monotonic()
        left -= got
    return first, time.monotonic()
