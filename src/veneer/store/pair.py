"""Map and data file of a device, as they lie in its directory: opened together, or made anew.

Invariant: a map is used only with the data file it names, and only if it is whole. One that does not match is
discarded. Its data file goes with it, unless the device is mounted: then the kernel reads that very file, so it
stays, and an empty map is put beside it.

Not here: the device in use (:mod:`veneer.store.devicefile`).
"""

import fcntl
import logging
import os
from contextlib import ExitStack
from pathlib import Path

from veneer.store.pin import is_pinned
from veneer.store.presence import MAGIC, Layout, MapMismatch, PresenceMap

__all__ = ["checked", "is_at", "open_pair"]

_log = logging.getLogger(__name__)


def is_at(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the open file ``fd``."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def checked(map_fd: int, data_fd: int, layout: Layout | None) -> PresenceMap:
    """The map of ``map_fd``, whose lock the caller holds. Raises MapMismatch and leaves both files open."""
    presence = PresenceMap(map_fd)
    try:
        presence.check(os.fstat(data_fd), layout)
        presence.begin_boot()
    except BaseException:
        presence.release()
        raise
    return presence


def open_pair(directory: Path, layout: Layout) -> tuple[PresenceMap, int] | None:
    """Open map and data file, or make new ones. None: somebody else replaced them meanwhile, try again."""
    old = os.open(directory / "map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    kept = False
    try:
        fcntl.flock(old, fcntl.LOCK_EX)
        if not is_at(old, directory / "map"):
            return None
        if os.fstat(old).st_size:
            try:
                data = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
                try:
                    presence = checked(old, data, layout)
                except BaseException:
                    os.close(data)
                    raise
                fcntl.flock(old, fcntl.LOCK_UN)
                kept = True
                return presence, data
            except (MapMismatch, FileNotFoundError) as error:
                _log.warning("discarding the cached device %s: %s", directory.name, error)
                # Or it would match again if we die when its data file has been replaced, and the next one that
                # is made is given the number of the old one.
                os.pwrite(old, bytes(len(MAGIC)), 0)
        return _create_pair(directory, layout)
    finally:
        if not kept:
            os.close(old)


def _create_pair(directory: Path, layout: Layout) -> tuple[PresenceMap, int]:
    """Replace map and data file by empty ones. The caller holds the lock of the map that was there."""
    made = False
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with ExitStack() as undo:
        if (data := _mounted_data(directory, layout)) is not None:
            undo.callback(os.close, data)
        else:
            data = os.open(directory / "data.new", flags, 0o600)
            undo.callback((directory / "data.new").unlink, missing_ok=True)
            undo.callback(os.close, data)
            os.ftruncate(data, layout.size)
            made = True
        fd = os.open(directory / "map.new", flags, 0o600)
        undo.callback((directory / "map.new").unlink, missing_ok=True)
        undo.callback(os.close, fd)
        PresenceMap.write_new(fd, layout, os.fstat(data))
        presence = checked(fd, data, layout)
        undo.callback(presence.release)
        # Dying between the two leaves a map that speaks of another data file: discarded when opened next.
        if made:
            (directory / "data.new").rename(directory / "data")
        (directory / "map.new").rename(directory / "map")
        undo.pop_all()
    return presence, data


def _mounted_data(directory: Path, layout: Layout) -> int | None:
    """The data file that the kernel reads, if the device is mounted."""
    if not is_pinned(directory):
        return None
    try:
        data = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(data).st_size == layout.size:
        return data
    os.close(data)
    return None
