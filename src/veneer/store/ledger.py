"""How many bytes all devices of a cache hold, as one number that every process adds to.

Space is reserved before it is written, so that the quota holds over all processes at every moment. A process
that dies between reserving and writing leaves the number too high; whoever counts the devices sets it right.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Ledger"]

_TOTAL = struct.Struct("=q")


class Ledger:
    """The shared total. Any thread of any process; each call is a few microseconds under a file lock.

    Raises OSError when the file cannot be made, read or written.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._mutex = threading.Lock()

    @property
    def total(self) -> int:
        """Bytes reserved or present."""
        data = os.pread(self._fd, _TOTAL.size, 0)
        return _TOTAL.unpack(data)[0] if len(data) == _TOTAL.size else 0

    def reserve(self, length: int, quota: int) -> bool:
        """Add ``length`` bytes, or return False when that would exceed ``quota``."""
        with self._locked():
            total = self.total + length
            if total > quota:
                return False
            self._write(total)
            return True

    def add(self, length: int) -> None:
        """Add ``length`` bytes, whatever the quota."""
        with self._locked():
            self._write(self.total + length)

    def release(self, length: int) -> None:
        """Take off bytes that were freed, or reserved and not used."""
        if length:
            with self._locked():
                self._write(max(0, self.total - length))

    def reset(self, total: int) -> None:
        """Set the total to what was counted."""
        with self._locked():
            self._write(total)

    def close(self) -> None:
        """Give up the file."""
        os.close(self._fd)

    def _write(self, total: int) -> None:
        os.pwrite(self._fd, _TOTAL.pack(total), 0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
