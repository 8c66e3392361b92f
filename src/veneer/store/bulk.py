"""Fetch the rest of a device in the background once most of it is likely to be read.

A start reads some percent of an image, here and there; the rest would be fetched for nothing. A backup, a
scanner or ``cp -a`` reads everything, and should not wait for a request at every step. Readers do not say which
they are, so it is told from what was read of the device so far:

- a quarter of it, in whatever order: the rest is fetched;
- a sixteenth of it in long stretches (1 MiB on average, where most starts have less than half of that): as much
  is fetched as was read, so that a wrong guess costs at most what was wanted anyhow.

Who picks large libraries out of a large layer comes to such an average, too, when an eighth of it was read. So
stretches count as long only if there are few, or if one of them is half of what was read.

That takes 4 MiB that were read, at least. On a wide link, where a wrong guess keeps nobody waiting and a late
one does, a stretch of 1 MiB is reason enough; from a sixteenth on four times as much is fetched, and from an
eighth on the rest. A link that is not known to be wide gets one range before that sixteenth, which tells.

What is fetched is at least 4 MiB, and only when a reader has to wait, in long ranges and in the order
of the device from the latest miss on and round its end. They come after everything else that is queued, and few
at a time; on a link where a range takes its time, one at a time and only while no reader waits for a request.

Bulk stops when nobody has read from the device for a moment, when the source fails, and when the cache is full:
it never makes anything be evicted. The next miss lets it go on, after a failure only if another request has
succeeded since.

Who wants all of a device whatever is read of it (:meth:`Bulk.whole`) gets it in the same way, but while readers
wait for nothing else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from veneer.errors import IntegrityError
from veneer.index.model import SpanTable
from veneer.store.fetch import FetchQueue
from veneer.store.stats import StoreStats
from veneer.store.transfer import SpanJob

__all__ = ["Bulk", "Holder"]

#: Less than this tells nothing when it was read, and is not worth a run of its own.
_LEAST = 4 << 20
#: Shares of a device: read in any order, and read in long stretches.
_LARGE_SHARE, _SMALL_SHARE = 1 / 4, 1 / 16
#: On a wide link, of long stretches: the share that is reason for all, and how much is fetched for less.
_WIDE_SHARE, _WIDE_TIMES = 1 / 8, 4
#: What tells something there. It is a single stretch, then.
_WIDE_LEAST = 1 << 20
#: Average length of stretches that are called long.
_STRETCH = 1 << 20
#: So many may be readers side by side. Where there are more, one has to have this part of what was read.
_FEW_STRETCHES, _MAIN_STRETCH = 8, 1 / 2
#: Readers that pause for so long may have ended.
_IDLE_S = 2.0
#: Ranges at a time on a wide link: one is on its way while two are verified and written.
_LANES = 3


class Holder(Protocol):
    """What bulk has to know of the place where spans are kept."""

    def held(self) -> bytearray:
        """One byte a span: 0 if it has a place on the disk and is not there."""

    def is_held(self, number: int) -> bool:
        """The same of one span."""

    def has_room(self, length: int) -> bool:
        """Whether so many bytes can be written without evicting others."""


class Bulk:
    """The bulk reading of one device. Used from the store's own thread only.

    Args:
        spans: of the device.
        holder: what it has of them.
        queue: where its jobs go.
        start: makes jobs of the lowest priority.
        came: called when a range has come of a device all of which is being fetched.
        nursery: owns the task that feeds the queue.
        stats: where it is counted.
    """

    def __init__(
        self,
        spans: SpanTable,
        holder: Holder,
        queue: FetchQueue,
        start: Callable[[Sequence[int]], list[SpanJob]],
        *,
        came: Callable[[], None],
        nursery: trio.Nursery,
        stats: StoreStats,
    ) -> None:
        self._spans = spans
        self._holder = holder
        self._queue = queue
        self._start = start
        self._came = came
        self._nursery = nursery
        self._stats = stats
        #: Whether reads are of interest: not those of a device that is all there.
        self.watching = 0 in holder.held()
        # What was read; by span, from 1 on, so that every one has two neighbours.
        self._read = bytearray(len(spans) + 2)
        self._read_bytes = self._stretches = self._longest = self._reads = 0
        # Plain bytes that bulk has asked for, those of them that have not all come, and spans that are wrong.
        self._asked = self._pending = 0
        self._wrong: set[int] = set()
        # Of the present run: spans that are dealt with, and where it goes on.
        self._done = bytearray()
        self._place = 0
        self._running = self._paused = self._failed = False
        #: Whether all of the device is wanted, whoever reads.
        self._whole = False

    def note(self, offset: int, length: int) -> None:
        """A reader asks for this range, which may be there already."""
        self._reads += 1
        read, starts = self._read, self._spans.starts
        for number in self._spans.covering(offset, length):
            if not read[number + 1]:
                read[number + 1] = 1
                self._read_bytes += starts[number + 1] - starts[number]
                self._stretches += 1 - read[number] - read[number + 2]
                first, past = read.rfind(0, 0, number + 1), read.find(0, number + 1) - 1
                self._longest = max(self._longest, starts[past] - starts[first])
        if self._paused and self._may_begin():
            self._begin()

    def missed(self, number: int) -> None:
        """A reader has to wait for a span that nobody had asked for."""
        self.watching = True
        self._place = number
        if self._may_begin():
            self._begin()

    @property
    def takes_all(self) -> bool:
        """Whether all that is missing is being fetched."""
        return self._running and math.isinf(self._room())

    async def whole(self) -> None:
        """Fetch all that is missing, and return when no more can be done now: not all of it may be there."""
        link = self._queue.link
        self._whole = True
        self._wrong.clear()
        try:
            if not self._running:
                self._running, self._paused, self._failed = True, False, False
                self._done = self._holder.held()
                await self._run()
            while self._running or self._pending:
                await link.freed.park()
        finally:
            self._whole = False

    def _room(self) -> float:
        """How many plain bytes bulk may ask for now."""
        return math.inf if self._whole else self._read_room()

    def _read_room(self) -> float:
        """The same because of what was read."""
        read, size, wide = self._read_bytes, self._spans.size, self._queue.link.is_wide
        long = read >= self._stretches * _STRETCH and (
            self._stretches <= _FEW_STRETCHES or self._longest >= read * _MAIN_STRETCH
        )
        if read < (_WIDE_LEAST if wide and long else _LEAST):
            return 0
        if read >= size * (_WIDE_SHARE if wide and long else _LARGE_SHARE):
            return math.inf
        if not long:
            return 0
        if read >= size * _SMALL_SHARE:
            return (_WIDE_TIMES if wide else 1) * read - self._asked
        # What little is fetched of a device in vain on a narrow link tells whether it is one.
        return (max(read, _LEAST) if wide else _LEAST) - self._asked

    def _may_begin(self) -> bool:
        return not self._running and not self._queue.failing and self._room() >= _LEAST

    def _begin(self) -> None:
        self._running, self._paused, self._failed = True, False, False
        self._done = self._holder.held()
        self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        turns, link = self._queue.turns, self._queue.link
        reads, since = self._reads, trio.current_time()
        began = everything = False
        try:
            while not self._failed:
                # What was read is reason enough to go on while readers wait, to want the whole is not.
                await turns.background(quiet=self._whole and self._read_room() < _LEAST)
                if self._reads != reads:
                    reads, since = self._reads, trio.current_time()
                elif trio.current_time() - since >= _IDLE_S and not self._whole:
                    return
                if self._must_wait():
                    await link.freed.park()
                    continue
                if (room := self._room()) < _LEAST:
                    self._paused = True
                    return
                if not everything and math.isinf(room):
                    everything = True
                    self._begin_at_front()
                numbers = self._next(link.bulk_limit, link.gap_limit, room)
                if not numbers:
                    return
                length = sum(self._spans[number].length for number in numbers)
                # What is left is for readers.
                if not self._holder.has_room(self._pending + length + _LEAST):
                    return
                if not began:
                    began = True
                    self._stats.bulk_started += 1
                self._asked += length
                self._pending += length
                stored = sum(self._spans.stored_lengths[number] for number in numbers)
                self._stats.bulk_bytes += stored
                turns.spend(stored)
                link.bulk += 1
                self._nursery.start_soon(self._follow, self._start(numbers), length)
        finally:
            self._running = False
            link.freed.unpark_all()

    def _must_wait(self) -> bool:
        link = self._queue.link
        if link.is_wide:
            return link.bulk >= _LANES
        return link.bulk > 0 or link.demanded > 0 or self._queue.turns.has_demand

    def _begin_at_front(self) -> None:
        """Fetch first what is missing before the present place, if that is little: hashing begins there."""
        done, starts, jobs = self._done, self._spans.starts, self._queue.jobs
        missing = [n for n in range(self._place) if not done[n] and n not in jobs]
        if missing and sum(starts[n + 1] - starts[n] for n in missing) <= _LEAST:
            self._place = missing[0]

    def _next(self, limit: int, gap: int, most: float) -> list[int]:
        """The spans of the next range, at most ``limit`` stored and ``most`` plain bytes; none at the end."""
        spans, jobs, done = self._spans, self._queue.jobs, self._done
        offsets, lengths = spans.stored_offsets, spans.stored_lengths
        numbers: list[int] = []
        begin = end = 0
        number = done.find(0, self._place)
        wrapped = False
        while True:
            if number < 0:
                # A range ends where the device does.
                if numbers or wrapped:
                    break
                number, wrapped = done.find(0), True
                continue
            if not self._holder.is_held(number) and number not in jobs and number not in self._wrong:
                past = offsets[number] + lengths[number]
                most -= spans.starts[number + 1] - spans.starts[number]
                if numbers and (offsets[number] - end > gap or past - begin > limit or most < 0):
                    break
                begin, end = begin if numbers else offsets[number], past
                numbers.append(number)
            done[number] = 1
            number = done.find(0, number + 1)
        self._place = max(number, 0)
        return numbers

    async def _follow(self, jobs: list[SpanJob], length: int) -> None:
        """Wait for a range; what it brought is not kept here."""
        try:
            jobs.reverse()
            while jobs:
                job = jobs.pop()
                await job.done.wait()
                if isinstance(job.error, IntegrityError):
                    self._wrong.add(job.number)
                # The disk may have refused what came: then the rest will fare no better.
                self._failed |= job.error is not None or (
                    job.plain is not None and not self._holder.is_held(job.number)
                )
        finally:
            link = self._queue.link
            link.bulk -= 1
            self._pending -= length
            link.freed.unpark_all()
            if math.isinf(self._room()):
                self._came()
            self.watching = self._running or 0 in self._holder.held()
