"""The device cache of one user on one machine: a directory of devices, within a quota, shared by all processes.

Invariant: the bytes on disk never exceed the quota (a process that is writing while another one counts may
exceed it by what it has in hand: a few MiB). A disk that is full or broken costs the cache, not the reader:
writing then fails softly, once with a warning, and is tried again after a pause.

Layout: ``devices/<key>/`` (:mod:`veneer.store.devicefile`), ``devices/.ledger`` (bytes in all),
``devices/.collect`` (lock of whoever evicts), ``devices/.trash-*`` (devices being deleted).
"""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import CacheError
from veneer.index.model import Device
from veneer.store.devicefile import DeviceFile, Fill, Verified, is_at
from veneer.store.ledger import Ledger
from veneer.store.presence import Form, Layout, MapMismatch, present_bytes
from veneer.store.stats import StoreStats

__all__ = ["DeviceCache"]

_log = logging.getLogger(__name__)

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
#: After a write failed, none is tried for so long: a full disk must not cost an eviction a span.
_PAUSE_S = 10.0
#: An eviction makes this part of the quota free, so that the next one is not due at once.
_HEADROOM = 1 / 16
#: On a full disk, this part of what the cache holds is given up.
_FULL_DISK_SHARE = 1 / 8
#: Spans evicted under one hold of a device's lock: about a millisecond.
_EVICT_BATCH = 128


class DeviceCache:
    """An open cache directory. Methods may be called from any thread; none of them waits for a network.

    Args:
        directory: where the devices are; made if needed.
        quota: bytes that all devices together may hold on disk.
        stats: where evictions and the like are counted.

    Raises:
        CacheError: the directory cannot be used at all. A full disk alone does not raise.
    """

    def __init__(self, directory: Path, quota: int, stats: StoreStats | None = None) -> None:
        self.directory = directory / "devices"
        self.quota = quota
        self.stats = stats or StoreStats()
        self._open: dict[Path, DeviceFile] = {}
        self._mutex = threading.Lock()
        self._paused_until = 0.0
        self._warned = False
        self._ledger: Ledger | None = None
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ledger = Ledger(self.directory / ".ledger")
            self._ledger.reset(self.count())
            (self.directory / ".collect").touch(mode=0o600)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise CacheError(
                    f"the cache directory {directory} cannot be used: {error.strerror}",
                    hint="give another one with VENEER_CACHE_DIR, or mend its owner and permissions",
                ) from error
            self._pause("the cache cannot be set up", error)

    def open(self, device: Device, form: Form) -> DeviceFile | None:
        """Open or make a device. None when the disk does not let us: it is then served from memory."""
        path = self.directory / device.key.hex
        layout = Layout.of(device, form)
        for last in (False, True):
            try:
                file = DeviceFile.open(path, layout)
            except OSError as error:
                if last or error.errno not in _NO_SPACE or not self._shrink(0):
                    self._pause(f"no cache for the device {device.key}", error)
                    return None
            else:
                self._open[path] = file
                return file
        return None

    def has_room(self, length: int) -> bool:
        """Whether so many bytes can be written without evicting first."""
        return self._ledger is not None and self._ledger.total + length <= self.quota

    def put(self, file: DeviceFile, fills: Sequence[Fill]) -> bool:
        """Write verified spans of a device; False when they are not on disk afterwards. May evict."""
        length = sum(len(fill.data) for fill in fills)
        if (
            self._ledger is None
            or file.abandoned
            or length > self.quota
            or time.monotonic() < self._paused_until
        ):
            return False
        for last in (False, True):
            try:
                if not self._reserve(self._ledger, length):
                    return False
                gained = 0
                try:
                    gained = file.write(fills)
                finally:
                    self._ledger.release(length - gained)
            except OSError as error:
                if last or error.errno not in _NO_SPACE or not self._shrink(length):
                    self._pause("cannot write to the cache", error)
                    return False
            else:
                self._warned = False
                return not file.abandoned
        return False

    def verify(self, file: DeviceFile, numbers: Iterable[int]) -> Verified:
        """Hash spans on disk; damaged ones are dropped. Raises OSError."""
        verified = file.verify(numbers)
        self._release(verified.freed)
        return verified

    def evict(self, file: DeviceFile, numbers: Iterable[int]) -> None:
        """Take spans of a device off the disk. Raises OSError."""
        self._release(file.evict(numbers))

    def collect(self, target: int) -> int:
        """Evict least recently used spans until all devices hold at most ``target`` bytes. Returns bytes freed.

        Devices without a span, and what a crash left behind, are removed unless they are in use.
        """
        with self._mutex, self._exclusive():
            self._sweep()
            total = self.count()
            if self._ledger is not None:
                self._ledger.reset(total)
            freed = self._evict_oldest(total - target) if total > target else 0
            self._remove_empty()
        return freed

    def count(self) -> int:
        """Bytes that the devices hold, by their own account."""
        total = 0
        for path in self.paths():
            with suppress(OSError, MapMismatch):
                total += present_bytes(path / "map")
        return total

    def paths(self) -> list[Path]:
        """The directories of all devices."""
        with suppress(FileNotFoundError):
            return sorted(path for path in self.directory.iterdir() if not path.name.startswith("."))
        return []

    @contextmanager
    def visit(self, path: Path) -> Iterator[DeviceFile]:
        """A device of this cache, whether it is open here or not. Raises OSError or MapMismatch."""
        if file := self._open.get(path):
            yield file
            return
        file = DeviceFile.visit(path)
        try:
            yield file
        finally:
            file.close()

    def remove(self, path: Path) -> bool:
        """Delete a device that no process has open; False when one has."""
        if path in self._open:
            return False
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not is_at(lock, path / "lock"):
                # Somebody else removed it just now, and the name may be a new device's already.
                return False
            freed = 0
            with suppress(OSError, MapMismatch):
                freed = present_bytes(path / "map")
            # Whoever was about to open it holds the old lock file then, notices, and makes a new device.
            trash = self.directory / f".trash-{path.name}-{secrets.token_hex(4)}"
            path.rename(trash)
            self._release(freed)
        finally:
            os.close(lock)
        shutil.rmtree(trash)
        return True

    def close(self) -> None:
        """Close every device."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _release(self, length: int) -> None:
        if self._ledger is not None:
            self._ledger.release(length)

    def _reserve(self, ledger: Ledger, length: int) -> bool:
        if ledger.reserve(length, self.quota):
            return True
        self.collect(max(0, int(self.quota * (1 - _HEADROOM)) - length))
        return ledger.reserve(length, self.quota)

    def _shrink(self, length: int) -> bool:
        """Give up a share of the cache on a full disk; whether that freed anything."""
        try:
            held = self.count()
            return self.collect(held - max(2 * length, int(held * _FULL_DISK_SHARE))) > 0
        except OSError as error:
            _log.debug("nothing can be evicted: %s", error)
            return False

    def _pause(self, what: str, error: OSError) -> None:
        self._paused_until = time.monotonic() + _PAUSE_S
        if not self._warned:
            self._warned = True
            _log.warning("%s: %s; reads go on without it", what, error.strerror)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process evicts at a time: two would both give up what is oldest, and twice as much."""
        fd = os.open(self.directory / ".collect", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _evict_oldest(self, excess: int) -> int:
        rows: list[tuple[int, int, int, int]] = []
        paths = self.paths()
        for which, path in enumerate(paths):
            try:
                with self.visit(path) as file:
                    rows.extend((used, which, number, length) for number, used, length in file.held())
            except MapMismatch:
                self.remove(path)
            except OSError as error:
                _log.warning("cannot look into %s: %s", path, error)
        rows.sort()
        victims: defaultdict[int, list[int]] = defaultdict(list)
        planned = 0
        for _, which, number, length in rows:
            if planned >= excess:
                break
            victims[which].append(number)
            planned += length
        freed = 0
        for which, numbers in victims.items():
            with suppress(FileNotFoundError, MapMismatch), self.visit(paths[which]) as file:
                for first in range(0, len(numbers), _EVICT_BATCH):
                    batch = numbers[first : first + _EVICT_BATCH]
                    gone = file.evict(batch)
                    self._release(gone)
                    self.stats.evicted += len(batch)
                    freed += gone
        return freed

    def _remove_empty(self) -> None:
        for path in self.paths():
            with suppress(OSError):
                try:
                    empty = present_bytes(path / "map") == 0
                except (MapMismatch, FileNotFoundError):
                    empty = True
                if empty:
                    self.remove(path)

    def _sweep(self) -> None:
        """Delete what a process that died left half deleted."""
        for path in self.directory.glob(".trash-*"):
            shutil.rmtree(path, ignore_errors=True)
