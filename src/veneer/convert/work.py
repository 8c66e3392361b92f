"""Conversions of single layers on disk: finished ones are found again, unfinished ones start over.

A job is a directory named after everything that its result depends on. Its record is written last and names
the digests of the other files, which are checked before use: after kill -9, or on a disk that lost data, a
job is either whole or as good as absent. Whoever uses a result holds a shared lock on the job, whoever makes
one an exclusive lock, so several conversions may share this directory; the last to release a job that has
been pushed deletes it.

Not for: caching. What nobody came back for is deleted when it is a week old.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from veneer.errors import CacheError, IntegrityError, UsageError
from veneer.index.model import Device, LayerIndex, LayerTree
from veneer.index.wire import decode_spans, decode_tree, encode_tree
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["BlobFile", "Job", "StoredLayer", "WorkDirectory"]

#: Another conversion holds the job: look again after this long.
LOCK_POLL_S = 0.1
#: How long the work of a conversion that nobody repeated is kept.
ABANDONED_AFTER_S = 7 * 86_400
#: A record holds four digests and a handful of counters.
_MAX_RECORD = 64 << 10
_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A converted layer: its blob in a local file, and what the index says of it.

    Args:
        path: the file; stays until the job is released.
        blob: descriptor of the file's content.
        index: the layer's tree and device.
        dropped: metadata that the tree does not hold -> how many.
        reused: it was there already when asked for.
    """

    path: Path
    blob: Descriptor
    index: LayerIndex
    dropped: Mapping[str, int]
    reused: bool


class WorkDirectory:
    """All jobs below one directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def job(self, key: str, media_type: str) -> "Job":
        """The job named ``key``, whose result is a blob of the given type."""
        return Job(self._path / key, media_type)

    def sweep(self) -> None:
        """Delete jobs that nobody works on and that nobody has touched for a week."""
        with _disk(self._path):
            if not self._path.is_dir():
                return
            for entry in list(self._path.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir() and entry.stat().st_mtime + ABANDONED_AFTER_S < time.time():
                        job = Job(entry, "")
                        if job.lock(fcntl.LOCK_EX):
                            job.delete()
                        job.release()


class BlobFile:
    """A blob being written: appended, hashed and counted. For one thread at a time.

    ``with`` closes the file, and deletes it when the block fails.
    """

    def __init__(self, path: Path, media_type: str, algorithm: str = "sha256") -> None:
        self._media_type = media_type
        self._algorithm = algorithm
        self._hasher = Digest.of(b"", algorithm).hasher()
        self._size = 0
        with _disk(path):
            self._file = path.open("wb", buffering=0)
        self.path = path

    def append(self, data: bytes) -> int:
        """Write ``data`` and return where it begins."""
        start = self._size
        view = memoryview(data)
        with _disk(self.path):
            while view:
                view = view[self._file.write(view) :]
        self._hasher.update(data)
        self._size += len(data)
        return start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        self._file.close()
        if kind is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def descriptor(self) -> Descriptor:
        """What the file holds so far; all of it can be read."""
        return Descriptor(self._media_type, Digest(self._algorithm, self._hasher.hexdigest()), self._size)


class Job:
    """The work on one layer. For one task, whose calls follow each other.

    ``claim`` -> a result (locked shared), or None: then the caller has the exclusive lock, writes the blob and
    calls ``commit``. ``release`` ends either.
    """

    def __init__(self, path: Path, media_type: str) -> None:
        self._path = path
        self._media_type = media_type
        self._lock_fd = -1

    async def claim(self) -> StoredLayer | None:
        """Wait until somebody has done the job, or until it is ours to do."""
        while True:
            if self.lock(fcntl.LOCK_SH):
                if stored := await trio.to_thread.run_sync(self._load):
                    return stored
                # Not atomic: somebody else may have locked, finished and unlocked in between.
                if self.lock(fcntl.LOCK_EX):
                    stored = await trio.to_thread.run_sync(self._load)
                    if stored is None or self.lock(fcntl.LOCK_SH):
                        return stored
            self.release()
            await trio.sleep(LOCK_POLL_S)

    def create(self) -> BlobFile:
        """The blob to write, empty. Needs the exclusive lock."""
        with _disk(self._path):
            self._record.unlink(missing_ok=True)
        return BlobFile(self._path / "blob", self._media_type)

    def commit(
        self, blob: Descriptor, spans: bytes, tree: LayerTree, dropped: Mapping[str, int]
    ) -> StoredLayer:
        """Record the result; from here on it is reused. Needs the exclusive lock and makes it shared.

        Nothing is synced to the disk: what a crash loses fails its digest and is made again.
        """
        tree_section = encode_tree(tree)
        record = {
            "blob": {"digest": str(blob.digest), "size": blob.size},
            "spans": str(Digest.of(spans)),
            "tree": str(Digest.of(tree_section)),
            "dropped": dict(sorted(dropped.items())),
        }
        with _disk(self._path):
            (self._path / "spans").write_bytes(spans)
            (self._path / "tree").write_bytes(tree_section)
            partial = self._path / "record.partial"
            partial.write_bytes(canonical_json(record))
            partial.replace(self._record)
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)
        index = LayerIndex(tree, decode_spans(spans))
        return StoredLayer(self._path / "blob", blob, index, dropped, reused=False)

    def release(self, *, pushed: bool = False) -> None:
        """Give up the lock; when the result is ``pushed`` and nobody else uses it, delete it."""
        if self._lock_fd < 0:
            return
        if pushed and self.lock(fcntl.LOCK_EX):
            self.delete()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def delete(self) -> None:
        """Delete everything. Needs the exclusive lock."""
        shutil.rmtree(self._path, ignore_errors=True)

    def lock(self, kind: int) -> bool:
        """Take or change the lock without waiting; False when others are in the way, and then it is lost."""
        lock = self._path / "lock"
        with _disk(self._path):
            try:
                if self._lock_fd < 0:
                    self._path.mkdir(parents=True, exist_ok=True)
                    self._lock_fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
                # The job may have been deleted, and even made anew, before the lock was ours.
                return os.path.samestat(os.stat(lock), os.fstat(self._lock_fd))
            except (BlockingIOError, FileNotFoundError):
                return False

    @property
    def _record(self) -> Path:
        return self._path / "record.json"

    def _load(self) -> StoredLayer | None:
        """The result, when every byte of it is what the record says."""
        try:
            with self._record.open("rb") as file:
                record = parse_json(file.read(_MAX_RECORD + 1), "conversion record", limit=_MAX_RECORD)
            return self._check(record)
        except (OSError, IntegrityError, UsageError):
            return None  # made again from the source

    def _check(self, record: object) -> StoredLayer:
        if not isinstance(record, dict) or not isinstance(record.get("dropped"), dict):
            raise IntegrityError("conversion record is malformed")
        stated = record.get("blob")
        members = stated if isinstance(stated, dict) else {}
        blob = Descriptor.from_json({"mediaType": self._media_type, **members})
        hasher = blob.digest.hasher()
        with (self._path / "blob").open("rb") as file:
            while chunk := file.read(_READ_SIZE):
                hasher.update(chunk)
        blob.digest.check_hash(hasher, "converted layer")
        spans, tree = ((self._path / name).read_bytes() for name in ("spans", "tree"))
        Digest.parse(str(record.get("spans"))).check(spans, "spans of the converted layer")
        Digest.parse(str(record.get("tree"))).check(tree, "tree of the converted layer")
        device: Device = decode_spans(spans)
        index = LayerIndex(decode_tree(tree, device.spans.size), device)
        dropped = {str(what): int(count) for what, count in record["dropped"].items()}
        return StoredLayer(self._path / "blob", blob, index, dropped, reused=True)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say what could not be written, and how to write elsewhere."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot work in {path}: {error.strerror or error}",
            hint="free space there, or choose another place with --cache-dir or VENEER_CACHE_DIR",
        ) from error
