"""A device that arrives from its beginning to its end; what it is is known only when all of it has come.

    devices/.arriving-*        locked by whoever writes it; what nobody locks is deleted by whoever comes next
    devices/.arriving-*/data   the bytes so far

Invariant: nothing reads an arriving device. It becomes one of the cache in a single rename, after its writer
has proven it: complete, trusted, its record written. A writer that dies leaves a directory that is no device.

What is written counts towards the quota from the moment when it is written. A device that is longer than the
whole quota is refused; one that only others are in the way of goes beyond, as mounted devices do.

Not here: where the bytes come from and what proves them (:mod:`veneer.formats`).
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from veneer.errors import CacheError
from veneer.index.model import Device
from veneer.store.devicefile import DeviceFile
from veneer.store.extents import Fill
from veneer.store.pair import is_at
from veneer.store.presence import Form, Layout, PresenceMap

__all__ = ["Intake", "Room", "arriving_bytes", "sweep_arriving"]

_PREFIX = ".arriving-"
#: Space is reserved in steps: each is a lock and two writes to a file that all processes share.
_RESERVE_STEP, _MOST_STEPS = 16 << 20, 16
#: Bytes that are copied at a time into a device that is there already.
_COPY_STEP = 8 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Room(Protocol):
    """Who accounts for the space: the cache."""

    @property
    def quota(self) -> int:
        """Bytes that all devices together may take."""

    def claim(self, length: int) -> None:
        """Count ``length`` more bytes, evicting others if need be. Raises OSError."""

    def give_back(self, length: int) -> None:
        """Count so many less."""

    def make_room(self, length: int) -> bool:
        """Give up others on a full disk; whether that freed anything."""


class Intake:
    """One arriving device. For one thread at a time; ``with`` deletes what was not committed.

    Args:
        devices: the directory of all devices.
        room: accounts for it.
        what: names it in errors.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, devices: Path, room: Room, what: str) -> None:
        self.size = 0
        self._devices = devices
        self._room = room
        self._what = what
        self._claimed = 0
        self._committed = False
        self._data = self._lock = -1
        try:
            self._directory = self._make()
        except OSError as error:
            self.close()
            raise self._refused(error) from error

    def append(self, data: bytes) -> None:
        """Write the next bytes. Raises CacheError when the disk or the quota does not take them."""
        end = self.size + len(data)
        if end > self._room.quota:
            raise CacheError(
                f"{self._what} unpacks to more than the cache quota of {self._room.quota} bytes",
                hint="raise it with --cache-quota or VENEER_CACHE_QUOTA",
                errno=errno.ENOSPC,
            )
        if end > self._claimed:
            step = max(end - self._claimed, min(_RESERVE_STEP, self._room.quota // _MOST_STEPS))
            self._on_disk(lambda: self._room.claim(step), step)
            self._claimed += step
        view, place = memoryview(data), self.size
        while view:
            written = self._on_disk(lambda: os.pwrite(self._data, view, place), len(view))  # noqa: B023 - called at once
            view, place = view[written:], place + written
        self.size = end

    def commit(self, device: Device, digests: Sequence[bytes]) -> None:
        """Make it the cached copy of ``device``, which the caller has proven to be just these bytes.

        Args:
            device: what it is; its size is :attr:`size`.
            digests: SHA-256 of each of its spans.

        Raises:
            CacheError: the disk is full or broken.
        """
        layout = Layout.of(device, Form.PLAIN)
        if layout.size != self.size:
            raise ValueError(f"{self.size} bytes for a device of {layout.size}")
        try:
            self._write_map(layout, digests)
            target = self._devices / device.key.hex
            try:
                self._directory.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._fill(target, layout, digests)
            else:
                self._committed = True
                self._room.give_back(self._claimed - self.size)
                self._claimed = 0
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Give up the files, and delete them unless they are a device by now."""
        if self._data >= 0:
            os.close(self._data)
            if not self._committed:
                shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._data = self._lock = -1
        self._room.give_back(self._claimed)
        self._claimed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def _make(self) -> Path:
        while True:
            directory = self._devices / f"{_PREFIX}{secrets.token_hex(8)}"
            directory.mkdir(mode=0o700)
            # Until it is locked it looks abandoned, and whoever sweeps then deletes it.
            with suppress(FileNotFoundError):
                self._lock = os.open(directory, _DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if is_at(self._lock, directory):
                    break
                os.close(self._lock)
                self._lock = -1
        self._data = os.open(directory / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return directory

    def _write_map(self, layout: Layout, digests: Sequence[bytes]) -> None:
        fd = os.open(self._directory / "map", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            PresenceMap.write_new(fd, layout, os.fstat(self._data))
            presence = PresenceMap(fd)
        except BaseException:
            os.close(fd)
            raise
        try:
            presence.mark(0, digests, time.time_ns())
            presence.mark_complete()
        finally:
            presence.close()

    def _fill(self, target: Path, layout: Layout, digests: Sequence[bytes]) -> None:
        """The device is there already, in part: give it what it has not."""
        file = DeviceFile.open(target, layout)
        try:
            number = 0
            while number < len(digests):
                fills: list[Fill] = []
                length = 0
                while number < len(digests) and length < _COPY_STEP:
                    offset, size = layout.rows[2 * number], layout.rows[2 * number + 1]
                    fills.append(Fill(number, os.pread(self._data, size, offset), digests[number]))
                    length += size
                    number += 1
                # What is copied is counted with the device, and what was claimed for us goes when we do.
                self._room.claim(length)
                gained = 0
                try:
                    gained = file.write(fills)
                finally:
                    self._room.give_back(length - gained)
        finally:
            file.close()

    def _on_disk(self, write: Callable[[], int | None], length: int) -> int:
        for last in (False, True):
            try:
                return write() or 0
            except OSError as error:
                if last or error.errno not in _FULL or not self._room.make_room(length):
                    raise self._refused(error) from error
        raise AssertionError("the second failure raises")

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self._what} cannot be kept in {self._devices}: {error.strerror}",
            hint="make room on the disk of the cache, or choose another with --cache-dir or VENEER_CACHE_DIR",
            errno=error.errno or errno.EIO,
        )


def arriving_bytes(devices: Path) -> int:
    """Bytes on disk of all devices that arrive now."""
    total = 0
    for path in devices.glob(f"{_PREFIX}*/data"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def sweep_arriving(devices: Path) -> None:
    """Delete what writers left that have died."""
    for directory in devices.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(directory, _DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # If it has become a device meanwhile, it has another name.
                shutil.rmtree(directory, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(lock)
