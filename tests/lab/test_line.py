"""A line carries every byte, counts them, and is as long as it says."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from veneer.errors import Unavailable, UsageError
from veneer.lab import distance as module
from veneer.lab.distance import Distance, check_network, distance, parse_network
from veneer.lab.records import Network, NetworkEvent

SIZE = 3 << 20


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets, and closes when the client has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with client, suppress(ConnectionResetError):
                while data := client.recv(1 << 20):
                    client.sendall(data)

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def through(line: Distance, data: bytes) -> bytes:
    """What comes back of ``data``."""
    with socket.create_connection(("127.0.0.1", line.port), timeout=30) as client:
        failures: list[OSError] = []

        def send() -> None:
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            except OSError as error:
                failures.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        got = bytearray()
        while piece := client.recv(1 << 20):
            got += piece
        thread.join()
    # A reset is told once: to who sends or to who receives.
    for failure in failures:
        raise failure
    return bytes(got)


@pytest.mark.parametrize("network", [Network("near", 0, 0), Network("far", 3, 400)])
def test_every_byte_arrives_and_is_counted(echo: int, network: Network) -> None:
    data = bytes(range(256)) * (SIZE // 256)
    with distance(network, echo) as line:
        for _ in range(3):
            assert through(line, data) == data
        counters = line.counters()
        assert (counters.bytes_down, counters.bytes_up, counters.connections) == (3 * SIZE, 3 * SIZE, 3)
        times, sizes = zip(*counters.arrivals, strict=True)
        assert list(times) == sorted(times)
        assert list(sizes) == sorted(sizes)
        assert sizes[-1] == 3 * SIZE
        line.reset()
        assert line.counters().bytes_down == 0


def test_a_reset_ends_connections(echo: int) -> None:
    with distance(Network("near", 0, 0), echo) as line:
        with socket.create_connection(("127.0.0.1", line.port), timeout=30) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            line.reset()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert through(line, b"still there") == b"still there"


def test_nobody_at_the_other_end_is_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = int(gone.getsockname()[1])
    with distance(Network("near", 0, 0), port) as line, pytest.raises(OSError):
        through(line, b"anybody?")


def test_a_line_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network("10ms-100mbit", 10, 100)
    good = NetworkEvent(network.name, 10.4, 20.9, 98.0, 101.0, 1.0, 0.0)
    module._judge(network, good)
    for wrong in (
        NetworkEvent(network.name, 14.0, 20.9, 98.0, 101.0, 1.0, 0.0),
        NetworkEvent(network.name, 10.4, 11.0, 98.0, 101.0, 1.0, 0.0),
        NetworkEvent(network.name, 10.4, 20.9, 80.0, 101.0, 1.0, 0.0),
        NetworkEvent(network.name, 10.4, 20.9, 98.0, 390.0, 1.0, 0.0),
    ):
        with pytest.raises(Unavailable, match="not what it should be"):
            module._judge(network, wrong)


def test_the_check_measures_what_the_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a judge: a busy machine may be slower, and this test is not about the machine.
    monkeypatch.setattr(module, "_judge", lambda *_: None)
    event = check_network(Network("30ms-80mbit", 30, 80), 1.5)
    assert event.rtt_ms > 25
    assert event.connect_ms > event.rtt_ms + 20
    # What came before the first look at the clock counts, too; without a line it would be thousands.
    assert 0 < event.mbit < 300
    assert 0 < event.mbit_shared < 300
    assert event.cpu_s_per_gb > 0


def test_networks_are_named_by_what_they_are() -> None:
    assert parse_network("0ms") == Network("0ms", 0, 0)
    assert parse_network("10ms-1gbit") == Network("10ms-1gbit", 10, 1000)
    assert parse_network("2.5ms-40mbit") == Network("2.5ms-40mbit", 2.5, 40)
    for wrong in (
        "",
        "10",
        "10ms-",
        "10ms-0mbit",
        "-1ms",
        "1ms-2",
        "1s-2gbit",
        "nanms",
        "1ms-infgbit",
        "1ms-2bit",
    ):
        with pytest.raises(UsageError):
            parse_network(wrong)
