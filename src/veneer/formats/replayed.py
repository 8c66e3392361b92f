"""A compressed layer read by the place of its plain bytes, for what the cache has lost of a streamed one.

gzip is entered at the checkpoint before the place (:mod:`veneer.formats.checkpoints`), and a read is one
request for what lies between that and the one behind it. Where none are known they are noted on the way, and
live as long as the process. zstd has none: there only reading on is cheap, and reading back begins anew at the
layer's start, which is slow, and right.

Memory: the checkpoints of a layer; of decompressors that are not at rest, at most :data:`_MOST_CURSORS` in a
process.

Nothing is verified here: the store compares what comes with the digests that the device's spans have had
since the whole of it was proven.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from veneer.codec.boundaries import BoundaryFinder
from veneer.codec.deflate import Checkpoint
from veneer.errors import IntegrityError
from veneer.formats.checkpoints import CheckpointTable, spacing_of
from veneer.formats.decompress import gunzip, plain_pieces
from veneer.source.base import BlobSource

__all__ = ["ReplayedBlob"]

#: Stored bytes of the first request of a read whose end is not known, and of the last ones: it doubles.
_FIRST_STEP, _LAST_STEP = 512 << 10, 4 << 20
#: Decompressors that are kept for reading on; one of zstd may hold 128 MiB.
_MOST_CURSORS = 2
#: Plain bytes in one piece of a stream.
_STREAM_STEP = 4 << 20


class ReplayedBlob:
    """A :class:`~veneer.source.base.BlobSource` of the plain bytes of ``blob``. May be used by many tasks.

    Args:
        blob: the stored layer.
        compression: of it.
        size: of its plain bytes.
        load: gives its checkpoints, when they are needed first; may block.
    """

    #: The decompressors of all layers, with what each gave too early; the one that was used last is at the end.
    _cursors: ClassVar["OrderedDict[ReplayedBlob, _Cursor]"] = OrderedDict()

    def __init__(
        self,
        blob: BlobSource,
        compression: str,
        size: int,
        load: Callable[[], CheckpointTable] = CheckpointTable,
    ) -> None:
        self._blob = blob
        self._compression = compression
        self._size = size
        self._load = load
        self._table: CheckpointTable | None = None
        self._kept = False
        self._reading = trio.Lock()

    @property
    def name(self) -> str:
        """Of the blob."""
        return self._blob.name

    @property
    def size(self) -> int:
        """Plain bytes."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Plain bytes; see :class:`~veneer.source.base.BlobSource`."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise IntegrityError(
                f"{self.name}: range {offset}+{length} is outside the {self._size} plain bytes"
            )
        async with self._reading:
            # A failure leaves none: nobody can go on where it happened.
            last = self._cursors.pop(self, None)
            cursor, data = await trio.to_thread.run_sync(self._read, last, offset, length)
            self._cursors[self] = cursor
            while len(self._cursors) > _MOST_CURSORS:
                self._cursors.popitem(last=False)
            return data

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The plain bytes of a range in order."""
        end = self._size if length is None else offset + length

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(offset, end, _STREAM_STEP):
                yield await self.read(start, min(_STREAM_STEP, end - start))

        yield chunks()

    def _read(self, last: "_Cursor | None", offset: int, length: int) -> "tuple[_Cursor, bytes]":
        """In a thread."""
        if self._table is None:
            self._table = self._load() if self._compression == "gzip" else CheckpointTable()
            self._kept = len(self._table) > 0
        point = self._table.before(offset)
        place = point.offset if point is not None else 0
        cursor = last if last is not None and place <= last.start <= offset else self._begin(point)
        # Behind the last of those that were kept only the end is known.
        end = self._blob.size if self._kept else None
        cursor.stored.until = self._table.stored_end(offset + length, end)
        return cursor, cursor.read(offset, length)

    def _begin(self, point: Checkpoint | None) -> "_Cursor":
        stored = _Stored(self._blob, 0 if point is None else point.stored_offset)
        what, start = f"layer {self.name}", 0 if point is None else point.offset
        if self._compression != "gzip" or self._table is None:
            return _Cursor(stored, plain_pieces(stored.read, self._compression, what), start, what)
        finder = BoundaryFinder(spacing_of(self._blob.size), self._table.add, start)
        return _Cursor(stored, gunzip(stored.read, what, finder=finder, start=point), start, what)


class _Cursor:
    """A decompressor, and plain bytes that it gave and nobody has asked for: ``rest``, from ``start`` on."""

    def __init__(self, stored: "_Stored", pieces: Iterator[bytes], start: int, what: str) -> None:
        self.stored = stored
        self.start = start
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._what = what

    def read(self, offset: int, length: int) -> bytes:
        """Plain bytes of the range, which begins here or further on."""
        out = bytearray()
        while len(out) < length:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    raise IntegrityError(f"{self._what} has only {self.start} plain bytes")
            skip = min(len(self._rest), max(0, offset - self.start))
            taken = self._rest[skip : skip + length - len(out)]
            out += taken
            self._rest = self._rest[skip + len(taken) :]
            self.start += skip + len(taken)
        return bytes(out)


class _Stored:
    """The stored bytes, one after the other. For threads of the blob's trio loop.

    Attributes:
        until: where those end that are needed now, if that is known.
    """

    def __init__(self, blob: BlobSource, place: int) -> None:
        self.until: int | None = None
        self._blob = blob
        self._place = place
        self._held = memoryview(b"")
        self._step = _FIRST_STEP

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; ``b""`` at the end."""
        if not self._held:
            length = self._step
            if self.until is not None and self.until > self._place:
                length = min(self.until - self._place, _LAST_STEP)
            else:
                self._step = min(2 * self._step, _LAST_STEP)
            length = min(length, self._blob.size - self._place)
            if length <= 0:
                return b""
            self._held = memoryview(trio.from_thread.run(self._blob.read, self._place, length))
            self._place += length
        taken, self._held = self._held[:size], self._held[size:]
        return bytes(taken)
