"""A blob whose first bytes are asked for before anybody knows which of them are wanted.

What says how a pack is cut is a blob of its own, and a round trip earlier the pack's blob is known as well. So
both are asked for at once, and the ranges that are read first are served from what is on its way. It is given
away once: whoever asks again for a range, because the bytes were wrong for instance, gets it from the source.

In memory is at most what is fetched ahead, until it has been read or the image is closed.
"""

from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import trio

from veneer.errors import IntegrityError, VeneerError
from veneer.source.base import BlobSource

__all__ = ["AHEAD", "AheadBlob"]

#: The packs of most images, and a third of a second at 200 Mb/s.
AHEAD = 8 << 20


class AheadBlob:
    """A :class:`~veneer.source.base.BlobSource` in front of another one. Used by tasks of one trio run.

    Args:
        source: has all of the blob.
    """

    def __init__(self, source: BlobSource) -> None:
        self._source = source
        self._limit = min(source.size, AHEAD)
        # What has arrived from the beginning on, and where each piece of it ends.
        self._pieces: list[bytes] = []
        self._ends: list[int] = []
        self._given: list[tuple[int, int]] = []
        self._unread = self._limit
        self._ended = False
        self._news = trio.lowlevel.ParkingLot()

    @property
    def name(self) -> str:
        """That of the source, told apart: how long these reads take says nothing about the way to it."""
        return f"ahead:{self._source.name}"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._source.size

    async def fetch(self) -> None:
        """Ask for the first bytes. What fails is left to whoever reads them."""
        try:
            async with self._source.stream(0, self._limit) as chunks:
                async for chunk in chunks:
                    self._pieces.append(chunk)
                    self._ends.append(len(chunk) + (self._ends[-1] if self._ends else 0))
                    self._news.unpark_all()
        except VeneerError:
            pass  # the reader asks again, and is told
        finally:
            self._ended = True
            self._news.unpark_all()

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` unverified bytes from ``offset``; see :class:`~veneer.source.base.BlobSource`."""
        data = bytearray()
        async with self.stream(offset, length) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > length:
                    break
        if len(data) != length:
            raise IntegrityError(f"{self.name}: got {len(data)} of {length} bytes at {offset}")
        return bytes(data)

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The unverified bytes of a range as they arrive; see :class:`~veneer.source.base.BlobSource`."""
        end = self.size if length is None else offset + length
        if self._takes(offset, end):
            async with aclosing(self._arriving(offset, end)) as chunks:
                yield chunks
        else:
            async with self._source.stream(offset, length) as chunks:
                yield chunks

    def _takes(self, offset: int, end: int) -> bool:
        """Whether the range is given from what is fetched ahead, and then not a second time."""
        if not 0 <= offset < end <= self._limit or any(
            offset < past and start < end for start, past in self._given
        ):
            return False
        self._given.append((offset, end))
        return True

    def _piece(self, place: int, end: int) -> bytes:
        """What there is from ``place`` on, at most to ``end``: a byte, at least. Raises IntegrityError."""
        number = bisect_right(self._ends, place)
        piece = self._pieces[number]
        begin = self._ends[number] - len(piece)
        chunk = piece[place - begin : end - begin] if begin <= place else b""
        if not chunk:
            raise IntegrityError(f"{self.name}: what was fetched ahead has no byte at {place}")
        return chunk

    async def _arriving(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        place = start
        while place < end:
            if self._ends and place < self._ends[-1]:
                chunk = self._piece(place, end)
                place += len(chunk)
                yield chunk
            elif self._ended:
                async with self._source.stream(place, end - place) as chunks:
                    async for chunk in chunks:
                        place += len(chunk)
                        yield chunk
                break
            else:
                await self._news.park()
        self._unread -= end - start
        if not self._unread:
            self._pieces, self._ends = [], []
