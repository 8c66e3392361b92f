"""One device in the cache: a sparse data file and its presence map, shared by any number of processes.

    devices/<key>/data    the bytes, at their device (or blob) offsets
    devices/<key>/map     which of them are there (:mod:`veneer.store.presence`)
    devices/<key>/lock    held shared by every process that has the device open
    devices/<key>/mounted the kernel reads ``data`` by itself (:mod:`veneer.store.pin`)
    devices/<key>/frozen  so it does, and nobody answers for that: nothing is taken away

Invariant: :meth:`DeviceFile.read` returns bytes that were verified when they were written, or None. It never
waits for another process: readers take no lock. Changes are made under the map's lock, which is held for
local I/O only. A file that turns out unreadable is abandoned for the rest of this process; whoever reads gets
None and fetches. A device that is mounted is changed by the owner of the mount alone, and by the rules of
:mod:`veneer.store.owned`; all others' changes are not done, which costs them the cache and nothing else.

Not here: what to write, what to evict, accounting (:mod:`veneer.store.cache`).

Longer than other modules here: whoever changes the file or its map does it in one place, under one lock.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from veneer.errors import CacheError
from veneer.oci.digest import Hasher
from veneer.store.extents import Fill, punch_spans, runs, write_run
from veneer.store.owned import BeforePunch, IdleRule, Owned
from veneer.store.pair import checked, is_at, open_pair
from veneer.store.pin import Freeze, frozen_at, is_pinned_for_good, pin_at
from veneer.store.presence import PRESENT, SUSPECT, Layout, PresenceMap

__all__ = ["DeviceFile", "Evicted", "Fill", "Verified"]

_log = logging.getLogger(__name__)

#: How often a read is tried again because spans of the device were taken away meanwhile.
_READ_TRIES = 3
#: How often a device directory may vanish while it is opened (someone clears the cache) before we give up.
_OPEN_TRIES = 16
#: Hits between two notes of the last uses in the map: keeps LRU honest between processes for 1 us a hit.
_HITS_A_FLUSH = 4096
#: Bytes of one read that is only hashed.
_HASH_STEP = 1 << 20


class Evicted(NamedTuple):
    """What :meth:`DeviceFile.evict` took away: so many spans, so many bytes."""

    spans: int
    freed: int


@dataclass(slots=True)
class Verified:
    """What :meth:`DeviceFile.verify` found: spans that are right, spans dropped, bytes freed by that."""

    right: int
    dropped: list[int]
    freed: int


class DeviceFile:
    """An open device of the cache. Any thread may call any method, but :meth:`close` comes last.

    Who cannot know when that is uses it within :meth:`kept_open`.
    """

    def __init__(self, directory: Path, presence: PresenceMap, data_fd: int, live_fd: int | None) -> None:
        self.directory = directory
        self.map = presence
        self.states: Sequence[int] = presence.states
        self._generation = presence.generation
        self._fd = data_fd
        self._live_fd = live_fd
        self._size = os.fstat(data_fd).st_size
        # Spans of a data file in plain form tile it; then this finds the spans of a range.
        self._starts: array[int] = array("Q", presence.offsets)
        self._starts.append(self._size)
        self._touched = array("Q", bytes(8 * presence.count))
        self._hits = 0
        self._abandoned = False
        self._owned: Owned | None = None
        self._pin_at, self._frozen_at = pin_at(directory), frozen_at(directory)
        self._keeping = threading.Lock()
        self._keepers = 0
        self._closing = False

    @classmethod
    def open(cls, directory: Path, layout: Layout) -> Self:
        """Open a device for use, making it anew when there is none that matches. Raises OSError."""
        for _ in range(_OPEN_TRIES):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before we hold the lock: nobody could tell afterwards whether the device is in use by a mount.
            is_pinned_for_good(directory)
            try:
                live = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(live, fcntl.LOCK_SH)
                if is_at(live, directory / "lock") and (opened := open_pair(directory, layout)):
                    return cls(directory, *opened, live)
            except BaseException:
                os.close(live)
                raise
            os.close(live)
        raise OSError(errno.EBUSY, "the directory keeps vanishing", str(directory))

    @classmethod
    def visit(cls, directory: Path) -> Self:
        """Open a device that exists, for maintenance. Raises OSError or MapMismatch."""
        is_pinned_for_good(directory)
        data = os.open(directory / "data", os.O_RDWR | os.O_CLOEXEC)
        try:
            fd = os.open(directory / "map", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                presence = checked(fd, data, None)
                fcntl.flock(fd, fcntl.LOCK_UN)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.close(data)
            raise
        return cls(directory, presence, data, None)

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of a device in plain form, or None unless every span of the range is present and trusted."""
        first, past = self._spans_of(offset, length)
        return self._pread(first, past, offset, length, PRESENT) if length else b""

    def holds(self, offset: int, length: int) -> bool:
        """Whether every span of the range is present and trusted: the kernel may read it. Notes the use."""
        first, past = self._spans_of(offset, length)
        # Noted first: see :mod:`veneer.store.owned`.
        self._touch(first, past)
        return bytes(self.states[first:past]).count(PRESENT) == past - first

    def _spans_of(self, offset: int, length: int) -> tuple[int, int]:
        starts, end = self._starts, offset + length
        if offset < 0 or length < 0 or end > self._size:
            raise ValueError(f"range {offset}+{length} outside the device of {self._size} bytes")
        if not length:
            return 0, 0
        first = bisect_right(starts, offset) - 1
        return first, first + 1 if starts[first + 1] >= end else bisect_right(starts, end - 1)

    def read_span(self, number: int, trusted: int = PRESENT) -> bytes | None:
        """The whole of one span as the data file has it, if its state is ``trusted``."""
        length = self.map.lengths[number]
        return self._pread(number, number + 1, self.map.offsets[number], length, trusted)

    def _pread(self, first: int, past: int, offset: int, length: int, trusted: int) -> bytes | None:
        generation = self._generation
        for _ in range(_READ_TRIES):
            before = generation[0]
            for number in range(first, past):
                if self.states[number] != trusted:
                    return None
            try:
                data = os.pread(self._fd, length, offset)
            except OSError as error:
                self._abandon(f"cannot be read: {error.strerror}")
                return None
            if generation[0] != before:
                continue
            if len(data) != length:
                self._abandon("is shorter than its map says")
                return None
            self._touch(first, past)
            return data
        return None

    def write(self, fills: Sequence[Fill]) -> int:
        """Store verified spans, in ascending order. Returns the bytes gained; raises OSError.

        Spans that are present already are left alone, and so is a device that another process has mounted.
        """
        gained = 0
        with self.map.locked():
            if self._abandoned or self.read_only:
                return 0
            wanted = [fill for fill in fills if self.states[fill.number] != PRESENT]
            for run in runs(self.map, wanted):
                try:
                    write_run(self._fd, self.map, run, undo=not self.frozen)
                except OSError:
                    # What was taken back may have been more than what was written: see :meth:`take_over`.
                    self.map.bump()
                    raise
                gained += self._mark(run)
        return gained

    def entrust(self) -> int | None:
        """Let somebody else write verified spans to the file; returns what :meth:`take_over` wants then.

        None: that is not for us to allow.
        """
        # With the lock: whoever takes spans away and has counted that may not have punched them out yet.
        with self.map.locked():
            return None if self._abandoned or self.read_only else self._generation[0]

    def take_over(self, generation: int, digests: Mapping[int, bytes]) -> int | None:
        """Mark spans that somebody has written since :meth:`entrust`. Returns the bytes gained; raises OSError.

        None: something was punched out meanwhile, maybe of what was written. Nothing is marked then.

        Args:
            generation: of the moment before.
            digests: of what was written, by span, ascending.
        """
        gained = 0
        with self.map.locked():
            if self._abandoned or self.read_only or self._generation[0] != generation:
                return None
            wanted = [Fill(n, b"", digest) for n, digest in digests.items() if self.states[n] != PRESENT]
            for run in runs(self.map, wanted):
                gained += self._mark(run)
        return gained

    def _mark(self, run: Sequence[Fill]) -> int:
        first = run[0].number
        if self._owned is not None:
            # Whoever waits for the span is about to tell the kernel.
            self._owned.note(first, first + len(run))
        return self.map.mark(first, [fill.digest for fill in run], time.time_ns())

    @property
    def abandoned(self) -> bool:
        """Whether the data file turned out unreadable; nothing is read from or written to it any more."""
        return self._abandoned

    @property
    def fd(self) -> int:
        """The data file. Its number stays the same until the device is closed."""
        return self._fd

    @property
    def pinned(self) -> bool:
        """Whether this object has the device pinned."""
        return self._owned is not None

    @property
    def pinned_elsewhere(self) -> bool:
        """Whether the kernel reads the device and somebody else answers for that."""
        return self._owned is None and os.access(self._pin_at, os.F_OK)

    @property
    def frozen(self) -> bool:
        """Whether the kernel reads all of the device and nobody answers for that."""
        return os.access(self._frozen_at, os.F_OK)

    @property
    def read_only(self) -> bool:
        """Whether only others may change the device, or nobody."""
        return self._owned is None and (self.pinned_elsewhere or self.frozen)

    @property
    def unwatched(self) -> bool:
        """Whether the kernel may read the device without asking: eviction has to begin by watching it."""
        return self._owned is not None and self._owned.unwatched

    @property
    def to_be_watched(self) -> bool:
        """Whether the kernel has to go on asking, because eviction has begun to watch what it reads."""
        return self._owned is not None and self._owned.watching

    def pin(self, before_punch: BeforePunch, rule: IdleRule) -> None:
        """Answer from now on for what the kernel reads. Raises CacheError or OSError."""
        if self._owned is not None:
            raise ValueError(f"the device {self.directory.name} is pinned already")
        with self.map.locked():
            if self._abandoned or not is_at(self._fd, self.directory / "data"):
                raise CacheError(f"{self.directory / 'data'} cannot be mounted: it is out of use, see the log")
            self._owned = Owned(self.directory, self.map, before_punch, rule)

    def unpin(self) -> None:
        """The kernel does not read the device any more."""
        with self.map.locked():
            if self._owned is not None:
                self._owned.pin.release()
                self._owned = None

    def leave(self) -> None:
        """Answer no more for what the kernel may go on reading: nobody may change it until somebody pins it."""
        with self.map.locked():
            if self._owned is not None:
                self._owned.pin.close()
                self._owned = None

    def freeze(self) -> Freeze | None:
        """Keep all of a complete device as it is, until that is undone; None if it is not. Raises OSError."""
        with self.map.locked():
            current = is_at(self._fd, self.directory / "data") and is_at(self.map.fd, self.directory / "map")
            if self._abandoned or not current or not self.map.complete:
                return None
            return Freeze.take(self.directory, self._fd)

    def evict(self, numbers: Iterable[int]) -> Evicted:
        """Take spans away, also from other processes' readers. Raises OSError.

        A device that another process has mounted is left alone, and so is one that is frozen; of one that we
        have, what was idle for long.
        """
        with self.map.locked():
            if self.frozen:
                return Evicted(0, 0)
            if self._owned is not None:
                gone, freed = self._owned.take(sorted(numbers))
                punch_spans(self._fd, self.map, gone)
                return Evicted(len(gone), freed)
            if self.pinned_elsewhere:
                return Evicted(0, 0)
            gone = [number for number in sorted(numbers) if self.states[number]]
            return Evicted(len(gone), self._drop(gone))

    def verify(self, numbers: Iterable[int]) -> Verified:
        """Hash spans on disk; what is right becomes trusted, what is not is dropped. Raises OSError."""
        right: list[int] = []
        dubious: list[int] = []
        for number in numbers:
            if state := self.states[number]:
                (right if self._is_right(number, state) else dubious).append(number)
        with self.map.locked():
            if self.read_only:
                return Verified(len(right), [], 0)
            self._trust(right)
            # Asked again under the lock: a span may just have been evicted, or written, meanwhile.
            dropped = [
                number
                for number in dubious
                if (state := self.states[number]) and not self._is_right(number, state)
            ]
            freed = self._drop(dropped) if dropped else 0
        return Verified(len(right), dropped, freed)

    def hash_range(self, hasher: Hasher, offset: int, length: int) -> bool:
        """Feed bytes of the data file to ``hasher``, trusted or not; False if they cannot be read."""
        end = offset + length
        while offset < end:
            try:
                data = os.pread(self._fd, min(_HASH_STEP, end - offset), offset)
            except OSError as error:
                self._abandon(f"cannot be read: {error.strerror}")
                return False
            if not data:
                self._abandon("is shorter than its map says")
                return False
            hasher.update(data)
            offset += len(data)
        return True

    def confirm(self, generation: int, states: bytes) -> bool:
        """Trust all of the device, hashed since it was as given; False if it has changed meanwhile."""
        with self.map.locked():
            if self._abandoned or self.map.generation[0] != generation or bytes(self.states) != states:
                return False
            self._trust(number for number, state in enumerate(states) if state == SUSPECT)
            if self._owned is not None:
                self._owned.complete()
            self.map.mark_complete()
            return True

    def _trust(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self.states[number] == SUSPECT:
                self.map.mark(number, [self.map.digest(number)], self.map.uses[number])

    def evictable(self) -> Iterator[tuple[int, int, int]]:
        """What :meth:`held` gives of the spans that may be evicted now."""
        if not self.pinned_elsewhere and not self.frozen:
            owned = self._owned
            yield from (row for row in self.held() if owned is None or owned.is_idle(row[0]))

    def held(self) -> Iterator[tuple[int, int, int]]:
        """Number, last use (ns) and length of every span on disk."""
        for number in self.map.on_disk():
            yield number, max(self.map.uses[number], self._touched[number]), self.map.lengths[number]

    def flush_uses(self) -> None:
        """Note in the map when spans were last used by this process. Raises OSError."""
        touched, self._touched = self._touched, array("Q", bytes(8 * self.map.count))
        with self.map.locked():
            self.map.write_uses(touched)

    @contextmanager
    def kept_open(self) -> Iterator[bool]:
        """Put :meth:`close` off until this ends. False if it was called already: nobody may use it then."""
        with self._keeping:
            kept = not self._closing
            self._keepers += kept
        try:
            yield kept
        finally:
            with self._keeping:
                self._keepers -= kept
                last = kept and self._closing and not self._keepers
            if last:
                self._close()

    def close(self) -> None:
        """Flush what is known of last uses and give up the files, as soon as nobody keeps them open."""
        with self._keeping:
            self._closing = True
            if self._keepers:
                return
        self._close()

    def _close(self) -> None:
        try:
            if any(self._touched):
                self.flush_uses()
        except OSError as error:
            _log.debug("%s: last uses are lost: %s", self.directory, error)
        self.states = bytes(self.map.count)
        self.map.close()
        os.close(self._fd)
        if self._live_fd is not None:
            os.close(self._live_fd)
        if self._owned is not None:
            self._owned.pin.close()

    def _touch(self, first: int, past: int) -> None:
        now = time.time_ns()
        if past - first == 1:
            self._touched[first] = now
        else:
            self._touched[first:past] = array("Q", [now]) * (past - first)
        if self._owned is not None:
            self._owned.note(first, past)
        self._hits += 1
        if self._hits % _HITS_A_FLUSH == 0:
            try:
                self.flush_uses()
            except OSError as error:
                _log.debug("%s: last uses are lost: %s", self.directory, error)

    def _abandon(self, why: str) -> None:
        if not self._abandoned:
            self._abandoned = True
            self.states = bytes(self.map.count)
            _log.warning("cache file %s %s; it is not used until the next start", self.directory / "data", why)

    def _is_right(self, number: int, state: int) -> bool:
        data = self.read_span(number, state)
        return data is not None and hashlib.sha256(data).digest() == self.map.digest(number)

    def _drop(self, numbers: Sequence[int]) -> int:
        freed = self.map.clear(numbers)
        # What is damaged in a mounted device is fetched again in its place.
        if self._owned is not None or punch_spans(self._fd, self.map, numbers):
            return freed
        return freed + self._drop_everything()

    def _drop_everything(self) -> int:
        """Where holes cannot be punched, space is freed by the device."""
        freed = self.map.clear(self.map.on_disk())
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self._size)
        return freed
