"""One layer in one go: downloaded, unpacked into its device, hashed and indexed.

    blob --chunks--> [unpack: check, decompress, write] --pieces--> [scan: diffID, digests of spans, headers]

Two threads a layer, for which decompressing on the one hand, hashing and parsing on the other take about as
long. Both spend their time in C code without the interpreter's lock, but for the headers. The download goes
on in the event loop meanwhile; every arrow is bounded, so memory does not depend on the size of the layer.

Invariant: the device is committed, and the record returned, only when the stored bytes have the layer's
digest, the plain bytes are the diffID and the tar is whole. On any error, and on cancellation, nothing
remains.
"""

import hashlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import trio

from veneer.codec.boundaries import BoundaryFinder
from veneer.errors import IntegrityError
from veneer.events import Notice, Progress, Reporter
from veneer.formats.base import DeviceIntake, DeviceKeeper
from veneer.formats.checkpoints import CheckpointTable, spacing_of
from veneer.formats.decompress import plain_pieces
from veneer.formats.records import SPAN_SIZE, LayerRecord, plain_device
from veneer.index.build import TreeBuilder
from veneer.index.tar import TarParser
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import LAYER_COMPRESSION
from veneer.source.base import BlobSource
from veneer.source.parallel import LANES, Download, open_download
from veneer.source.tasks import open_nursery

__all__ = ["Capacity", "stream_layer"]

#: A layer whose bytes arrived damaged is fetched this often in all.
_ATTEMPTS = 2
#: Pieces of 1 MiB between the threads.
_PIECES_AHEAD = 8
#: Layers that are on their way besides those that are unpacked: they hide each other's round trips.
_DOWNLOADS_AHEAD = 2
#: Layers that are unpacked at a time at most, whatever the number of processors: each holds some 40 MiB.
_MOST_AT_ONCE = 4
#: Connections for all layers together.
_CONNECTIONS = 8
#: Name of the work in progress events.
_TASK = "download"


class _Damaged(IntegrityError):
    """The stored bytes are not what the manifest says: the source or the way from it is to blame."""


class Capacity:
    """What the layers of one image share.

    Args:
        layers: how many there are.
    """

    def __init__(self, layers: int) -> None:
        at_once = max(1, min((os.cpu_count() or 1) // 2, _MOST_AT_ONCE))
        self.downloads = trio.Semaphore(at_once + _DOWNLOADS_AHEAD)
        self.unpacking = trio.Semaphore(at_once)
        self.lanes = max(1, min(LANES, _CONNECTIONS // max(1, min(layers, at_once + _DOWNLOADS_AHEAD))))
        #: Of our own: whoever waits for the network must not keep others from their threads.
        self.threads = trio.CapacityLimiter(2 * at_once)


async def stream_layer(
    layer: Descriptor,
    diff_id: Digest,
    blob: BlobSource,
    *,
    keeper: DeviceKeeper,
    capacity: Capacity,
    report: Reporter,
) -> tuple[LayerRecord, CheckpointTable]:
    """Bring a layer into the cache, whole and proven; also gives its checkpoints, if it is of gzip.

    Args:
        layer: as the manifest states it.
        diff_id: what it must unpack to.
        blob: where it is.
        keeper: where its device goes.
        capacity: shared with the other layers.
        report: progress, and notices of damage.

    Raises:
        IntegrityError: stored bytes, compression, tar or diffID are wrong.
        CacheError: the disk or the quota does not take it.
        VeneerError: what the download reported.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            async with capacity.downloads:
                with keeper.incoming(blob, layer) as incoming:
                    async with (
                        open_download(incoming, lanes=capacity.lanes) as download,
                        capacity.unpacking,
                    ):
                        stream = _Stream(layer, diff_id, blob.name, download, report)
                        result = await stream.run(keeper, capacity.threads)
                    incoming.proven()
                    return result
        except _Damaged as error:
            if attempt == _ATTEMPTS:
                raise
            report(Notice(f"{error.message}; fetching it again"))
    raise AssertionError("the last attempt returns or raises")


class _Stream:
    """One attempt at one layer."""

    def __init__(
        self, layer: Descriptor, diff_id: Digest, name: str, download: Download, report: Reporter
    ) -> None:
        self._layer = layer
        self._diff_id = diff_id
        self._what = f"layer {name}"
        self._download = download
        self._report = report
        self._checkpoints = CheckpointTable()
        #: Between the threads; None ends it.
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES_AHEAD)
        self._digests: list[bytes] = []
        self._record: LayerRecord | None = None
        self._failure: IntegrityError | None = None

    async def run(
        self, keeper: DeviceKeeper, threads: trio.CapacityLimiter
    ) -> tuple[LayerRecord, CheckpointTable]:
        """Do it. Raises VeneerError."""
        intake = await trio.to_thread.run_sync(keeper.intake, self._what)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(partial(trio.to_thread.run_sync, self._scan, limiter=threads))
                nursery.start_soon(partial(trio.to_thread.run_sync, self._unpack, intake, limiter=threads))
            if self._failure is not None:
                raise self._failure
            record = self._record
            if record is None:
                raise AssertionError("a scan ends with a record or a failure")
            await trio.to_thread.run_sync(intake.commit, record.device, self._digests)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(intake.close)
        size = self._layer.size
        self._report(Progress(_TASK, self._layer.digest.hex[:12], size, size))
        return record, self._checkpoints

    async def _take(self) -> list[bytes]:
        chunks = await self._download.take()
        received, size = self._download.received, self._layer.size
        if chunks and received < size:
            self._report(Progress(_TASK, self._layer.digest.hex[:12], received, size))
        return chunks

    def _unpack(self, intake: DeviceIntake) -> None:
        """The first thread: stored bytes to plain ones, checked and written."""
        stored = _CheckedInput(self._layer, self._what, lambda: trio.from_thread.run(self._take))
        compression, size = LAYER_COMPRESSION[self._layer.media_type], self._layer.size
        finder = BoundaryFinder(spacing_of(size), self._checkpoints.add) if compression == "gzip" else None
        try:
            for piece in plain_pieces(stored.read, compression, self._what, finder=finder):
                intake.append(piece)
                self._pieces.put(piece)
                if self._failure is not None:
                    break
        except IntegrityError:
            stored.finish()  # damaged on the way: a better reason than whatever the damage led to
            raise
        finally:
            self._pieces.put(None)
        stored.finish()

    def _scan(self) -> None:
        """The second thread. Takes every piece, whatever happens: the first one would wait for it."""
        pieces = iter(self._pieces.get, None)
        try:
            self._record = self._read(pieces)
        except IntegrityError as error:
            self._failure = error
        finally:
            for _ in pieces:
                pass

    def _read(self, pieces: Iterator[bytes]) -> LayerRecord:
        hasher, spans = self._diff_id.hasher(), _SpanDigests(self._digests)
        parser, builder = TarParser(), TreeBuilder()
        try:
            for piece in pieces:
                hasher.update(piece)
                spans.update(piece)
                for entry in parser.feed(piece):
                    builder.add(entry)
            self._diff_id.check_hash(hasher, f"{self._what}: uncompressed bytes (diffID)")
            parser.finish()
            tree = builder.finish()
        except IntegrityError as error:
            if error.message.startswith(self._what):
                raise
            raise IntegrityError(f"{self._what}: {error.message}") from error
        device = plain_device(self._layer, self._diff_id, spans.finish(), self._digests)
        return LayerRecord.create(device, tree, builder.dropped)


class _SpanDigests:
    """SHA-256 of every :data:`SPAN_SIZE` bytes of a stream, appended to a list."""

    def __init__(self, digests: list[bytes]) -> None:
        self._digests = digests
        self._hasher = hashlib.sha256()
        self._size = 0

    def update(self, piece: bytes) -> None:
        """Add bytes."""
        view = memoryview(piece)
        while view:
            step = view[: SPAN_SIZE - self._size % SPAN_SIZE]
            self._hasher.update(step)
            self._size += len(step)
            view = view[len(step) :]
            if self._size % SPAN_SIZE == 0:
                self._end()

    def finish(self) -> int:
        """The stream has ended. Returns its length."""
        if self._size % SPAN_SIZE:
            self._end()
        return self._size

    def _end(self) -> None:
        self._digests.append(self._hasher.digest())
        self._hasher = hashlib.sha256()


class _CheckedInput:
    """The stored bytes as a file, hashed and counted as they come. For one thread."""

    def __init__(self, layer: Descriptor, what: str, take: Callable[[], list[bytes]]) -> None:
        self._layer = layer
        self._what = what
        self._take = take
        self._hasher = layer.digest.hasher()
        self._size = 0
        self._chunks: deque[bytes] = deque()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; b"" at the end."""
        parts: list[bytes] = []
        while size:
            if not self._chunks:
                if parts:
                    break  # what is here is worth more than what is still to come
                self._refill()
                if not self._chunks:
                    break
            chunk = self._chunks.popleft()
            if len(chunk) > size:
                self._chunks.appendleft(chunk[size:])
                chunk = chunk[:size]
            parts.append(chunk)
            size -= len(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Take what is left and raise unless all of it is what the manifest says."""
        self._chunks.clear()
        while self._refill():
            self._chunks.clear()
        if self._size != self._layer.size:
            raise _Damaged(f"{self._what}: expected {self._layer.size} bytes, got {self._size}")
        try:
            self._layer.digest.check_hash(self._hasher, self._what)
        except IntegrityError as error:
            raise _Damaged(error.message) from error

    def _refill(self) -> bool:
        self._chunks.extend(self._take())
        for chunk in self._chunks:
            self._hasher.update(chunk)
            self._size += len(chunk)
        return bool(self._chunks)
