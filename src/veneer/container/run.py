"""Running a bundle and being its command's terminal, input, output and target of signals.

Used by a command line and nothing else: it takes over the process's signal handlers while the container runs,
and has no event loop, which would cost a start more time than the runtime does.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from veneer.container.runtime import delete_container

__all__ = ["ContainerRun", "Outcome"]

#: Signals passed on to the container's process.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: A terminal sends these to its whole foreground group, the runtime included.
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
#: The command may ignore requests to end; whoever repeats them so often means it.
REQUESTS_BEFORE_KILL = 3
_CHUNK = 64 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a container ended.

    Args:
        exit_code: of the command; 128 + n when signal n ended it.
        first_output: :func:`time.monotonic` of its first byte of output; None without, or when nobody watched.
        spawning: the same of when the runtime began to be spawned, and was.
        ended: the same of its end.
    """

    exit_code: int
    first_output: float | None
    spawning: tuple[float, float]
    ended: float


class ContainerRun:
    """One run of the runtime, and the signals that are meant for what it runs.

    Args:
        runtime: its program.
        interactive: connect standard input.
        terminal: standard input and output are the container's terminal.
        watch_output: let output go through this process, to know when the first comes.
    """

    def __init__(self, runtime: Path, *, interactive: bool, terminal: bool, watch_output: bool) -> None:
        self._runtime = os.fspath(runtime)
        self._stdin = None if interactive or terminal else subprocess.DEVNULL
        # A runtime in a process group of its own could not read from our terminal.
        self._shares_group = self._stdin is None and sys.stdin.isatty()
        self._watch_output = watch_output and not terminal
        self._name = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = 0

    def run(self, name: str, bundle: Path) -> Outcome:
        """Run the bundle as container ``name``, and wait for its end."""
        self._name = name
        with self._forwarding():
            began = time.monotonic()
            process = subprocess.Popen(
                [self._runtime, "run", "--bundle", os.fspath(bundle), name],
                stdin=self._stdin,
                stdout=subprocess.PIPE if self._watch_output else None,
                process_group=None if self._shares_group else 0,
            )
            spawned = time.monotonic()
            self._process = process
            try:
                first_output = _forward(process.stdout.fileno()) if process.stdout else None
                code = process.wait()
                ended = time.monotonic()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout:
                    process.stdout.close()
        if code < 0:
            # The runtime itself was killed, and left its container behind.
            delete_container(self._runtime, name)
        return Outcome(code if code >= 0 else 128 - code, first_output, (began, spawned), ended)

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        process = self._process
        if process is None:
            # It came between taking over the handlers and starting the runtime: nothing runs yet.
            raise KeyboardInterrupt
        if not (self._shares_group and number in FROM_TERMINAL):
            process.send_signal(number)
        self._requests += number in (signal.SIGINT, signal.SIGTERM)
        if self._requests >= REQUESTS_BEFORE_KILL:
            kill = [self._runtime, "kill", self._name, "KILL"]
            subprocess.Popen(
                kill, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )


def _forward(source: int) -> float | None:
    """Copy output to ours; when the first came."""
    first: float | None = None
    while chunk := os.read(source, _CHUNK):
        if first is None:
            first = time.monotonic()
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(sys.stdout.fileno(), view) :]
        except BrokenPipeError:
            break  # closing our end tells the command what happened to ours
    return first
