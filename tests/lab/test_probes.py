"""Servers are ready when they answer in their own protocol, and not before."""

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from veneer.lab.imageset import Probe
from veneer.lab.probes import is_free, is_ready
from veneer.lab.servers import end, find_program, free_port


@contextmanager
def scripted(*answers: bytes) -> Iterator[int]:
    """A server that gives one answer to each thing it hears, and then closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                for answer in answers:
                    # The probe may have heard enough, and gone.
                    with suppress(ConnectionError):
                        client.recv(4096)
                        client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join(10)


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


AUTHENTICATED = message(b"R", struct.pack("!i", 0)) + message(b"S", b"TimeZone\0UTC\0") + message(b"Z", b"I")
ONE = (
    message(b"T", b"\0\1column\0" + bytes(18))
    + message(b"D", struct.pack("!hi", 1, 1) + b"1")
    + message(b"C", b"SELECT 1\0")
    + message(b"Z", b"I")
)
STARTING_UP = message(b"E", b"SFATAL\0C57P03\0Mthe database system is starting up\0\0")


@pytest.mark.parametrize(
    ("kind", "answers", "ready"),
    [
        ("http", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"], True),
        ("http", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbye\n"], False),
        ("http", [b"HTTP/1.1 503 hello\r\n\r\nhello"], False),
        ("http", [b""], False),
        ("redis", [b"+PONG\r\n"], True),
        ("redis", [b"-LOADING Redis is loading the dataset in memory\r\n"], False),
        ("postgres", [AUTHENTICATED, ONE], True),
        ("postgres", [STARTING_UP], False),
        ("postgres", [AUTHENTICATED, STARTING_UP], False),
        ("postgres", [message(b"R", bytes(1 << 20))], False),
    ],
)
def test_only_an_answer_that_means_it_makes_a_server_ready(
    kind: str, answers: list[bytes], ready: bool
) -> None:
    with scripted(*answers) as port:
        assert is_ready(Probe(kind, "hello", port)) is ready


def test_nobody_listening_is_not_ready() -> None:
    port = free_port()
    assert is_free(port)
    assert not any(is_ready(Probe(kind, port=port)) for kind in ("http", "redis", "postgres"))


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_a_real_http_server(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("hello from busybox\n")
    port = free_port()
    argv = [find_program("busybox"), "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(tmp_path)]
    process = subprocess.Popen(argv)
    try:
        assert until(lambda: is_ready(Probe("http", "hello from busybox", port)))
        assert not is_ready(Probe("http", "hello", port, "/missing"))
        assert not is_free(port)
    finally:
        end(process)
