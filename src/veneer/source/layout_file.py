"""Files of an OCI layout: a blob read by range, and files that appear whole or not at all.

Everything but :class:`FileBlob` blocks and belongs into a thread. A staged file has a name of its own in the
root of the layout, is locked while somebody writes it, and gets its real name by ``rename`` after ``fsync``;
what a killed writer left is recognised by its free lock.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import trio

from veneer.errors import IntegrityError, NotFound, RegistryError, Unavailable
from veneer.oci.descriptor import Descriptor

__all__ = [
    "CHUNK",
    "BlobWriter",
    "FileBlob",
    "StagedFile",
    "is_staged",
    "locked",
    "os_errors",
    "read_small",
    "sweep",
    "sync_directory",
    "write_whole",
]

#: Large enough that a hop to a thread (some 50 microseconds) costs little, small enough for many at once.
CHUNK = 1 << 20
#: How much a writer copies before it comes back to report and to see whether it was cancelled.
_STEP = 8 * CHUNK
#: The lock is held for one rewrite of index.json; whoever holds it longer is stopped or hangs on its disk.
_LOCK_DEADLINE_S = 60.0
_LOCK_POLL_S = 0.005
_STAGED_PREFIX = ".veneer-staged-"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in place of a file must not block


@contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Failures of the disk under ``what`` as the errors that a repository may raise."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{what}: {error.strerror}") from error
    except OSError as error:
        hint = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise RegistryError(f"{what}: {error.strerror}", hint=hint) from error


def _open_regular(path: Path, name: str) -> tuple[int, int]:
    """Descriptor and size of a regular file; symbolic links are followed."""
    with os_errors(name):
        fd = os.open(path, _READ)
        status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise IntegrityError(f"{name} is not a regular file")
    return fd, status.st_size


def read_small(path: Path, name: str, limit: int) -> bytes:
    """All bytes of a file that must not be larger than ``limit``."""
    fd, _ = _open_regular(path, name)
    with os.fdopen(fd, "rb") as file, os_errors(name):
        data = file.read(limit + 1)
    if len(data) > limit:
        raise IntegrityError(f"{name} has more than {limit} bytes")
    return data


class FileBlob:
    """One blob of a layout as a :class:`~veneer.source.base.BlobSource`; opened anew for every read.

    Args:
        path: the file.
        name: names the blob in messages.
        size: what its descriptor says; a file of another size gives nothing but IntegrityError.
    """

    def __init__(self, path: Path, name: str, size: int) -> None:
        self._path = path
        self._name = name
        self._size = size

    @property
    def name(self) -> str:
        """Layout and digest."""
        return self._name

    @property
    def size(self) -> int:
        """Size that the descriptor states."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        self._check_range(offset, length)
        return await trio.to_thread.run_sync(self._read, offset, length)

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The ``length`` bytes from ``offset``, or all to the end."""
        self._check_range(offset, length or 0)
        end = self._size if length is None else offset + length
        fd = await trio.to_thread.run_sync(self._open)
        try:
            yield _Chunks(self, fd, offset, end)
        finally:
            os.close(fd)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise IntegrityError(
                f"{self._name}: range {offset}+{length} is outside the blob of {self._size} bytes"
            )

    def _open(self) -> int:
        fd, size = _open_regular(self._path, self._name)
        if size != self._size:
            os.close(fd)
            raise IntegrityError(f"{self._name} has {size} bytes, its descriptor says {self._size}")
        return fd

    def _read(self, offset: int, length: int) -> bytes:
        fd = self._open()
        try:
            return self.read_open(fd, offset, length)
        finally:
            os.close(fd)

    def read_open(self, fd: int, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes of the open file; blocks."""
        pieces = []
        while length:
            with os_errors(self._name):
                piece = os.pread(fd, length, offset)
            if not piece:
                raise IntegrityError(f"{self._name} ends at {offset}, its descriptor says {self._size}")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)


class _Chunks:
    """Chunks of an open blob in order. For one task."""

    def __init__(self, blob: FileBlob, fd: int, offset: int, end: int) -> None:
        self._blob = blob
        self._fd = fd
        self._offset = offset
        self._end = end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        length = min(CHUNK, self._end - self._offset)
        if not length:
            raise StopAsyncIteration
        chunk = await trio.to_thread.run_sync(self._blob.read_open, self._fd, self._offset, length)
        self._offset += length
        return chunk


class StagedFile:
    """A file being written. Each method blocks; one thread at a time. ``discard`` must follow in any case."""

    def __init__(self, directory: Path) -> None:
        while True:
            self._path: Path | None = directory / f"{_STAGED_PREFIX}{secrets.token_hex(8)}"
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # a sweep of another process came between open and lock

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def commit(self, target: Path) -> None:
        """Give the file its name, in place of whatever had it, so that a crash cannot undo or halve it."""
        assert self._path is not None
        os.fsync(self._fd)
        target.parent.mkdir(parents=True, exist_ok=True)  # blobs/sha512, say
        self._path.replace(target)
        self._path = None
        sync_directory(target.parent)

    def discard(self) -> None:
        """Leave nothing behind that was not committed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_whole(directory: Path, target: Path, data: bytes) -> None:
    """Put ``data`` at ``target`` atomically; ``directory`` is on the same file system."""
    file = StagedFile(directory)
    try:
        file.write(data)
        file.commit(target)
    finally:
        file.discard()


def sync_directory(directory: Path) -> None:
    """Make names in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_staged(name: str) -> bool:
    """Whether a directory entry is a staged file."""
    return name.startswith(_STAGED_PREFIX)


def sweep(directory: Path) -> None:
    """Remove staged files whose writers are gone."""
    for name in filter(is_staged, os.listdir(directory)):
        try:
            fd = os.open(directory / name, _READ | os.O_NOFOLLOW)
        except OSError:
            continue  # just finished, of another user, or no file at all: not ours to mend
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (directory / name).unlink(missing_ok=True)
        except OSError:
            continue  # somebody is writing it, or may alone remove it
        finally:
            os.close(fd)


class BlobWriter:
    """Takes the bytes of one blob and gives it its name only when digest and size are right.

    Methods block; one thread at a time. ``discard`` must follow in any case.
    """

    def __init__(self, directory: Path, descriptor: Descriptor, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._hasher = hashlib.new(descriptor.digest.algorithm)
        self._file = StagedFile(directory)
        self.written = 0

    def take(self, stream: BinaryIO) -> bool:
        """Copy some of ``stream``; False when it is at its end."""
        for _ in range(_STEP // CHUNK):
            data = stream.read(CHUNK)
            if not data:
                return False
            self.written += len(data)
            if self.written > self._descriptor.size:
                raise IntegrityError(
                    f"{self._name}: more bytes than the {self._descriptor.size} its descriptor says"
                )
            self._hasher.update(data)
            self._file.write(data)
        return True

    def commit(self, target: Path) -> None:
        """Check what was written and give it its name."""
        if self.written != self._descriptor.size:
            raise IntegrityError(
                f"{self._name}: {self.written} bytes, its descriptor says {self._descriptor.size}"
            )
        self._descriptor.digest.check_hash(self._hasher, self._name)
        self._file.commit(target)

    def discard(self) -> None:
        """Leave nothing behind that was not committed."""
        self._file.discard()


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` against other processes and threads. Only in a thread of trio's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_DEADLINE_S
        while not _try_lock(fd):
            trio.from_thread.check_cancelled()
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{what} has been locked by another process for {_LOCK_DEADLINE_S:g} s",
                    hint=f"see who holds it: fuser -v {path}",
                )
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
