"""Which devices the kernel reads by itself, and who looks after them.

The kernel reads the data file of a mounted device without looking at the presence map. So only the process that
answers for the mount may change what the kernel could read: it *pins* the device, and for everybody else a
pinned device is read-only, until the pin is gone.

    devices/<key>/mounted    JSON: boot id and process of the owner, who holds an exclusive flock(2) on it

The file outlives its owner, as the mount does. It is *stale* once nothing can come of it any more:

- the machine has booted since, or
- its owner is dead, no process has the device open (nobody holds the device's ``lock``), and nothing at all has
  the data file open, which the kernel does as long as it is mounted: a write lease on it can be had.

Whoever comes across a stale pin removes it. When in doubt, a pin is live: the cache is of less use then, but
right. Nothing here reads or writes the data file: that would raise events which wait for the owner.

Pins change under a lock on the device's directory; whoever takes one holds the lock of the presence map too, so
that a change of the device that began before the pin has ended.
"""

import fcntl
import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from veneer.errors import CacheError
from veneer.store import presence

__all__ = ["Pin", "is_in_use", "is_pinned", "is_pinned_for_good", "pin_at"]

_log = logging.getLogger(__name__)

_NAME, _NEW = "mounted", "mounted.new"
#: More than a pin holds; bounds what is read of a file that is none.
_MOST_BYTES = 4096


class Pin:
    """A pin that this process holds."""

    def __init__(self, directory: Path, fd: int) -> None:
        self._directory = directory
        self._fd = fd

    @classmethod
    def take(cls, directory: Path) -> Self:
        """Pin the device, also in place of an owner that died. The caller holds the lock of its map.

        Raises:
            CacheError: a live process has it pinned already.
            OSError: the file cannot be written.
        """
        with _changing(directory):
            if (owner := _owner(directory)) is not None and _is_held(directory):
                raise CacheError(
                    f"the device {directory.name} is mounted by another process already (pid {owner.pid})",
                    hint="give each daemon a cache directory of its own",
                )
            fd = os.open(directory / _NEW, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.write(fd, _file_of(_Owner(presence.boot_id().hex(), os.getpid())))
                (directory / _NEW).rename(directory / _NAME)
            except BaseException:
                os.close(fd)
                raise
        return cls(directory, fd)

    def release(self) -> None:
        """Remove the pin: the superblock is gone."""
        # Somebody may have deleted the cache under the mount, and the pin with it.
        with suppress(FileNotFoundError), _changing(self._directory):
            (self._directory / _NAME).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Forget the pin and leave its file: the mount goes on, and waits for its next owner."""
        os.close(self._fd)


def pin_at(directory: Path) -> str:
    """Where the pin of a device is, if it has one: for :func:`os.access`, asked before every write."""
    return os.fspath(directory / _NAME)


def is_pinned(directory: Path) -> bool:
    """Whether there is a pin. To act upon it, hold the lock of the device's map and have the device open."""
    return os.access(pin_at(directory), os.F_OK)


def is_pinned_for_good(directory: Path) -> bool:
    """Whether there is a pin that is not stale; a stale one is removed."""
    if not is_pinned(directory):
        return False
    try:
        with _changing(directory):
            return is_pinned(directory) and not _remove_stale(directory)
    except FileNotFoundError:
        return False


def is_in_use(directory: Path) -> bool:
    """Whether some process, this one included, has the device open."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@dataclass(frozen=True, slots=True)
class _Owner:
    boot: str
    pid: int


def _file_of(owner: _Owner) -> bytes:
    return json.dumps(asdict(owner)).encode("ascii") + b"\n"


def _owner(directory: Path) -> _Owner | None:
    """The owner by the file of this directory, dead or alive; an illegible one is of an unknown boot."""
    try:
        with (directory / _NAME).open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return _Owner("", 0)
    boot, pid = said.get("boot"), said.get("pid")
    return _Owner(boot if isinstance(boot, str) else "", pid if isinstance(pid, int) else 0)


def _is_held(directory: Path) -> bool:
    """Whether the owner lives."""
    fd = os.open(directory / _NAME, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_stale(directory: Path) -> bool:
    owner = _owner(directory)
    if owner is None:
        return True
    # In this order: a lease is in the way of whoever is about to open the file.
    other_boot = bool(owner.boot) and owner.boot != presence.boot_id().hex()
    if not other_boot and (_is_held(directory) or is_in_use(directory) or _is_opened_by_anyone(directory)):
        return False
    (directory / _NAME).unlink(missing_ok=True)
    _log.info("the device %s is not mounted any more", directory.name)
    return True


def _is_opened_by_anyone(directory: Path) -> bool:
    """Whether anything, the kernel included, has the data file open; so if that cannot be found out."""
    try:
        fd = os.open(directory / "data", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Whoever opens the file while the lease is held waits for its end, and we are told by a signal: not by
        # SIGIO, which would end the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        _log.debug("%s: no lease: %s", directory, error)
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def _changing(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
