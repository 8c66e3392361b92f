"""What a supervisor does about its own process: its log, its name, its signals, its standard output.

Standard library only, and little of it: logging and what it imports would be a third of the supervisor.
"""

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from veneer.mount.fanotify import MAX_DESCRIPTORS

__all__ = [
    "EXIT_ERROR",
    "descriptor_limit",
    "error_message",
    "hold_signals",
    "ignore_signals",
    "keep_to_myself",
    "let_go_of",
    "log",
    "one_byte",
    "protect",
    "release_signals",
    "say",
    "set_name",
    "set_oom_score_adj",
    "wake_up_by_signals",
]

#: Exit code of a daemon that could not start; that of MountError.
EXIT_ERROR = 40
_OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
#: The last to be killed for want of memory, except for what nobody may kill.
_PROTECTED = "-900"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def log(level: Literal["INFO", "WARNING", "ERROR"], text: str) -> None:
    """Write a line to standard error, in the form that all our logs have."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    line = f"ts={when} level={level} logger=veneer.daemon.supervisor pid={os.getpid()} {text}\n"
    with contextlib.suppress(OSError):  # there is nowhere else to say it
        os.write(2, line.encode(errors="replace"))


def say(message: Mapping[str, object]) -> None:
    """Write a message to standard output; whoever started this may have gone."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def error_message(text: str, hint: str | None = None) -> dict[str, object]:
    """An error for another process."""
    return {"type": "error", "code": EXIT_ERROR, "message": text, "hint": hint}


def let_go_of(*fds: int) -> None:
    """Have descriptors be /dev/null from now on."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def wake_up_by_signals() -> int:
    """What becomes readable, with the number of the signal, when one of SIGTERM, SIGINT and SIGHUP has come."""
    reader, writer = os.pipe()
    for fd in (reader, writer):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(writer)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    release_signals()
    return reader


def hold_signals() -> None:
    """Have signals wait, also for another program in this process, until it is ready for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def release_signals() -> None:
    """Undo :func:`hold_signals`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def one_byte() -> int:
    """What can be read once, by one of the processes that have it; then it is at its end."""
    reader, writer = os.pipe()
    os.write(writer, b"!")
    os.close(writer)
    return reader


def ignore_signals(reader: int) -> None:
    """Undo :func:`wake_up_by_signals` in a process that has inherited it; the signals are for another one."""
    os.close(signal.set_wakeup_fd(-1))
    os.close(reader)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def keep_to_myself(fds: Iterable[int]) -> None:
    """Have no program inherit descriptors."""
    for fd in fds:
        os.set_inheritable(fd, False)


def set_name(name: str) -> None:
    """What ps and top show."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def descriptor_limit() -> int:
    """All descriptors of a worker have numbers below this: it inherits our limit, and has one of its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)


def protect() -> str | None:
    """Have the kernel kill others first when memory runs out. Returns the value that was there before."""
    try:
        with open(_OOM_SCORE_ADJ, encoding="ascii") as file:
            before = file.read().strip()
    except OSError:
        return None
    set_oom_score_adj(_PROTECTED)
    return before


def set_oom_score_adj(score: str) -> None:
    """How readily the kernel kills this process, from -1000 to 1000, if it may be set to that."""
    with contextlib.suppress(OSError), open(_OOM_SCORE_ADJ, "w", encoding="ascii") as file:
        file.write(score)
