"""A process by its pidfd, which stays this process when its number is given to another one.

Standard library only, and little of it: the supervisor imports this.
"""

import contextlib
import fcntl
import os
import signal
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

__all__ = ["Process", "in_words", "start_gated"]

#: ioctl PIDFD_GET_INFO of Linux 6.13 with the first version of struct pidfd_info. It says how a process ended
#: that is no child of ours since 6.15.
_GET_INFO, _INFO_SIZE, _WANT_EXIT = 0xC040_FF0B, 64, 1 << 3
_EXIT_CODE_AT = 60
#: Exit code for "could not be executed", as shells have it.
_NOT_EXECUTED = 127


class Process:
    """A process, ours or not.

    Args:
        pid: its number.
        fd: its pidfd, readable once the process has ended. Belongs to this object.
    """

    __slots__ = ("fd", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd

    @classmethod
    def of_this(cls) -> "Process":
        """The calling process. Raises OSError."""
        return cls(os.getpid(), os.pidfd_open(os.getpid()))

    @classmethod
    def of_child(cls, pid: int) -> "Process":
        """A child that nobody has waited for yet. Raises OSError, and kills it then."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing when the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def reap(self) -> int | None:
        """How it ended: its exit code, or minus the signal; None if that cannot be known.

        For a process that has ended; of a child it waits for the end.
        """
        try:
            result = os.waitid(os.P_PIDFD, self.fd, os.WEXITED)
        except ChildProcessError:
            return self._end_of_stranger()
        if result is None:
            raise AssertionError("waitid waits")
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close(self) -> None:
        """Let go of the process, whatever it does."""
        os.close(self.fd)

    def _end_of_stranger(self) -> int | None:
        # Its new parent may not have waited for it yet: then the kernel says it in /proc, and afterwards here.
        for ask in (self._reaped_status, self._zombie_status, self._reaped_status):
            status = ask()
            if status is not None:
                return os.waitstatus_to_exitcode(status)
        return None

    def _reaped_status(self) -> int | None:
        info = bytearray(_INFO_SIZE)
        struct.pack_into("=Q", info, 0, _WANT_EXIT)
        try:
            fcntl.ioctl(self.fd, _GET_INFO, info)
        except OSError:
            return None
        if not struct.unpack_from("=Q", info)[0] & _WANT_EXIT:
            return None
        return int(struct.unpack_from("=i", info, _EXIT_CODE_AT)[0])

    def _zombie_status(self) -> int | None:
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return int(fields[-1]) if fields[0] == b"Z" else None


def start_gated(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherited: Collection[int],
    prepare: Callable[[], None],
) -> tuple[Process, int]:
    """Start a program that does not run yet: it does when a byte is written to the gate, the second value.

    If the gate is closed without one, by the death of this process too, the program never runs.

    Args:
        command: program and arguments.
        environment: of the program.
        inherited: descriptors that it gets, besides standard error. Standard input and output are /dev/null.
        prepare: called in the new process.

    Raises OSError.
    """
    gate, opener = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(gate)
        os.close(opener)
        raise
    if pid == 0:
        os.close(opener)
        _become(command, environment, inherited, prepare, gate)
    os.close(gate)
    try:
        return Process.of_child(pid), opener
    except OSError:
        os.close(opener)
        raise


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherited: Collection[int],
    prepare: Callable[[], None],
    gate: int,
) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        # Away from the terminal: the signals that it sends are for the supervisor.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        for fd in inherited:
            os.set_inheritable(fd, True)
        prepare()
        if os.read(gate, 1):
            os.execve(command[0], list(command), environment)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_EXECUTED)


def in_words(status: int | None) -> str:
    """What :meth:`Process.reap` returned."""
    if status is None:
        return "unknown"
    return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
