"""Which devices the kernel reads by itself, and who looks after them.

The kernel reads the data file of a mounted device without looking at the presence map. There are two ways to
keep it from reading what is not there:

- The process that answers for the mount *pins* the device: it alone may change what the kernel could read, and
  for everybody else the device is read-only. There is one owner at a time.
- A mount that nobody answers for *freezes* the device, which has to be complete: nobody takes anything away,
  an owner neither. Any number of mounts may do so.

    devices/<key>/mounted    JSON: boot id and process of the owner, who holds an exclusive flock(2) on it
    devices/<key>/frozen/*   the same of each process with such a mount

The files outlive their processes, as the mounts do. One is *stale* once nothing can come of it any more:

- the machine has booted since, or
- its owner is dead, no process has the device open (nobody holds the device's ``lock``), and nothing at all has
  the data file open, which the kernel does as long as it is mounted: a write lease on it can be had.

Whoever comes across a stale one removes it. When in doubt, it is live: the cache is of less use then, but
right. Nothing here reads or writes the data file: that would raise events which wait for the owner.

The files change under a lock on the device's directory; whoever makes one holds the lock of the presence map
too, so that a change of the device that began before has ended.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from veneer.errors import CacheError
from veneer.store import presence

__all__ = [
    "Freeze",
    "Pin",
    "frozen_at",
    "is_answered_for",
    "is_in_use",
    "is_pinned",
    "is_pinned_for_good",
    "pin_at",
]

_log = logging.getLogger(__name__)

_NAME, _NEW, _FROZEN = "mounted", "mounted.new", "frozen"
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
            path = directory / _NAME
            if (owner := _owner(path)) is not None and _is_held(path):
                raise CacheError(
                    f"the device {directory.name} is mounted by another process already (pid {owner.pid})",
                    hint="give each daemon a cache directory of its own",
                )
            fd = os.open(directory / _NEW, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.write(fd, _file_of_this_process())
                (directory / _NEW).rename(path)
            except BaseException:
                os.close(fd)
                raise
        return cls(directory, fd)

    def release(self) -> None:
        """Remove the pin: the superblock is gone."""
        try:
            with _changing(self._directory):
                (self._directory / _NAME).unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # Somebody has deleted the cache under the mount, and the pin with it.
        except OSError as error:
            # Stale from now on: whoever comes across it removes it.
            _log.warning("the pin of the device %s stays: %s", self._directory.name, error.strerror)
        finally:
            self.close()

    def close(self) -> None:
        """Forget the pin and leave its file: the mount goes on, and waits for its next owner."""
        os.close(self._fd)


class Freeze:
    """That a complete device stays as it is, because this process has mounted it or is about to.

    Args:
        path: the file that says so.
        fd: of that file.
        data_fd: the device's data file; belongs to whoever has the device open.
    """

    def __init__(self, path: Path, fd: int, data_fd: int) -> None:
        self._path = path
        self._fd = fd
        self._data_fd = data_fd

    @classmethod
    def take(cls, directory: Path, data_fd: int) -> Self:
        """Freeze a device that is complete. The caller holds the lock of its map. Raises OSError."""
        with _changing(directory):
            path = directory / _FROZEN / f"{os.getpid()}-{secrets.token_hex(4)}"
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.write(fd, _file_of_this_process())
            except BaseException:
                os.close(fd)
                path.unlink()
                raise
        return cls(path, fd, data_fd)

    @property
    def data(self) -> Path:
        """The data file, for the kernel to open while this process has the device open."""
        return Path(f"/proc/self/fd/{self._data_fd}")

    def release(self) -> None:
        """Let the device change again: it is not mounted, or not any more."""
        try:
            with _changing(self._path.parents[1]):
                self._path.unlink(missing_ok=True)
                _remove_if_empty(self._path.parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("the device %s stays frozen: %s", self._path.parents[1].name, error.strerror)
        finally:
            self.close()

    def close(self) -> None:
        """Forget about it and leave its file: the mount may go on."""
        os.close(self._fd)


def pin_at(directory: Path) -> str:
    """Where the pin of a device is, if it has one: for :func:`os.access`, asked before every write."""
    return os.fspath(directory / _NAME)


def frozen_at(directory: Path) -> str:
    """What is there if a device is frozen: likewise."""
    return os.fspath(directory / _FROZEN)


def is_pinned(directory: Path) -> bool:
    """Whether the device is pinned or frozen.

    To act upon it, hold the lock of the device's map and have the device open.
    """
    return os.access(pin_at(directory), os.F_OK) or os.access(frozen_at(directory), os.F_OK)


def is_pinned_for_good(directory: Path) -> bool:
    """Whether the device is pinned or frozen and that is not stale; what is stale is removed."""
    if not is_pinned(directory):
        return False
    try:
        with _changing(directory):
            _remove_stale(directory)
            return is_pinned(directory)
    except FileNotFoundError:
        return False


def is_answered_for(directory: Path) -> bool:
    """Whether the process that pinned a device lives. Raises OSError."""
    try:
        return _is_held(directory / _NAME)
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


def _file_of_this_process() -> bytes:
    owner = _Owner(presence.boot_id().hex(), os.getpid())
    return json.dumps(asdict(owner)).encode("ascii") + b"\n"


def _owner(path: Path) -> _Owner | None:
    """Who made a file, dead or alive; an illegible one is of an unknown boot."""
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return _Owner("", 0)
    boot, pid = said.get("boot"), said.get("pid")
    return _Owner(boot if isinstance(boot, str) else "", pid if isinstance(pid, int) else 0)


def _is_held(path: Path) -> bool:
    """Whether the process that made a file lives."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Shared, or who asks at the same time would be taken for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_stale(directory: Path) -> None:
    frozen = directory / _FROZEN
    with suppress(FileNotFoundError):
        for path in frozen.iterdir():
            _remove_if_stale(directory, path)
        _remove_if_empty(frozen)
    _remove_if_stale(directory, directory / _NAME)


def _remove_if_stale(directory: Path, path: Path) -> None:
    owner = _owner(path)
    if owner is None:
        return
    # In this order: a lease is in the way of whoever is about to open the file.
    other_boot = bool(owner.boot) and owner.boot != presence.boot_id().hex()
    if not other_boot and (_is_held(path) or is_in_use(directory) or _is_opened_by_anyone(directory)):
        return
    path.unlink(missing_ok=True)
    _log.info("the device %s is not mounted any more by process %d", directory.name, owner.pid)


def _remove_if_empty(frozen: Path) -> None:
    try:
        frozen.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


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
