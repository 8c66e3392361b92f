"""Notice when a file system is gone: unmounted everywhere, and left by the last one who used it.

A lazily detached mount lives on while somebody has a file open on it. The kernel tells the end of a superblock
to whoever watches one of its inodes (inotify's IN_UNMOUNT), and the watch itself keeps nothing alive.
"""

import ctypes
import errno
import logging
import os
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import trio

from veneer.errors import MountError

__all__ = ["Superblocks", "listed_superblocks", "vanished"]

log = logging.getLogger(__name__)

_CLOEXEC, _NONBLOCK = 0o2000000, 0o4000
#: Something has to be asked for; what is told about unmounts is told in any case.
_DELETE_SELF = 0x400
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
#: struct inotify_event: watch, mask, cookie, length of the name.
_EVENT = struct.Struct("=iIII")
_READ = 64 << 10

#: The kernel's list of EROFS superblocks.
_LIST = Path("/sys/fs/erofs")
#: How often a file system that is reachable from nowhere, and so cannot be watched, is looked for there.
_POLL_S = 2.0

_MANY = "end what watches many files, or raise /proc/sys/fs/inotify/max_user_instances"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


class Superblocks:
    """Watches any number of file systems. Belongs to one event loop; :meth:`watch` may be called in any thread.

    Raises MountError when it is made: the limit of inotify instances is reached.
    """

    def __init__(self) -> None:
        self._inotify = int(_libc.inotify_init1(_CLOEXEC | _NONBLOCK))
        if self._inotify < 0:
            error = _error()
            raise MountError(
                f"cannot watch for the ends of mounts: inotify_init1(2): {error.strerror}",
                hint=_MANY if error.errno == errno.EMFILE else None,
            ) from error
        self._watches: dict[int, trio.Event] = {}
        self._changing = threading.Lock()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Set events until cancelled, and close then."""
        try:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._inotify)
                self.take_news()
        finally:
            self.close()

    def take_news(self) -> None:
        """Set the events of what is gone by now."""
        try:
            data = os.read(self._inotify, _READ)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, mask, _, name = _EVENT.unpack_from(data, at)
            at += _EVENT.size + name
            if mask & _OVERFLOW:
                self._look()
            elif mask & (_UNMOUNT | _IGNORED):
                self._set(watch)

    def watch(self, root: Path | int) -> trio.Event:
        """An event for the end of the file system whose root is ``root``: a path, or a descriptor of a mount.

        Raises OSError.
        """
        path = f"/proc/self/fd/{root}/." if isinstance(root, int) else os.fspath(root)
        # Held while adding, so that the end cannot be told before there is something to set.
        with self._changing:
            watch = int(_libc.inotify_add_watch(self._inotify, os.fsencode(path), _DELETE_SELF))
            if watch < 0:
                raise _error()
            return self._watches.setdefault(watch, trio.Event())

    def close(self) -> None:
        """Watch nothing any more; no event is set after this."""
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def _set(self, watch: int) -> None:
        with self._changing:
            event = self._watches.pop(watch, None)
        if event is not None:
            event.set()

    def _look(self) -> None:
        """Something that was told got lost: where the kernel has no watch any more, the file system is gone."""
        log.warning("notices of unmounts got lost; looking at all of them")
        with self._changing:
            text = Path(f"/proc/self/fdinfo/{self._inotify}").read_text()
            there = {int(watch, 16) for watch in re.findall(r"^inotify wd:([0-9a-f]+)", text, re.MULTILINE)}
            gone = [self._watches.pop(watch) for watch in list(self._watches) if watch not in there]
        for event in gone:
            event.set()


def listed_superblocks() -> set[str]:
    """What the kernel calls the EROFS file systems that there are."""
    try:
        return set(os.listdir(_LIST))
    except FileNotFoundError:
        return set()


async def vanished(names: Sequence[str]) -> None:
    """Wait until the kernel lists none of these any more; for ever if there are none."""
    if not names:
        await trio.sleep_forever()  # nobody can tell, so it is there
    while listed_superblocks().intersection(names):  # noqa: ASYNC110 - sysfs tells nobody of changes
        await trio.sleep(_POLL_S)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
