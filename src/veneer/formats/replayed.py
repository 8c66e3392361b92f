"""A compressed layer read by the place of its plain bytes, for what the cache has lost of a streamed one.

Its index knows no place to begin at but the layer's start, so the first read decompresses from there. On the
way the state of the decompressor is kept every few megabytes; later reads begin at the state before them and
need a range of the layer instead of its beginning. States live as long as the process. Those of zstd cannot
be kept: there only reading on is cheap, and reading back begins anew. All of that is slow, and right.

Memory: :data:`_MOST_MARKS` states of some 50 KB a layer; of decompressors that are not at rest, at most
:data:`_MOST_CURSORS` in a process.

Nothing is verified here: the store compares what comes with the digests that the device's spans have had
since the whole of it was proven.
"""

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Protocol

import trio

from veneer.errors import IntegrityError
from veneer.formats.decompress import PIECE_SIZE, plain_pieces
from veneer.source.base import BlobSource

__all__ = ["ReplayedBlob"]

#: Stored bytes of the first request of a read, and of the last ones when it goes on: it doubles.
_FIRST_STEP, _LAST_STEP = 512 << 10, 4 << 20
#: zlib copies what follows a member each time one ends; short inputs keep many short members cheap.
_GZIP_INPUT = 16 << 10
#: States that are kept of a layer, and plain bytes between them at least.
_MOST_MARKS, _LEAST_SPACING = 64, 4 << 20
#: Decompressors that are kept for reading on; one of zstd may hold 128 MiB.
_MOST_CURSORS = 2
#: Plain bytes in one piece of a stream.
_STREAM_STEP = 4 << 20


class _Decoder(Protocol):
    """A decompressor somewhere in a layer. For one thread at a time.

    Attributes:
        position: of the next plain byte.
    """

    position: int

    def next(self) -> bytes:
        """The next plain bytes; ``b""`` at the end. Raises VeneerError."""

    def copy(self) -> "_Decoder | None":
        """Another one in the same state, if such a thing can be had."""


class ReplayedBlob:
    """A :class:`~veneer.source.base.BlobSource` of the plain bytes of ``blob``. May be used by many tasks.

    Args:
        blob: the stored layer.
        compression: of it.
        size: of its plain bytes.
    """

    #: The decompressors of all layers, with what each gave too early; the one that was used last is at the end.
    _cursors: ClassVar["OrderedDict[ReplayedBlob, _Cursor]"] = OrderedDict()

    def __init__(self, blob: BlobSource, compression: str, size: int) -> None:
        self._blob = blob
        self._compression = compression
        self._size = size
        self._reading = trio.Lock()
        # Ascending; the first is at the layer's start.
        self._marks: list[_Decoder] = []
        self._spacing = max(_LEAST_SPACING, -(-size // _MOST_MARKS))

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
            cursor = self._cursor(offset, self._cursors.pop(self, None))
            data = await trio.to_thread.run_sync(self._advance, cursor, offset, length)
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

    def _cursor(self, offset: int, last: "_Cursor | None") -> "_Cursor":
        """Where to begin to read at ``offset``."""
        number = bisect_right(self._marks, offset, key=lambda mark: mark.position) - 1
        mark = self._marks[number].copy() if number >= 0 else None
        if last is not None and last.start <= offset and (mark is None or mark.position <= last.start):
            return last
        return _Cursor(mark or self._beginning())

    def _beginning(self) -> _Decoder:
        stored = _Stored(self._blob)
        if self._compression == "gzip":
            return _Gzip(stored, self.name)
        return _Other(stored, self._compression, self.name)

    def _advance(self, cursor: "_Cursor", offset: int, length: int) -> bytes:
        out = bytearray()
        while len(out) < length:
            if not cursor.rest:
                self._mark(cursor.decoder)
                cursor.start = cursor.decoder.position
                cursor.rest = memoryview(cursor.decoder.next())
                if not cursor.rest:
                    raise IntegrityError(f"layer {self.name} has only {cursor.start} plain bytes")
            skip = min(len(cursor.rest), max(0, offset - cursor.start))
            taken = cursor.rest[skip : skip + length - len(out)]
            out += taken
            cursor.rest = cursor.rest[skip + len(taken) :]
            cursor.start += skip + len(taken)
        return bytes(out)

    def _mark(self, decoder: _Decoder) -> None:
        last = self._marks[-1].position if self._marks else -self._spacing
        if decoder.position - last >= self._spacing and (copy := decoder.copy()) is not None:
            self._marks.append(copy)


class _Cursor:
    """A decoder, and plain bytes that it gave and nobody has asked for: ``rest``, from ``start`` on."""

    def __init__(self, decoder: _Decoder) -> None:
        self.decoder = decoder
        self.start = decoder.position
        self.rest = memoryview(b"")


class _Stored:
    """The stored bytes by offset, mostly one after the other. For threads of the blob's trio loop."""

    def __init__(self, blob: BlobSource) -> None:
        self._blob = blob
        self._start = 0
        self._held = b""
        self._step = _FIRST_STEP

    def read(self, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; ``b""`` at the end."""
        at = offset - self._start
        if not 0 <= at < len(self._held):
            length = min(self._step, self._blob.size - offset)
            if length <= 0:
                return b""
            self._held = trio.from_thread.run(self._blob.read, offset, length)
            self._start, at = offset, 0
            self._step = min(2 * self._step, _LAST_STEP)
        return self._held[at : at + size]


class _Gzip:
    """Members of gzip, by zlib: it is the decompressor whose state can be copied."""

    def __init__(self, stored: _Stored, name: str) -> None:
        self.position = 0
        self._stored = stored
        self._name = name
        self._place = 0  # of what has not been read of the stored bytes
        self._pending = b""
        self._member = zlib.decompressobj(wbits=31)

    def next(self) -> bytes:
        """The next plain bytes."""
        while True:
            if not self._pending:
                self._pending = self._stored.read(self._place, _GZIP_INPUT)
                self._place += len(self._pending)
                if not self._pending:
                    return b""
            if self._member.eof:
                self._member = zlib.decompressobj(wbits=31)
            try:
                plain = self._member.decompress(self._pending, PIECE_SIZE)
            except zlib.error as error:
                raise IntegrityError(f"layer {self._name}: malformed gzip stream: {error}") from error
            self._pending = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if plain:
                self.position += len(plain)
                return plain

    def copy(self) -> "_Gzip":
        """Another one in the same state, with stored bytes of its own."""
        other = _Gzip(_Stored(self._stored._blob), self._name)
        other.position, other._place, other._pending = self.position, self._place, self._pending
        other._member = self._member.copy()
        return other


class _Other:
    """A stream whose state cannot be copied."""

    def __init__(self, stored: _Stored, compression: str, name: str) -> None:
        self.position = 0
        self._stored = stored
        self._place = 0
        self._pieces = plain_pieces(self._read, compression, f"layer {name}")

    def next(self) -> bytes:
        """The next plain bytes."""
        piece = next(self._pieces, b"")
        self.position += len(piece)
        return piece

    def copy(self) -> None:
        """There is none."""

    def _read(self, size: int) -> bytes:
        data = self._stored.read(self._place, size)
        self._place += len(data)
        return data
