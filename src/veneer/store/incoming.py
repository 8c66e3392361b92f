"""Layers that are downloaded as a whole, as the link that they come over sees them.

Their requests take turns with those for spans (:mod:`veneer.store.turns`), and are noted in the same log. Only
the request that each download begins with does not wait for its turn, and takes none: it may have to wait for
the decompressor, and must not keep others of the image from what that is waiting for. Requests for parts end
by themselves.

Not here: which parts to ask for (:mod:`veneer.source.parallel`).
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self

import trio

from veneer.errors import VeneerError
from veneer.source.base import BlobSource
from veneer.store.transfer import Priority
from veneer.store.turns import Turns
from veneer.timing import DeviceRanges, RangeTimes, timed_range

__all__ = ["IncomingBlob"]


class IncomingBlob:
    """A :class:`~veneer.source.base.BlobSource` that is downloaded once. Used from the store's own thread only.

    Args:
        blob: what is downloaded.
        turns: of the link that it comes over.
        ranges: notes when what happened.
    """

    def __init__(self, blob: BlobSource, turns: Turns, ranges: DeviceRanges) -> None:
        self.turns = turns
        self.image = blob.name.partition("@")[0]
        self._blob = blob
        self._ranges = ranges
        self._waiting: deque[trio.Event] = deque()
        self._times: list[RangeTimes] = []

    @property
    def name(self) -> str:
        """Of the blob."""
        return self._blob.name

    @property
    def size(self) -> int:
        """Of the blob."""
        return self._blob.size

    async def read(self, offset: int, length: int) -> bytes:
        """A range as a whole."""
        async with self.stream(offset, length) as chunks:
            return b"".join([chunk async for chunk in chunks])

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """A range in chunks, once it is its turn; without a length at once."""
        queued = time.monotonic()
        if length is None:
            self.turns.requests[Priority.STREAM] += 1
            async with self._noted(offset, None, queued) as chunks:
                yield chunks
            return
        await self._turn()
        try:
            async with self._noted(offset, length, queued) as chunks:
                yield chunks
        finally:
            self.turns.ended(self, Priority.STREAM)

    def proven(self) -> None:
        """Tell that all of it has come and is what it should be."""
        now = time.monotonic()
        for times in self._times:
            if times.last_byte is not None:
                times.ready = now

    def head(self) -> Priority | None:
        """See :class:`~veneer.store.turns.Queue`."""
        return Priority.STREAM if self._waiting else None

    def begin(self) -> None:
        """See :class:`~veneer.store.turns.Queue`."""
        self.turns.began(self, Priority.STREAM)
        self._waiting.popleft().set()

    def queued(self) -> Mapping[Priority, int]:
        """See :class:`~veneer.store.turns.Queue`."""
        return {Priority.STREAM: len(self._waiting)}

    async def _turn(self) -> None:
        turn = trio.Event()
        self._waiting.append(turn)
        self.turns.want(self)
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():
                self.turns.ended(self, Priority.STREAM)
            else:
                self._waiting.remove(turn)
            raise

    @asynccontextmanager
    async def _noted(
        self, offset: int, length: int | None, queued: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        times = self._ranges.sent(offset, length or 0, (0, 0), spans=0, priority="stream", queued=queued)
        self._times.append(times)
        timed_range.set(times)
        try:
            async with self._blob.stream(offset, length) as chunks:
                yield _Counted(chunks, times, self.turns, to_the_end=length is None)
        except VeneerError as error:
            times.error = error.message
            raise


class _Counted:
    """Passes chunks on and notes them; ``to_the_end`` if the range ends where others have begun."""

    def __init__(
        self, chunks: AsyncIterator[bytes], times: RangeTimes, turns: Turns, *, to_the_end: bool
    ) -> None:
        self._chunks = chunks
        self._times = times
        self._turns = turns
        self._to_the_end = to_the_end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._chunks)
        self._turns.bytes[Priority.STREAM] += len(chunk)
        if self._to_the_end:
            self._times.length += len(chunk)
        self._times.came()
        return chunk
