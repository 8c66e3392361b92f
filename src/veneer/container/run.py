"""Running a bundle and being its command's terminal, input, output and target of signals.

Used by a command line and nothing else: it takes over the process's signal handlers while the container runs,
and has no event loop, which would cost a start more time than the runtime does. For the same reason nothing is
imported here that an interpreter has not loaded anyway, but for what is written in C.
"""

import os
import select
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
    signal,
)

from veneer.waiting import wait_any

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
        #: Signals that came before there was a runtime to pass them on to.
        self._early: list[int] = []

    def run(self, name: str, bundle: str) -> Outcome:
        """Run the bundle as container ``name``, and wait for its end. Raises OSError."""
        self._name = name
        before = self._take_signals()
        try:
            began = time.monotonic()
            output = self._start("run", "--bundle", bundle, name)
            for number in self._early:
                self._pass_on(number)
            spawned = time.monotonic()
            try:
                first_output = self._wait(output)
            finally:
                # Not reaped while signals may still go to it.
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            ended = time.monotonic()
        finally:
            for number, handler in before.items():
                signal(number, handler)
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

    def _wait(self, output: int | None) -> float | None:
        """Wait for the runtime's end, copying ``output`` to ours, and close it; when the first of it came."""
        first: float | None = None
        failure: OSError | None = None
        end: int | None = os.pidfd_open(self._pid)
        sink, held, over = 1, memoryview(b""), output is None
        try:
            while end is not None or not over:
                wanted = {fd for fd in (end, None if held else output) if fd is not None}
                ready = wait_any(wanted, writable=sink if held else None)
                if end in ready:
                    os.close(end)
                    end = None
                if output in ready:
                    held = memoryview(os.read(output, _CHUNK))
                    over = not held
                    if held and first is None:
                        first = time.monotonic()
                if sink in ready:
                    try:
                        held = held[os.write(sink, held[: select.PIPE_BUF]) :]
                    except BrokenPipeError:
                        over = True
                    except OSError as error:
                        # The command goes on, and signals are still for it.
                        over, failure = True, error
                if over and output is not None:
                    # This tells the command, if it goes on, that nobody reads its output any more.
                    os.close(output)
                    output, held = None, memoryview(b"")
        finally:
            for fd in (end, output):
                if fd is not None:
                    os.close(fd)
        if failure is not None:
            raise failure
        return first

    def _take_signals(self) -> "dict[int, object]":
        try:
            return {number: signal(number, self._on_signal) for number in FORWARDED}
        except ValueError:
            return {}  # signals are the main thread's

    def _on_signal(self, number: int, _frame: "FrameType | None") -> None:
        if self._pid:
            self._pass_on(number)
        else:
            # The runtime may be there, or not: whoever starts it knows first.
            self._early.append(number)

    def _pass_on(self, number: int) -> None:
        if not (self._shares_group and number in FROM_TERMINAL):
            os.kill(self._pid, number)
        self._requests += number in (SIGINT, SIGTERM)
        if self._requests >= REQUESTS_BEFORE_KILL:
            null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
            kill = [self._runtime, "kill", self._name, "KILL"]
            os.posix_spawn(self._runtime, kill, os.environ, file_actions=null)
