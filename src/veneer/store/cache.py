"""The device cache of one user on one machine: a directory of devices, within a quota, shared by all processes.

Invariant: the bytes on disk never exceed the quota (a process that is writing while another one counts may
exceed it by what it has in hand: a few MiB). A disk that is full or broken costs the cache, not the reader:
writing then fails softly, once with a warning, and is tried again after a pause.

Devices that the kernel has mounted are the exception, because it reads them from the disk and nowhere else.
When nothing can be evicted for them they exceed the quota, and a warning says so; when the disk is full their
readers get the error, and they are written again as soon as there is room.

Layout: ``devices/<key>/`` (:mod:`veneer.store.devicefile`), ``devices/.ledger`` (bytes in all),
``devices/.collect`` (lock of whoever evicts), ``devices/.trash-*`` (devices being deleted),
``devices/.arriving-*`` (devices that are not whole yet: :mod:`veneer.store.intake`).

Not here: which spans go (:mod:`veneer.store.eviction`), and which ones of a mounted device may
(:mod:`veneer.store.owned`).

Longer than other modules here: what is on the disk, and what may be, is decided in one place.
"""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import CacheError
from veneer.index.model import Device
from veneer.store.devicefile import DeviceFile, Evicted, Fill, Verified
from veneer.store.eviction import evict_oldest
from veneer.store.intake import Intake, arriving_bytes, sweep_arriving
from veneer.store.kept import kept_bytes, kept_items, remove_stray_indexes
from veneer.store.ledger import Ledger
from veneer.store.owned import BeforePunch, IdleRule
from veneer.store.pair import is_at
from veneer.store.pin import is_in_use, is_pinned, is_pinned_for_good
from veneer.store.presence import PRESENT, Form, Layout, MapMismatch, present_bytes
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
#: After an eviction that did not free what was wanted, the next one waits for this part of the time after which
#: spans of mounted devices count as idle: looking at all spans again for every write would find the same.
_FUTILE_SHARE = 1 / 12


class DeviceCache:
    """An open cache directory. Methods may be called from any thread; none of them waits for a network.

    Args:
        directory: where the devices are; made if needed.
        quota: bytes that all devices together may hold on disk.
        stats: where evictions and the like are counted.
        rule: when a span of a mounted device is idle.

    Raises:
        CacheError: the directory cannot be used at all. A full disk alone does not raise.
    """

    def __init__(
        self,
        directory: Path,
        quota: int,
        stats: StoreStats | None = None,
        *,
        rule: IdleRule | None = None,
    ) -> None:
        self.directory = directory / "devices"
        self._root = directory
        self.quota = quota
        self.stats = stats or StoreStats()
        #: Called, in any thread, when nothing can be evicted that would be enough; must be quick.
        self.on_futility: Callable[[], None] = _nothing
        #: Why the disk did not take what was written last; None once it does.
        self.refusal: OSError | None = None
        self._rule = rule or IdleRule()
        self._futile_until = 0
        self._warned_of_quota = False
        self._open: dict[Path, DeviceFile] = {}
        self._mutex = threading.Lock()
        self._paused_until = 0.0
        self._warned = False
        self._ledger: Ledger | None = None
        try:
            self._set_up()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise CacheError(
                    f"the cache directory {directory} cannot be used: {error.strerror}",
                    hint="give another one with VENEER_CACHE_DIR, or mend its owner and permissions",
                ) from error
            self._pause("the cache cannot be set up", error)

    def _set_up(self) -> Ledger:
        with self._mutex:
            if self._ledger is None:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                sweep_arriving(self.directory)
                ledger = Ledger(self.directory / ".ledger")
                try:
                    ledger.reset(self.count())
                    (self.directory / ".collect").touch(mode=0o600)
                except OSError:
                    ledger.close()
                    raise
                self._ledger = ledger
            return self._ledger

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

    def is_at_hand(self, device: Device) -> bool:
        """Whether the disk has all of a device in plain form, trusted or not; or the kernel reads it now."""
        path = self.directory / device.key.hex
        try:
            return present_bytes(path / "map") == device.spans.size or is_pinned(path)
        except (OSError, MapMismatch):
            return False

    def intake(self, what: str) -> Intake:
        """Begin to take in a device; ``what`` names it in errors. Raises CacheError."""
        try:
            self._set_up()
        except OSError as error:
            raise CacheError(
                f"{what} cannot be kept in {self.directory}: {error.strerror}",
                hint="make room on the disk of the cache, or choose another with VENEER_CACHE_DIR",
                errno=error.errno or errno.EIO,
            ) from error
        return Intake(self.directory, self, what)

    def claim(self, length: int) -> None:
        """Count bytes that are about to be written, evicting others if need be. Raises OSError."""
        self._reserve(self._set_up(), length, beyond=True)

    def give_back(self, length: int) -> None:
        """Count bytes that were claimed and not written, or deleted."""
        self._release(length)

    def make_room(self, length: int) -> bool:
        """Give up a share of the cache on a full disk; whether that freed anything."""
        return self._shrink(length)

    def has_room(self, length: int) -> bool:
        """Whether so many bytes can be written without evicting first, for the quota or for the disk."""
        if self._ledger is None or self._ledger.total + length > self.quota:
            return False
        try:
            disk = os.statvfs(self.directory)
        except OSError:
            return False
        return length <= disk.f_bavail * disk.f_frsize

    def release(self, file: DeviceFile) -> None:
        """Forget a device, which the caller closes once no thread uses it any more."""
        if self._open.get(file.directory) is file:
            del self._open[file.directory]

    def pin(self, file: DeviceFile, before_punch: BeforePunch) -> None:
        """Answer for what the kernel reads of a device: :meth:`DeviceFile.pin`."""
        file.pin(before_punch, self._rule)

    def put(self, file: DeviceFile, fills: Sequence[Fill]) -> bool:
        """Write verified spans of a device; False when they are not on disk afterwards. May evict."""
        length = sum(len(fill.data) for fill in fills)
        if file.abandoned or file.read_only:
            return False
        if not file.pinned and (length > self.quota or time.monotonic() < self._paused_until):
            return False
        for last in (False, True):
            try:
                ledger = self._ledger or self._set_up()
                if not self._reserve(ledger, length, beyond=file.pinned):
                    return False
                gained = 0
                try:
                    gained = file.write(fills)
                finally:
                    ledger.release(length - gained)
            except OSError as error:
                self.refusal = error
                if last or error.errno not in _NO_SPACE or not self._shrink(length):
                    self._pause("cannot write to the cache", error)
                    return False
            else:
                self._warned = False
                self.refusal = None
                return all(file.states[fill.number] == PRESENT for fill in fills)
        return False

    def entrust(self, file: DeviceFile, length: int) -> int | None:
        """Have somebody else write so many bytes of verified spans; :meth:`take_over` has to follow.

        Returns what that wants; None if it cannot be done now. Evicts nothing.
        """
        ledger = self._ledger
        if ledger is None or time.monotonic() < self._paused_until or not ledger.reserve(length, self.quota):
            return None
        if (generation := file.entrust()) is None:
            ledger.release(length)
        return generation

    def take_over(self, file: DeviceFile, length: int, generation: int, digests: Mapping[int, bytes]) -> bool:
        """Count spans as present that somebody has written since :meth:`entrust`; False if that cannot be.

        Args:
            file: of the device.
            length: as it was given.
            generation: as it was returned.
            digests: of the bytes in the file, by span, ascending.
        """
        gained: int | None = None
        try:
            gained = file.take_over(generation, digests)
        except OSError as error:
            _log.debug("spans cannot be marked: %s", error)
        finally:
            self._release(length - (gained or 0))
        return gained is not None

    def refused(self, what: str) -> CacheError:
        """The error for bytes that have to be on disk, and are not."""
        reason = self.refusal.strerror if self.refusal is not None else "the cache cannot be written"
        return CacheError(
            f"{what} cannot be kept on disk, which a mounted image needs: {reason}",
            hint="make room on the disk of the cache; reading again works at once then",
            errno=errno.ENOSPC,
        )

    def verify(self, file: DeviceFile, numbers: Iterable[int]) -> Verified:
        """Hash spans on disk; damaged ones are dropped. Raises OSError."""
        verified = file.verify(numbers)
        self._release(verified.freed)
        return verified

    def evict(self, file: DeviceFile, numbers: Iterable[int]) -> None:
        """Take spans of a device off the disk. Raises OSError."""
        self._release(file.evict(numbers).freed)

    def collect(self, target: int) -> int:
        """Evict what was not used for longest until at most ``target`` bytes are left. Returns bytes freed.

        Devices without a span, indexes without a device, and what a crash left behind, are removed unless they
        are in use.
        """
        with self._mutex, self._exclusive():
            self._sweep()
            total = self.count()
            if self._ledger is not None:
                self._ledger.reset(total)
            freed = 0
            if total > target:
                in_use = self._blobs(in_use=True)
                items = [item for item in kept_items(self._root) if item.may_go(in_use)]
                freed = evict_oldest(self, total - target, self._note_eviction, items)
            self._remove_empty()
            strays = remove_stray_indexes(self._root, self._blobs)
            self._release(strays)
        return freed + strays

    def empty(self) -> None:
        """Evict every span that may be, and nothing else."""
        with self._mutex, self._exclusive():
            self._sweep()
            evict_oldest(self, sys.maxsize, self._note_eviction)
            self._remove_empty()

    def count(self) -> int:
        """Bytes within the quota: of devices, by their own account, and of what is kept besides."""
        total = arriving_bytes(self.directory) + kept_bytes(self._root)
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
        if opened := self._open.get(path):
            # Whoever has it open may give it up meanwhile, and the numbers of its files would be others'.
            with opened.kept_open() as kept:
                if kept:
                    yield opened
                    return
        file = DeviceFile.visit(path)
        try:
            yield file
        finally:
            file.close()

    def remove(self, path: Path) -> bool:
        """Delete a device that no process has open, and the kernel does not read; False when one has."""
        if path in self._open or is_pinned_for_good(path):
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
            if not is_at(lock, path / "lock") or is_pinned(path):
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
        with suppress(FileNotFoundError):  # a sweep took it for what somebody dead had left
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

    def _reserve(self, ledger: Ledger, length: int, *, beyond: bool) -> bool:
        if ledger.reserve(length, self.quota):
            return True
        if self._rule.clock() >= self._futile_until:
            self.collect(max(0, int(self.quota * (1 - _HEADROOM)) - length))
            if ledger.reserve(length, self.quota):
                return True
            self._note_futility()
        if not beyond:
            return False
        ledger.add(length)
        self.stats.over_quota += 1
        if not self._warned_of_quota:
            self._warned_of_quota = True
            _log.warning(
                "mounted images in use take more than the cache quota of %d bytes: it is exceeded", self.quota
            )
        return True

    def _shrink(self, length: int) -> bool:
        """Give up a share of the cache on a full disk; whether that freed anything."""
        if self._rule.clock() < self._futile_until:
            return False
        try:
            held = self.count()
            if self.collect(held - max(2 * length, int(held * _FULL_DISK_SHARE))) > 0:
                return True
        except OSError as error:
            _log.debug("nothing can be evicted: %s", error)
        self._note_futility()
        return False

    def _note_futility(self) -> None:
        self._futile_until = self._rule.clock() + int(self._rule.min_idle_ns * _FUTILE_SHARE)
        self.on_futility()

    def unpin(self, file: DeviceFile) -> None:
        """The kernel does not read a device any more, so that it may give way to others."""
        file.unpin()
        self._futile_until = 0

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

    def _blobs(self, *, in_use: bool = False) -> set[str]:
        """What the devices are of, or those that somebody has open."""
        found = set()
        for path in self.paths():
            if not in_use or path in self._open or is_in_use(path) or is_pinned_for_good(path):
                with suppress(OSError, MapMismatch), self.visit(path) as file:
                    found.add(file.map.blob)
        return found

    def _note_eviction(self, evicted: Evicted) -> None:
        self._release(evicted.freed)
        self.stats.evicted += evicted.spans

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
        sweep_arriving(self.directory)


def _nothing() -> None:
    """Nobody can help."""
