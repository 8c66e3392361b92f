"""A compressed layer read by the place of its plain bytes, for what the cache has lost of a streamed one.

There is no checkpoint in it to begin at, so bytes come out of a decompressor that began at the layer's start,
and the decompressor is kept where it stopped: reading on is cheap, reading back begins again. That is slow,
and right; the store asks for whole stretches in order when much is missing. Memory is that of one
decompressor and one piece, and there are at most :data:`_MOST_CURSORS` decompressors in a process.

Nothing is verified here: the store compares what comes with the digests that the device's spans have had
since the whole of it was proven.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from veneer.errors import IntegrityError
from veneer.formats.decompress import plain_pieces
from veneer.source.base import BlobSource

__all__ = ["ReplayedBlob"]

#: Stored bytes of one request.
_STEP = 4 << 20
#: Decompressors that are kept for reading on; one of zstd may hold 128 MiB.
_MOST_CURSORS = 2


class ReplayedBlob:
    """A :class:`~veneer.source.base.BlobSource` of the plain bytes of ``blob``. May be used by many tasks.

    Args:
        blob: the stored layer.
        compression: of it.
        size: of its plain bytes.
    """

    #: The decompressors of all layers, the one that was used last at the end.
    _cursors: ClassVar["OrderedDict[ReplayedBlob, _Cursor]"] = OrderedDict()

    def __init__(self, blob: BlobSource, compression: str, size: int) -> None:
        self._blob = blob
        self._compression = compression
        self._size = size
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
            cursor = self._cursors.pop(self, None)
            if cursor is None or cursor.position > offset:
                cursor = _Cursor(self._blob, self._compression)
            data = await trio.to_thread.run_sync(cursor.read, offset, length)
            # A failure leaves none: where it happened, nobody can go on.
            self._cursors[self] = cursor
            while len(self._cursors) > _MOST_CURSORS:
                self._cursors.popitem(last=False)
            return data

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The plain bytes of a range in order."""
        end = self._size if length is None else offset + length

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(offset, end, _STEP):
                yield await self.read(start, min(_STEP, end - start))

        yield chunks()


class _Cursor:
    """A decompressor and where it is. For one thread at a time, whose trio loop is the blob's.

    Attributes:
        position: of the next plain byte.
    """

    def __init__(self, blob: BlobSource, compression: str) -> None:
        self.position = 0
        self._blob = blob
        self._stored = 0
        self._held = b""
        self._at = 0
        self._pieces: Iterator[bytes] = plain_pieces(self._read_stored, compression, f"layer {blob.name}")
        self._rest = memoryview(b"")

    def read(self, offset: int, length: int) -> bytes:
        """The plain bytes of a range that begins where we are, or later. Raises VeneerError."""
        out = bytearray()
        while len(out) < length:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    raise IntegrityError(f"layer {self._blob.name} has only {self.position} plain bytes")
                self._rest = memoryview(piece)
            skip = min(len(self._rest), max(0, offset - self.position))
            taken = self._rest[skip : skip + length - len(out)] if self.position + skip >= offset else b""
            out += taken
            self._rest = self._rest[skip + len(taken) :]
            self.position += skip + len(taken)
        return bytes(out)

    def _read_stored(self, size: int) -> bytes:
        if self._at == len(self._held):
            step = min(_STEP, self._blob.size - self._stored)
            if not step:
                return b""
            self._held, self._at = trio.from_thread.run(self._blob.read, self._stored, step), 0
            self._stored += step
        taken = self._held[self._at : self._at + size]
        self._at += len(taken)
        return taken
