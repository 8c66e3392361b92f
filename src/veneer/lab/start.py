"""One start, measured from the shell: a command is spawned, and its clock stops at its end or its first answer.

The clock is monotonic and begins before the process is made, so that everything the command does counts, its
own start included. Every wait has a deadline, and a server that dies is noticed at once. Nothing is left: a
server is asked to end, and made to.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import UsageError
from veneer.lab.imageset import Probe
from veneer.lab.probes import is_free, is_ready
from veneer.waiting import wait_readable

__all__ = ["Start", "start"]

#: Between two questions to a server; each takes some 50 microseconds while nobody listens.
_POLL_S = 0.001
#: A server may take its time to end, but not for ever: after each wait it is asked more firmly.
_END_WAITS_S = (10.0, 3.0, 3.0)
#: Output of a program that is looked at.
_MAX_OUTPUT = 1 << 20
_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class Start:
    """How a start went.

    Args:
        outcome: ``ok``, ``failed``, ``died`` or ``timeout``.
        began: :func:`time.monotonic` before it was spawned.
        seconds: until its end or its first answer; None unless ``ok``.
        first_output_s: until the first byte on standard output; None for servers, and without.
        last_output_s: until the last one. A program that says what it has found ends with it; what comes after
            that is whoever ran it cleaning up, each in a way of his own.
        exit_code: None for a server that was ended, and for what had to be.
        error: why it is not ``ok``.
        output: what a program wrote to standard output.
    """

    outcome: str
    began: float
    seconds: float | None
    first_output_s: float | None
    exit_code: int | None
    error: str | None
    output: bytes = b""
    last_output_s: float | None = None


def start(
    argv: Sequence[str],
    probe: Probe,
    *,
    environment: Mapping[str, str],
    deadline_s: float,
    log: Path,
    stopped: Callable[[], None] = lambda: None,
    ending: signal.Signals = signal.SIGTERM,
) -> Start:
    """Spawn a command, wait until it is ready, and end it. Blocks.

    Args:
        argv: of the command; it gets no standard input.
        probe: when it is ready.
        environment: of the command.
        deadline_s: when it is given up.
        log: takes standard error, and a server's standard output.
        stopped: called when the clock has stopped, before a server is ended.
        ending: signal that asks a server to end.

    Raises:
        UsageError: somebody listens where the server should.
    """
    if probe.is_server and not is_free(probe.port):
        raise UsageError(
            f"port {probe.port} of 127.0.0.1 is taken", hint="end what listens there; images have fixed ports"
        )
    with log.open("wb") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=errors if probe.is_server else subprocess.PIPE,
            stderr=errors,
            env=environment,
            process_group=0,
        )
        try:
            watch = _server if probe.is_server else _program
            result = watch(process, probe, began, deadline_s)
            stopped()
            return result
        finally:
            _end(process, ending)


def _program(process: "subprocess.Popen[bytes]", probe: Probe, began: float, deadline_s: float) -> Start:
    assert process.stdout is not None
    output, first, last = bytearray(), None, None
    with process.stdout as pipe:
        descriptor = pipe.fileno()
        while True:
            left = began + deadline_s - time.monotonic()
            if left <= 0 or not wait_readable(descriptor, left):
                return Start("timeout", began, None, first, None, f"no end within {deadline_s:g} s")
            piece = os.read(descriptor, _PIECE)
            if not piece:
                break
            last = time.monotonic() - began
            if first is None:
                first = last
            output += piece[: _MAX_OUTPUT - len(output)]
    # Not wait() with a time-out, which looks now and then and sleeps up to 50 ms in between.
    if not _ended(process, began + deadline_s - time.monotonic()):
        return Start("timeout", began, None, first, None, f"no end within {deadline_s:g} s")
    seconds, code, error = time.monotonic() - began, process.wait(), None
    if code:
        error = f"exit status {code}"
    elif not bytes(output).startswith(probe.answer.encode()):
        error = f"wrote {bytes(output[:80])!r}, not {probe.answer!r}"
    outcome = "failed" if error else "ok"
    return Start(outcome, began, None if error else seconds, first, code, error, bytes(output), last)


def _ended(process: "subprocess.Popen[bytes]", wait_s: float) -> bool:
    descriptor = os.pidfd_open(process.pid)
    try:
        return wait_readable(descriptor, max(0.0, wait_s))
    finally:
        os.close(descriptor)


def _server(process: "subprocess.Popen[bytes]", probe: Probe, began: float, deadline_s: float) -> Start:
    while not is_ready(probe):
        if process.poll() is not None:
            error = f"ended with status {process.returncode} before it answered"
            return Start("died", began, None, None, process.returncode, error)
        if time.monotonic() - began > deadline_s:
            return Start("timeout", began, None, None, None, f"no answer within {deadline_s:g} s")
        time.sleep(_POLL_S)
    return Start("ok", began, time.monotonic() - began, None, None, None)


def _end(process: "subprocess.Popen[bytes]", ending: signal.Signals) -> None:
    """Ask it to end, three times, as ``veneer run`` and ``ctr run`` pass it on; then make it."""
    for wait_s in _END_WAITS_S:
        if process.poll() is not None:
            return
        process.send_signal(ending)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
