"""fanotify pre-content events: the kernel asks before it reads a marked file, and waits for the answer.

Standard library only and no other module of ours: the process that keeps the group alive imports this.

What this relies on (fanotify_init(2), fanotify_mark(2), and tried on Linux 6.18):

- An event comes with a descriptor of the file, number N of the process that read it from the group. It is
  answered by writing N to the group, from any process that has it. Reading through that descriptor, or one that
  was opened before the file was marked, asks nobody. Whether an open file asks is settled when it is opened;
  the mark may go and come back afterwards.
- An event that cannot have a descriptor (the limit is reached) is denied by the kernel when it is read.
- The last descriptor of a group that closes lets every reader through: to holes, which read as zeros. That is
  why two processes have the group. A flag that makes the kernel deny instead (FAN_RESTARTABLE_EVENTS) has been
  proposed and has no number yet, so it is not asked for here.

Nothing here waits: the group is non-blocking.
"""

import contextlib
import ctypes
import errno
import os
import resource
import struct
from typing import Final, NamedTuple

__all__ = [
    "MAX_DESCRIPTORS",
    "Event",
    "answer",
    "mark",
    "open_group",
    "raise_descriptor_limit",
    "read_events",
    "sweep",
    "unmark",
]

#: As many descriptors as a process that reads events should have: numbers up to this have to be swept after its
#: death, which takes about 0.1 s.
MAX_DESCRIPTORS: Final = 1 << 16

_CLOEXEC, _NONBLOCK, _CLASS_PRE_CONTENT = 0x1, 0x2, 0x8
_UNLIMITED_QUEUE, _UNLIMITED_MARKS, _REPORT_TID, _REPORT_FD_ERROR = 0x10, 0x20, 0x100, 0x2000
_MARK_ADD, _MARK_REMOVE = 0x1, 0x2
_PRE_ACCESS = 0x0010_0000
_ALLOW, _DENY, _ERROR_SHIFT = 1, 2, 24
#: Errors that may be the answer; any other one makes the write fail and leaves the event pending.
_ERRORS = frozenset(
    {errno.EPERM, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETXTBSY, errno.ENOSPC, errno.EDQUOT}
)

#: struct fanotify_event_metadata: length, version, reserved, metadata length, mask, fd, pid.
_EVENT = struct.Struct("=IBBHQii")
_VERSION = 3
#: struct fanotify_event_info_header: type, pad, length.
_INFO = struct.Struct("=BBH")
#: What follows the header in struct fanotify_event_info_range: pad, offset, count.
_RANGE = struct.Struct("=IQQ")
_INFO_RANGE = 6
_RESPONSE = struct.Struct("=iI")
#: Bytes of an event with its range.
_EVENT_SIZE = _EVENT.size + _INFO.size + _RANGE.size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


class Event(NamedTuple):
    """One read that waits for an answer.

    Args:
        fd: of the file; raises no events. Negative: -errno of why there is none; the kernel has denied it.
        pid: the thread that reads.
        offset: of the range that it is about to read, rounded outward to pages.
        length: of that range, which may go beyond the end of the file; 0 for the whole file.
    """

    fd: int
    pid: int
    offset: int
    length: int


def open_group() -> int:
    """A group for pre-content events, without a mark. Raises OSError.

    EINVAL: the kernel has none (before Linux 6.14). EPERM: it takes CAP_SYS_ADMIN in the first user namespace.
    """
    flags = _CLASS_PRE_CONTENT | _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE | _UNLIMITED_MARKS | _REPORT_TID
    event_flags = os.O_RDWR | getattr(os, "O_LARGEFILE", 0) | os.O_CLOEXEC
    group = int(_libc.fanotify_init(flags | _REPORT_FD_ERROR, event_flags))
    if group < 0 and ctypes.get_errno() == errno.EINVAL:
        group = int(_libc.fanotify_init(flags, event_flags))
    if group < 0:
        raise _error()
    return group


def mark(group: int, fd: int) -> None:
    """Have reads of the file ``fd`` ask, by everybody who opens it from now on; harmless when it is marked.

    Raises OSError. EOPNOTSUPP: not on this file system.
    """
    if _libc.fanotify_mark(group, _MARK_ADD, _PRE_ACCESS, fd, None) != 0:
        raise _error()


def unmark(group: int, fd: int) -> None:
    """Have reads of the file ask no more; harmless when it is not marked. Raises OSError.

    Events in the queue stay there.
    """
    if _libc.fanotify_mark(group, _MARK_REMOVE, _PRE_ACCESS, fd, None) != 0:
        error = _error()
        if error.errno != errno.ENOENT:
            raise error


def read_events(group: int, most: int = 64) -> list[Event]:
    """Up to ``most`` events; none when no reader waits. Each takes a descriptor until it is closed.

    Raises OSError.
    """
    try:
        data = os.read(group, most * _EVENT_SIZE)
    except BlockingIOError:
        return []
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            # How a group that does not report errors of descriptors says that it has just denied an event.
            return [Event(-error.errno, 0, 0, 0)]
        raise
    events = []
    at = 0
    while at < len(data):
        length, version, _, metadata, _, fd, pid = _EVENT.unpack_from(data, at)
        if version != _VERSION or length < metadata:
            raise OSError(errno.EPROTO, f"fanotify events of version {version}")
        events.append(Event(fd, pid, *_range(data, at + metadata, at + length)))
        at += length
    return events


def answer(group: int, fd: int, error: int = 0) -> None:
    """Let the read of event ``fd`` go on, or fail with ``error``; to be done before ``fd`` is closed.

    Errors that the kernel does not take for an answer become EIO. Nothing happens when it was answered already.
    """
    response = _deny(error if error in _ERRORS else errno.EIO) if error else _ALLOW
    if _respond(group, fd, response) == errno.EINVAL:
        # Before Linux 6.14 no error can be named.
        _respond(group, fd, _DENY)


def sweep(group: int, most: int) -> int:
    """Fail every event with a number below ``most`` with EIO; for when the process that read them has died.

    The kernel asks again for the pages that these readers were about to read. To be done before anybody reads
    another event from the group: numbers are given out anew. Returns how many events there were.
    """
    response = _deny(errno.EIO)
    swept = 0
    for fd in range(most):
        result = _respond(group, fd, response)
        if result == errno.EINVAL:
            result = _respond(group, fd, _DENY)
        swept += result == 0
    return swept


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as it goes, to at most :data:`MAX_DESCRIPTORS`, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft


def _range(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Offset and length that the records of one event say; (0, 0) without a range."""
    while at + _INFO.size <= end:
        kind, _, length = _INFO.unpack_from(data, at)
        if not _INFO.size <= length <= end - at:
            break
        if kind == _INFO_RANGE and length >= _INFO.size + _RANGE.size:
            _, offset, count = _RANGE.unpack_from(data, at + _INFO.size)
            return offset, count
        at += length
    return 0, 0


def _deny(error: int) -> int:
    return _DENY | error << _ERROR_SHIFT


def _respond(group: int, fd: int, response: int) -> int:
    """0, or the errno of an answer that the kernel did not take."""
    try:
        os.write(group, _RESPONSE.pack(fd, response))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        return error.errno
    return 0


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
