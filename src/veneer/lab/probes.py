"""Readiness of servers, asked in their own protocols over loopback.

A probe is true once the server has answered a question that it can only answer when it works. While nobody
listens, or the answer is that it starts up, it is false; the caller asks again. No libraries of clients: a
question is a few bytes.
"""

import socket
import struct
from collections.abc import Callable

from veneer.lab.imageset import Probe

__all__ = ["is_free", "is_ready"]

#: Once it listens, it is waited for: backlogs take connections before anybody accepts them.
_ANSWER_DEADLINE_S = 30.0
#: All answers are short.
_MAX_ANSWER = 64 << 10


def is_ready(probe: Probe) -> bool:
    """Ask once. May wait for an answer for as long as a server takes to give it."""
    try:
        with socket.create_connection(("127.0.0.1", probe.port), timeout=_ANSWER_DEADLINE_S) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _QUESTIONS[probe.kind](server, probe)
    except (OSError, EOFError):
        return False


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _http(server: socket.socket, probe: Probe) -> bool:
    server.sendall(f"GET {probe.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    while len(answer) < _MAX_ANSWER and (piece := server.recv(_MAX_ANSWER)):
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split(b" ")
    return (
        len(status) > 1
        and status[0].startswith(b"HTTP/1.")
        and status[1] == b"200"
        and (probe.answer.encode() in body)
    )


def _redis(server: socket.socket, _probe: Probe) -> bool:
    server.sendall(b"PING\r\n")
    return _exactly(server, 7) == b"+PONG\r\n"


def _postgres(server: socket.socket, _probe: Probe) -> bool:
    """Start a session and run a query (PostgreSQL's protocol 3.0, chapter "Message Flow")."""
    start = struct.pack("!i", 3 << 16) + b"user\0postgres\0database\0postgres\0\0"
    server.sendall(struct.pack("!i", len(start) + 4) + start)
    if not _until_ready(server)[0]:
        return False
    query = b"SELECT 1\0"
    server.sendall(b"Q" + struct.pack("!i", len(query) + 4) + query)
    return _until_ready(server) == (True, b"1")


def _until_ready(server: socket.socket) -> tuple[bool, bytes]:
    """Read messages until ReadyForQuery or an error: whether it was the former, and the last value of a row."""
    value = b""
    while True:
        kind, length = struct.unpack("!ci", _exactly(server, 5))
        if not 4 <= length <= _MAX_ANSWER:
            return False, b""
        body = _exactly(server, length - 4)
        if kind == b"D":
            value = body[6:]  # one column: their number, its length
        elif kind == b"Z":
            return True, value
        elif kind == b"E":
            return False, b""


def _exactly(server: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = server.recv(length - len(data))
        if not piece:
            raise EOFError("the server closed the connection")
        data += piece
    return bytes(data)


_QUESTIONS: dict[str, Callable[[socket.socket, Probe], bool]] = {
    "http": _http,
    "redis": _redis,
    "postgres": _postgres,
}
