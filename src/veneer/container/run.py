"""Running a bundle and being its command's terminal, input, output and target of signals.

Used by a command line and nothing else: it takes over the process's signal handlers while the container runs,
and has no event loop, which would cost a start more time than the runtime does. For the same reason nothing is
imported here that an interpreter has not loaded anyway, but for what is written in C.
"""

import os
import select
import sys
import time
from _signal import (  # type: ignore[import-not-found] # without the enums around it
    SIGHUP,
    SIGINT,
    SIGPIPE,
    SIGQUIT,
    SIGTERM,
    SIGUSR1,
    SIGUSR2,
    SIGXFSZ,
    set_wakeup_fd,
    signal,
)

# typing takes longer to import than all of this; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["ContainerRun", "Outcome"]

#: Signals passed on to the container's process.
FORWARDED = (SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2)
#: A terminal sends these to its whole foreground group, the runtime included.
FROM_TERMINAL = (SIGINT, SIGQUIT)
#: The command may ignore requests to end; whoever repeats them so often means it.
REQUESTS_BEFORE_KILL = 3
#: Python ignores these, and what is ignored stays so in other programs.
_RESTORED = (SIGPIPE, SIGXFSZ)
_CHUNK = 64 << 10


class Outcome:
    """How a container ended.

    Attributes:
        exit_code: of the command; 128 + n when signal n ended it.
        first_output: :func:`time.monotonic` of its first byte of output; None without, or when nobody watched.
        spawning: the same of when the runtime began to be spawned, and was.
        ended: the same of its end.
    """

    __slots__ = ("ended", "exit_code", "first_output", "spawning")

    def __init__(
        self, exit_code: int, first_output: float | None, spawning: tuple[float, float], ended: float
    ) -> None:
        self.exit_code = exit_code
        self.first_output = first_output
        self.spawning = spawning
        self.ended = ended


class ContainerRun:
    """One run of the runtime, and the signals that are meant for what it runs.

    Args:
        runtime: its program.
        interactive: connect standard input.
        terminal: standard input and output are the container's terminal.
        watch_output: let output go through this process, to know when the first comes.
    """

    def __init__(self, runtime: str, *, interactive: bool, terminal: bool, watch_output: bool) -> None:
        self._runtime = runtime
        self._connected = interactive or terminal
        # A runtime in a process group of its own could not read from our terminal.
        self._shares_group = self._connected and os.isatty(0)
        self._watch_output = watch_output and not terminal
        self._name = ""
        self._pid = 0
        self._requests = 0
        self._received: list[int] = []

    def run(self, name: str, bundle: str) -> Outcome:
        """Run the bundle as container ``name``, and wait for its end. Raises OSError."""
        self._name = name
        woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = self._take_signals(wake)
        try:
            began = time.monotonic()
            output = self._start("run", "--bundle", bundle, name)
            self._pass_on()
            spawned = time.monotonic()
            try:
                first_output = self._wait(output, woken)
            finally:
                # Not reaped while signals may still go to it.
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            ended = time.monotonic()
        finally:
            self._give_signals_back(before)
            os.close(woken)
            os.close(wake)
        status = os.waitpid(self._pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            from veneer.container.runtime import delete_container

            # The runtime itself was killed, and left its container behind.
            delete_container(self._runtime, name)
        return Outcome(code if code >= 0 else 128 - code, first_output, (began, spawned), ended)

    def _start(self, *arguments: str) -> int | None:
        """Spawn the runtime; where its output comes from, if it is watched."""
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if not self._connected:
            actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        source = sink = None
        if self._watch_output:
            source, sink = os.pipe()
            actions.append((os.POSIX_SPAWN_DUP2, sink, 1))
        try:
            argv = [self._runtime, *arguments]
            if self._shares_group:
                self._pid = os.posix_spawn(
                    self._runtime, argv, os.environ, file_actions=actions, setsigdef=_RESTORED
                )
            else:
                self._pid = os.posix_spawn(
                    self._runtime, argv, os.environ, file_actions=actions, setsigdef=_RESTORED, setpgroup=0
                )
        finally:
            if sink is not None:
                os.close(sink)
        return source

    def _wait(self, output: int | None, woken: int) -> float | None:
        """Wait for the runtime's end, copying its ``output`` to ours; when the first came. Closes ``output``.

        A signal that comes just before a blocking call leaves a byte in ``woken``, so that the call returns and
        the interpreter gets to the handler; a plain wait would keep the signal until the next one.
        """
        first: float | None = None
        failure: OSError | None = None
        end = os.pidfd_open(self._pid)
        poller = select.poll()
        for fd in (end, woken) if output is None else (end, woken, output):
            poller.register(fd, select.POLLIN)
        running = True
        try:
            while running or output is not None:
                ready = dict(poller.poll())
                if woken in ready:
                    os.read(woken, _CHUNK)
                if end in ready:
                    poller.unregister(end)
                    running = False
                if output in ready:
                    chunk = os.read(output, _CHUNK)
                    if chunk and first is None:
                        first = time.monotonic()
                    try:
                        taken = bool(chunk) and _write(chunk)
                    except OSError as error:
                        # The command goes on, and signals are still for it.
                        taken, failure = False, error
                    # Closing our end tells the command that nobody reads its output any more.
                    if not taken:
                        poller.unregister(output)
                        os.close(output)
                        output = None
        finally:
            os.close(end)
            if output is not None:
                os.close(output)
        if failure is not None:
            raise failure
        return first

    def _take_signals(self, wake: int) -> "tuple[int, dict[int, object]] | None":
        try:
            # Nobody needs to know that a pipe is full of reasons to wake up.
            waked = set_wakeup_fd(wake, warn_on_full_buffer=False)
        except ValueError:
            return None  # signals are the main thread's
        return waked, {number: signal(number, self._on_signal) for number in FORWARDED}

    def _give_signals_back(self, before: "tuple[int, dict[int, object]] | None") -> None:
        if before is not None:
            waked, handlers = before
            for number, handler in handlers.items():
                signal(number, handler)
            set_wakeup_fd(waked)

    def _on_signal(self, number: int, _frame: "FrameType | None") -> None:
        self._received.append(number)
        # Before that the runtime may be there, or not: whoever starts it knows first.
        if self._pid:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._received:
            number = self._received.pop(0)
            if not (self._shares_group and number in FROM_TERMINAL):
                os.kill(self._pid, number)
            self._requests += number in (SIGINT, SIGTERM)
            if self._requests >= REQUESTS_BEFORE_KILL:
                null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
                kill = [self._runtime, "kill", self._name, "KILL"]
                os.posix_spawn(self._runtime, kill, os.environ, file_actions=null)


def _write(chunk: bytes) -> bool:
    """Write all to our output; false when nobody reads it any more."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(sys.stdout.fileno(), view) :]
    except BrokenPipeError:
        return False
    return True
