"""Waiting in a program without an event loop, such that no signal has to wait, too.

The interpreter runs handlers between its steps. A signal that comes after the last of them and before the
system call that blocks is handled when that has ended: an interrupt is lost until the user repeats it. Here the
signal leaves a byte, on which the call returns.

Not for a process with an event loop, which sees to that itself. Imports nothing that an interpreter has not
loaded anyway, or that is not written in C: it is on the way of every start.
"""

import os
import select
import time
from _signal import set_wakeup_fd  # type: ignore[import-not-found] # without the enums around it

# typing takes longer to import than all of this; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["wait_any", "wait_readable"]

_CHUNK = 64 << 10


def wait_readable(fd: int, timeout_s: float | None = None) -> bool:
    """Wait until something can be read there, or it has ended; whether that was so within the time.

    Raises what handlers of signals raise.
    """
    return bool(wait_any((fd,), timeout_s))


def wait_any(fds: "Iterable[int]", timeout_s: float | None = None, *, writable: int | None = None) -> set[int]:
    """The same for any of several; those of which it is so, none when the time was over.

    ``writable`` is one more, and is so when it takes bytes: a pipe up to PIPE_BUF of them without blocking.
    """
    until = None if timeout_s is None else time.monotonic() + timeout_s
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            # Nobody needs to know that a pipe is full of reasons to wake up.
            before = set_wakeup_fd(wake, warn_on_full_buffer=False)
        except ValueError:
            before = None  # signals are the main thread's
        try:
            return _poll(fds, writable, woken, until)
        finally:
            if before is not None:
                set_wakeup_fd(before)
    finally:
        os.close(woken)
        os.close(wake)


def _poll(fds: "Iterable[int]", writable: int | None, woken: int, until: float | None) -> set[int]:
    poller = select.poll()
    if writable is not None:
        poller.register(writable, select.POLLOUT)
    for fd in (*fds, woken):
        poller.register(fd, select.POLLIN)
    while True:
        left_ms = None if until is None else max(0.0, 1000 * (until - time.monotonic()))
        ready = {fd for fd, _ in poller.poll(left_ms)}
        if ready != {woken}:
            return ready - {woken}
        os.read(woken, _CHUNK)
