"""One range request: its spans are handed over as their bytes arrive, not when the last of them has.

A long range is worth asking for because it costs one round trip; a reader of its first span must not wait for
its last one. A request holds at most the bytes of its range.

Not here: which range to ask for, and what an error means for its spans (:mod:`veneer.store.fetch`).
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from itertools import takewhile
from typing import TypeVar

import trio

from veneer.errors import IntegrityError, Unavailable, VeneerError
from veneer.index.model import SpanTable
from veneer.source.base import BlobSource
from veneer.store.link import LinkEstimate
from veneer.store.stats import StoreStats
from veneer.timing import DeviceRanges, timed_range

__all__ = ["Priority", "Settle", "SpanJob", "Transfer"]

T = TypeVar("T")

#: A request is given up when it is slower than this beyond its deadline: the transport has finer time-outs.
_LEAST_RATE = 32 << 10
#: Plain bytes that are handed over together when nobody waits for them: a hop to a thread costs as much as
#: hashing 64 KiB, and more than this at a time would keep a reader who comes meanwhile waiting.
_BATCH = 1 << 20
#: The same of what may well never be waited for.
_BULK_BATCH = 2 << 20


class Priority(IntEnum):
    """Who wants a span; lower goes first."""

    DEMAND = 0
    PROFILE = 1
    #: Parts of layers that are downloaded whole (:mod:`veneer.store.incoming`).
    STREAM = 2
    READAHEAD = 3
    COMPLETION = 4
    #: What is fetched because most of the device seems to be wanted (:mod:`veneer.store.bulk`).
    BULK = 5


class SpanJob:
    """The fetch of one span. Belongs to the store, not to its first reader.

    Args:
        number: which span.
        priority: of the most urgent reader so far.
    """

    __slots__ = (
        "attempts",
        "done",
        "error",
        "number",
        "plain",
        "priority",
        "queued",
        "replaced",
        "setback",
        "waiters",
        "wanted",
    )

    def __init__(self, number: int, priority: Priority) -> None:
        self.number = number
        self.priority = priority
        self.queued = time.monotonic()
        #: Readers that wait; nobody may wait for a job that was read ahead.
        self.waiters = 0
        #: Those who want it to come, and are in no hurry (:mod:`veneer.store.wanted`).
        self.wanted = 0
        #: Set at the end, when either ``plain`` or ``error`` is there.
        self.done = trio.Event()
        self.plain: bytes | None = None
        self.error: VeneerError | None = None
        #: The latest error that was not the end.
        self.setback: VeneerError | None = None
        self.attempts = 0
        #: Whether its bytes are being made of those of other devices.
        self.replaced = False

    def finish(self, plain: bytes | None, error: VeneerError | None = None) -> None:
        """Give the readers their bytes or their error; what comes first counts."""
        if not self.done.is_set():
            self.plain, self.error = plain, error
            self.done.set()


#: Gets jobs in ascending order, the blob offset of the bytes, and the bytes.
Settle = Callable[[Sequence[SpanJob], int, bytes], Awaitable[None]]


class Transfer:
    """The request for the range of ``jobs``, which are in ascending order. Runs once, in one task.

    Args:
        jobs: those whose bytes came are taken off its front, so that after an error the others are left.
        source: where the range is read.
        spans: how the blob is cut.
        link: told of the request.
        stats: where the request is counted.
        deadline_s: after which a source that gives nothing counts as stalled.
        settle: gets what has arrived, at once when a demand waits for it.
        ranges: notes when what happened.
    """

    def __init__(
        self,
        jobs: deque[SpanJob],
        source: BlobSource,
        spans: SpanTable,
        *,
        link: LinkEstimate,
        stats: StoreStats,
        deadline_s: float,
        settle: Settle,
        ranges: DeviceRanges,
    ) -> None:
        self._jobs = jobs
        self._source = source
        self._spans = spans
        self._link = link
        self._stats = stats
        self._settle = settle
        self._offset = spans.stored_offsets[jobs[0].number]
        self._length = self._end_of(jobs[-1]) - self._offset
        first, last = jobs[0].number, jobs[-1].number
        self._times = ranges.sent(
            self._offset,
            self._length,
            (spans.starts[first], spans.starts[last + 1] - spans.starts[first]),
            spans=len(jobs),
            priority=min(job.priority for job in jobs).name.lower(),
            queued=min(job.queued for job in jobs),
        )
        self._patience_s = deadline_s + self._length / _LEAST_RATE
        self._waited_s = 0.0
        #: When the first of several pieces came.
        self._first_s: float | None = None
        self._first_length = 0
        # What has arrived and is not settled yet: the bytes from _base to _reached.
        self._held: deque[memoryview] = deque()
        self._base = self._reached = self._offset
        self._ended = False
        self._news = trio.lowlevel.ParkingLot()

    @property
    def received(self) -> int:
        """Bytes that have come."""
        return self._reached - self._offset

    async def run(self) -> None:
        """Fetch and settle. Raises VeneerError, once everything that came before is settled."""
        link, demand = self._link, any(job.priority is Priority.DEMAND for job in self._jobs)
        self._stats.requests += 1
        timed_range.set(self._times)
        running = link.begin(demand=demand)
        error: VeneerError | None = None
        # Bytes are taken as fast as they come: a server that has to wait at every write costs both sides time.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._settle_arrived)
            try:
                await self._receive()
            except VeneerError as caught:
                error = caught  # the nursery must not cancel the settling of what came before
            finally:
                running += link.end(demand=demand)
                self._ended = True
                self._news.unpark_all()
        if error is not None:
            self._times.error = error.message
            raise error
        link.observe(
            self._length,
            self._waited_s,
            running / 2,
            first_s=self._first_s,
            first_length=self._first_length,
        )

    async def _receive(self) -> None:
        if len(self._jobs) == 1:
            self._take(await self._within(self._source.read(self._offset, self._length)))
        else:
            async with self._source.stream(self._offset, self._length) as chunks:
                while (chunk := await self._within(anext(chunks, None))) is not None:
                    self._take(chunk)
        self._check(self._reached, whole=True)

    async def _within(self, answer: Awaitable[T]) -> T:
        """Wait for the source, as long as there is patience left: settling is not its fault."""
        began = trio.current_time()
        with trio.move_on_at(began + self._patience_s - self._waited_s) as scope:
            result = await answer
        self._waited_s += trio.current_time() - began
        if scope.cancelled_caught:
            what = f"bytes {self._offset}+{self._length}"
            raise Unavailable(f"{self._source.name}: {what} did not arrive in time")
        return result

    def _take(self, chunk: bytes) -> None:
        self._stats.bytes_fetched += len(chunk)
        self._check(self._reached + len(chunk), whole=False)
        if self._reached == self._offset and len(chunk) < self._length:
            self._first_s, self._first_length = self._waited_s, len(chunk)
        self._held.append(memoryview(chunk))
        self._reached += len(chunk)
        self._times.came()
        self._news.unpark_all()

    def _check(self, reached: int, *, whole: bool) -> None:
        got = reached - self._offset
        if got > self._length or (whole and got < self._length):
            what = f"got {got} of {self._length} bytes at {self._offset}"
            raise IntegrityError(f"{self._source.name}: {what}")

    def _whole(self) -> list[SpanJob]:
        """The jobs all of whose bytes are here."""
        return list(takewhile(lambda job: self._end_of(job) <= self._reached, self._jobs))

    async def _settle_arrived(self) -> None:
        while True:
            jobs = self._whole()
            if jobs and (self._ended or self._is_due(jobs)):
                for _ in jobs:
                    self._jobs.popleft()
                base, data = self._base, self._taken(self._end_of(jobs[-1]))
                began = time.monotonic()
                await self._settle(jobs, base, data)
                self._times.settled(began)
            elif self._ended:
                return
            else:
                await self._news.park()

    def _taken(self, end: int) -> bytes:
        """What has arrived up to ``end``, which is not held any more."""
        held, pieces, left = self._held, list[memoryview](), end - self._base
        while left:
            piece = held.popleft()
            if len(piece) > left:
                held.appendleft(piece[left:])
                piece = piece[:left]
            pieces.append(piece)
            left -= len(piece)
        self._base = end
        return b"".join(pieces)

    def _is_due(self, jobs: Sequence[SpanJob]) -> bool:
        starts = self._spans.starts
        batch = _BULK_BATCH if jobs[0].priority >= Priority.COMPLETION else _BATCH
        return starts[jobs[-1].number + 1] - starts[jobs[0].number] >= batch or any(
            job.waiters and job.priority is Priority.DEMAND for job in jobs
        )

    def _end_of(self, job: SpanJob) -> int:
        return self._spans.stored_offsets[job.number] + self._spans.stored_lengths[job.number]
