"""Starts end in one of four ways, always within their deadline, and leave nothing behind."""

import os
import sys
from pathlib import Path

import pytest

from veneer.errors import UsageError
from veneer.lab.imageset import Probe
from veneer.lab.probes import is_free
from veneer.lab.servers import find_program, free_port
from veneer.lab.start import Start, start


def run(script: str, probe: Probe, tmp_path: Path, deadline_s: float = 30.0) -> Start:
    log = tmp_path / "log"
    return start(("sh", "-c", script), probe, environment=os.environ, deadline_s=deadline_s, log=log)


def test_a_program_is_ready_at_its_end(tmp_path: Path) -> None:
    result = run("echo hello; echo said >&2; sleep 0.2", Probe("exit", "hello"), tmp_path)
    assert (result.outcome, result.exit_code, result.output, result.error) == ("ok", 0, b"hello\n", None)
    assert result.first_output_s is not None
    assert result.seconds is not None
    assert result.first_output_s < result.seconds
    assert (tmp_path / "log").read_text() == "said\n"


def test_the_last_output_is_told_from_the_end_of_whoever_ran_the_program(tmp_path: Path) -> None:
    result = run("echo hello; sleep 0.1; echo bye; exec >&-; sleep 0.1", Probe("exit", "hello"), tmp_path)
    assert result.first_output_s is not None
    assert result.last_output_s is not None
    assert result.seconds is not None
    assert result.first_output_s < result.last_output_s < result.seconds


@pytest.mark.parametrize("script", ["echo bye", "echo hello; exit 3", "kill -9 $$"])
def test_a_program_that_does_not_do_its_work_has_no_time(script: str, tmp_path: Path) -> None:
    result = run(script, Probe("exit", "hello"), tmp_path)
    assert (result.outcome, result.seconds) == ("failed", None)
    assert result.error


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    assert run("echo hello; exec sleep 1000", Probe("exit", "hello"), tmp_path, 0.3).outcome == "timeout"
    # Also one that closes its output and goes on.
    assert run("exec sleep 1000 >&- 2>&-", Probe("exit"), tmp_path, 0.3).outcome == "timeout"


def test_a_server_is_ready_at_its_first_answer_and_ended(tmp_path: Path) -> None:
    port, stopped = free_port(), []
    (tmp_path / "index.html").write_text("hello\n")
    httpd = f"exec {find_program('busybox')} httpd -f -p 127.0.0.1:{port} -h {tmp_path}"
    result = start(
        ("sh", "-c", f"sleep 0.2; {httpd}"),
        Probe("http", "hello", port),
        environment=os.environ,
        deadline_s=30,
        log=tmp_path / "log",
        stopped=lambda: stopped.append(is_free(port)),
    )
    assert result.outcome == "ok"
    assert result.seconds is not None
    assert result.seconds > 0.2
    assert stopped == [False]  # called while it ran
    assert is_free(port)


def test_a_server_that_dies_is_noticed_before_the_deadline(tmp_path: Path) -> None:
    result = run("exit 7", Probe("http", port=free_port()), tmp_path, 1000)
    assert (result.outcome, result.exit_code) == ("died", 7)


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    assert run("exec sleep 1000", Probe("redis", port=free_port()), tmp_path, 0.3).outcome == "timeout"


def test_somebody_else_on_the_port_is_no_answer(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UsageError, match="taken"):
        run("true", Probe("http", port=other.getsockname()[1]), tmp_path)


def test_a_stubborn_server_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.lab.start._END_WAITS_S", (0.1, 0.1))
    port = free_port()
    script = (
        "import signal, socket\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"server = socket.create_server(('127.0.0.1', {port}))\n"
        "while True:\n"
        "    client, _ = server.accept()\n"
        "    client.recv(100)\n"
        "    client.sendall(b'+PONG\\r\\n')\n"
    )
    result = start(
        (sys.executable, "-c", script),
        Probe("redis", port=port),
        environment=os.environ,
        deadline_s=30,
        log=tmp_path / "log",
    )
    assert result.outcome == "ok"
    assert is_free(port)
