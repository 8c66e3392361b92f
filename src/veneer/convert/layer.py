"""One layer: stored blob in, native blob and its index out, in bounded memory.

    source --chunks--> [reader thread: check, decompress, hash, parse, cut] --batches--> [compress, on
    all cores] --frames, in order--> [writer: hash, append]

Every arrow is bounded, so the slowest stage sets the pace and the size of a layer does not matter; all layers
that are converted at once share one budget of batches. The reader stays in one thread and waits there for
its input, because decompressors pull; everything that waits for the network is on trio's side.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
import zstandard

from veneer.convert.cut import FRAME_SIZE, SMALL_FILE
from veneer.convert.frames import EMPTY_FRAME, LEVEL, Frame, LayerReader, SpanRecorder, compress
from veneer.convert.work import BlobFile, Job, StoredLayer
from veneer.errors import IntegrityError
from veneer.events import Notice, Progress, Reporter
from veneer.formats.decompress import plain_pieces
from veneer.index.model import LayerTree
from veneer.index.wire import encode_spans
from veneer.oci.canonical import canonical_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import LAYER_COMPRESSION
from veneer.source.base import BlobSource
from veneer.source.tasks import open_nursery

__all__ = ["Capacity", "LayerTask", "convert_layer"]

#: Raised whenever the same input may give other output, so that unfinished work is not continued across it.
CONVERTER_VERSION = 1
#: A layer whose bytes arrived damaged is fetched this often in all.
ATTEMPTS = 2
#: Chunks that may wait for the reader: enough to hide a hiccup of the network.
_CHUNKS_AHEAD = 8
#: Batches of 1 MiB in all, plain or compressed, and cores that they keep busy.
_MAX_BATCHES, _MAX_CORES = 32, 16


class _Damaged(IntegrityError):
    """The stored bytes are not what the manifest says: the source or the way from it is to blame."""


@dataclass(frozen=True, slots=True)
class LayerTask:
    """What is to be converted: ``layer`` is the stored blob, which unpacks to ``diff_id``."""

    layer: Descriptor
    diff_id: Digest
    devices: str

    @property
    def key(self) -> str:
        """Names the job: everything that its result depends on."""
        parameters = [CONVERTER_VERSION, list(zstandard.ZSTD_VERSION), LEVEL, FRAME_SIZE, SMALL_FILE]
        subject = [str(self.layer.digest), LAYER_COMPRESSION[self.layer.media_type], str(self.diff_id)]
        return hashlib.sha256(canonical_json([parameters, subject, self.devices])).hexdigest()

    @property
    def name(self) -> str:
        """For progress and messages: a short digest."""
        return self.layer.digest.hex[:12]


class Capacity:
    """What the layers of a conversion share: ``cores`` to compress on, a budget of ``batches`` in memory."""

    def __init__(self, cores: int) -> None:
        self.cores = trio.CapacityLimiter(min(cores, _MAX_CORES))
        self.batches = trio.Semaphore(min(2 * cores + 4, _MAX_BATCHES))


async def convert_layer(
    task: LayerTask, source: BlobSource, job: Job, capacity: Capacity, report: Reporter
) -> StoredLayer:
    """Convert one layer into ``job``, or find that this has been done. The job stays locked.

    Raises:
        IntegrityError: the stored bytes, the compression, the tar or the diffID are wrong.
        CacheError: the work directory cannot be written.
    """
    size = task.layer.size
    stored = await job.claim()
    for attempt in range(1, ATTEMPTS + 1):
        if stored is not None:
            break
        try:
            stored = await _Pipeline(task, source, job, capacity, report).run()
        except _Damaged as error:
            if attempt == ATTEMPTS:
                raise
            report(Notice(f"{error.message}; fetching it again"))
    assert stored is not None
    report(Progress("convert", task.name, size, size))
    return stored


@dataclass(slots=True)
class _Batch:
    """Spans on their way to the file; ``frames`` is set when ``done`` is."""

    plain: list[bytes]
    frames: list[Frame] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)


class _Pipeline:
    """One attempt at one layer."""

    def __init__(
        self, task: LayerTask, source: BlobSource, job: Job, capacity: Capacity, report: Reporter
    ) -> None:
        self._task = task
        self._source = source
        self._job = job
        self._capacity = capacity
        self._report = report
        self._received = 0
        self._held = 0  # batches of the budget

    async def run(self) -> StoredLayer:
        try:
            return await self._run()
        finally:
            for _ in range(self._held):
                self._capacity.batches.release()

    async def _run(self) -> StoredLayer:
        spans = SpanRecorder()
        with self._job.create() as blob:
            async with open_nursery() as nursery:
                chunk_sender, self._chunks = trio.open_memory_channel[bytes](_CHUNKS_AHEAD)
                self._ordered, ordered = trio.open_memory_channel[_Batch](math.inf)  # the budget bounds it
                nursery.start_soon(self._fetch, chunk_sender)
                nursery.start_soon(self._write, ordered, blob, spans)
                self._nursery = nursery
                tree, dropped = await trio.to_thread.run_sync(self._read)
                await self._ordered.aclose()
            return await trio.to_thread.run_sync(self._commit, blob, spans, tree, dropped)

    def _commit(
        self, blob: BlobFile, spans: SpanRecorder, tree: LayerTree, dropped: dict[str, int]
    ) -> StoredLayer:
        table = spans.table()
        if not len(table):
            blob.append(EMPTY_FRAME)
        descriptor = blob.descriptor()
        return self._job.commit(descriptor, encode_spans(descriptor, self._task.diff_id, table), tree, dropped)

    async def _fetch(self, chunks: trio.MemorySendChannel[bytes]) -> None:
        async with chunks, self._source.stream() as stream:
            async for chunk in stream:
                await chunks.send(chunk)

    async def _next_chunk(self) -> bytes:
        chunk = b""
        async for chunk in self._chunks:
            if chunk:
                break
        else:
            return b""
        self._received += len(chunk)
        if self._received < self._task.layer.size:
            self._report(Progress("convert", self._task.name, self._received, self._task.layer.size))
        return chunk

    def _read(self) -> tuple[LayerTree, dict[str, int]]:
        """The reader thread."""
        task = self._task
        what = f"layer {task.layer.digest} of {self._source.name}"
        stored = _CheckedInput(task.layer, what, lambda: trio.from_thread.run(self._next_chunk))
        reader = LayerReader(task.diff_id, task.devices, what)
        compression = LAYER_COMPRESSION[task.layer.media_type]
        try:
            for batch in reader.batches(plain_pieces(stored.read, compression, what)):
                trio.from_thread.run(self._submit, batch)
            result = reader.finish()
        except IntegrityError:
            stored.finish()  # damaged on the way: a better reason than whatever the damage led to
            raise
        stored.finish()
        return result

    async def _submit(self, plain: list[bytes]) -> None:
        await self._capacity.batches.acquire()
        self._held += 1
        batch = _Batch(plain)
        await self._ordered.send(batch)
        self._nursery.start_soon(self._compress, batch)

    async def _compress(self, batch: _Batch) -> None:
        batch.frames = await trio.to_thread.run_sync(compress, batch.plain, limiter=self._capacity.cores)
        batch.plain = []
        batch.done.set()

    async def _write(
        self, ordered: trio.MemoryReceiveChannel[_Batch], blob: BlobFile, spans: SpanRecorder
    ) -> None:
        def append(frames: list[Frame]) -> None:
            for frame in frames:
                spans.add(frame, blob.append(frame.stored))

        async with ordered:
            async for batch in ordered:
                await batch.done.wait()
                await trio.to_thread.run_sync(append, batch.frames)
                self._capacity.batches.release()
                self._held -= 1


class _CheckedInput:
    """The stored bytes as a file, hashed and counted as they arrive. For one thread."""

    def __init__(self, layer: Descriptor, what: str, next_chunk: Callable[[], bytes]) -> None:
        self._layer = layer
        self._what = what
        self._next_chunk = next_chunk
        self._hasher = layer.digest.hasher()
        self._size = 0
        self._chunk = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; b"" at the end."""
        if self._at == len(self._chunk):
            self._chunk, self._at = self._next_chunk(), 0
            self._hasher.update(self._chunk)
            self._size += len(self._chunk)
            if self._size > self._layer.size:
                raise _Damaged(f"{self._what}: more than the {self._layer.size} bytes stated")
        out = self._chunk[self._at : self._at + size]
        self._at += len(out)
        return out

    def finish(self) -> None:
        """Take what is left and raise unless all of it is what the manifest says."""
        self._at = len(self._chunk)
        while self.read(len(self._chunk) or 1):
            self._at = len(self._chunk)
        if self._size != self._layer.size:
            raise _Damaged(f"{self._what}: expected {self._layer.size} bytes, got {self._size}")
        try:
            self._layer.digest.check_hash(self._hasher, self._what)
        except IntegrityError as error:
            raise _Damaged(error.message) from error
