"""A whole blob in order, fetched in ranges over several connections.

One connection rarely fills a link with a long round trip, and what comes first has to wait for nobody. So the
first request is for the whole blob, which every registry and cache can answer; others fetch parts further on
meanwhile, and the first ends where theirs begin. A registry that cannot do ranges refuses those, and the
first goes on to the end.

Invariant: bytes come out once each and in order; at most :data:`_WINDOW` parts are held that were not taken
yet. Nothing is verified here. Faults of connections are the blob's business, which goes on where they
happened.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from veneer.errors import RegistryError
from veneer.source.base import BlobSource
from veneer.source.tasks import open_nursery

__all__ = ["LANES", "PART_SIZE", "Download", "open_download"]

#: Connections for one blob: with fewer, a lost packet or a slow server stops everything.
LANES = 4
#: Bytes of a part: enough that a round trip is small beside it.
PART_SIZE = 4 << 20
#: Parts that may be on their way or waiting to be taken.
_WINDOW = 6
#: The first connection has this head start before others fetch what it would come to: far enough for a registry
#: without ranges to be noticed at the first request, rather than by what it sends.
_HEAD_START = 3
#: Bytes that are worth waking the thread that takes them; on a slow link they come in chunks of a few KiB.
_LEAST_TAKEN = 128 << 10
#: How a registry without ranges answers when asked for one.
_WHOLE_BLOB = 200


@dataclass(slots=True, eq=False)
class _Part:
    """A range of the blob.

    Args:
        start: where it begins.
        end: where the next one does.
        chunks: what has come and was not taken.
        place: where what has not come yet begins.
        claimed: somebody fetches it.
        held: bytes of ``chunks``.
    """

    start: int
    end: int
    place: int
    chunks: list[bytes] = field(default_factory=list)
    claimed: bool = False
    held: int = 0

    @property
    def worth_taking(self) -> bool:
        return self.held >= _LEAST_TAKEN or self.done

    @property
    def done(self) -> bool:
        return self.place == self.end


class Download:
    """One blob on its way. Made by :func:`open_download`; one task takes, in the same event loop.

    Attributes:
        received: bytes that have come.
    """

    def __init__(self, blob: BlobSource, lanes: int) -> None:
        self.received = 0
        self._blob = blob
        self._lanes = lanes
        starts = range(0, blob.size, PART_SIZE)
        self._parts = [_Part(start, min(start + PART_SIZE, blob.size), start) for start in starts]
        self._taken = 0  # parts that have been taken as a whole
        self._unclaimed = len(self._parts)
        self._changed = trio.lowlevel.ParkingLot()
        self._ranges = True
        # Number of the part that the request without an end has come to; none when there is no such request.
        self._sequential: int | None = 0

    async def take(self) -> list[bytes]:
        """The next bytes, at least one; an empty list at the end of the blob."""
        while self._taken < len(self._parts):
            part = self._parts[self._taken]
            if part.chunks and part.worth_taking:
                chunks, part.chunks, part.held = part.chunks, [], 0
                self._leave(part)
                return chunks
            if part.done:
                self._leave(part)
                continue
            await self._changed.park()
        await trio.lowlevel.checkpoint()
        return []

    def _leave(self, part: _Part) -> None:
        if part.done:
            self._taken += 1
            self._changed.unpark_all()

    async def run(self) -> None:
        """Fetch all of it. Raises what the blob does."""
        async with open_nursery() as nursery:
            for lane in range(min(self._lanes, max(1, len(self._parts) - _HEAD_START + 1))):
                nursery.start_soon(self._lane, lane == 0)

    async def _lane(self, sequential: bool) -> None:
        while (number := await self._next(sequential)) is not None:
            try:
                await (self._follow(number) if sequential else self._fetch(self._parts[number]))
            except RegistryError as error:
                if sequential or error.status != _WHOLE_BLOB:
                    raise
                self._ranges = False
                self._parts[number].claimed = False
                self._unclaimed += 1
                sequential = self._sequential is None
                self._sequential = number if sequential else self._sequential
                self._changed.unpark_all()
            else:
                sequential = not self._ranges

    async def _next(self, sequential: bool) -> int | None:
        """Claim the first part that nobody fetches, once there is room; None when no work is left."""
        while True:
            behind = self._sequential is not None and not sequential
            if not self._unclaimed or (behind and not self._ranges):
                return None
            first = max(self._taken, (self._sequential or 0) + _HEAD_START if behind else 0)
            for number in range(first, min(len(self._parts), self._taken + _WINDOW)):
                if not self._parts[number].claimed:
                    self._claim(number)
                    if sequential:
                        self._sequential = number
                    return number
            await self._changed.park()

    def _claim(self, number: int) -> None:
        self._parts[number].claimed = True
        self._unclaimed -= 1

    async def _fetch(self, part: _Part) -> None:
        async with self._blob.stream(part.place, part.end - part.place) as chunks:
            async for chunk in chunks:
                self._add(part, chunk)

    async def _follow(self, number: int) -> None:
        """Fetch from a part on to the end, or to a part that somebody else fetches."""
        try:
            async with self._blob.stream(self._parts[number].place) as chunks:
                async for chunk in chunks:
                    while chunk:
                        part = self._parts[number]
                        self._sequential = number
                        piece = chunk[: part.end - part.place]
                        chunk = chunk[len(piece) :]
                        self._add(part, piece)
                        if not part.done:
                            continue
                        number += 1
                        if not await self._may_enter(number):
                            return
        finally:
            self._sequential = None
            self._changed.unpark_all()

    async def _may_enter(self, number: int) -> bool:
        """Claim the part that comes next for the connection that is there, and wait until there is room."""
        if number == len(self._parts) or self._parts[number].claimed:
            return False
        self._claim(number)
        self._sequential = number
        self._changed.unpark_all()
        while number >= self._taken + _WINDOW:
            if not self._ranges and not all(part.claimed for part in self._parts[self._taken : number]):
                # Left by a request that was refused, and nobody but us can fetch it.
                self._parts[number].claimed = False
                self._unclaimed += 1
                return False
            await self._changed.park()
        return True

    def _add(self, part: _Part, chunk: bytes) -> None:
        part.chunks.append(chunk)
        part.place += len(chunk)
        part.held += len(chunk)
        self.received += len(chunk)
        if part.worth_taking and (self._parts[self._taken] is part or part.done):
            self._changed.unpark_all()


@asynccontextmanager
async def open_download(blob: BlobSource, *, lanes: int = LANES) -> AsyncIterator[Download]:
    """Fetch a blob while the context lasts; what was not taken by its end is given up.

    Args:
        blob: what to fetch.
        lanes: connections at a time.

    Raises:
        VeneerError: what the blob raises; whoever takes is cancelled then.
    """
    download = Download(blob, lanes)
    async with open_nursery() as nursery:
        nursery.start_soon(download.run)
        yield download
        nursery.cancel_scope.cancel()
