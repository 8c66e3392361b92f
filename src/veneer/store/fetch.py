"""What to ask of one source next: jobs of single spans in, range requests out.

A :class:`SpanJob` is the one fetch of one span, however many readers wait for it. Jobs queue by priority.
Only when it is the device's turn (:mod:`veneer.store.turns`) is it decided which range a request asks for:
the most urgent job and those of its neighbours in the blob that are queued too, with small gaps bridged. So a
demand pre-empts whatever is queued, readers that come at the same time share a request, and raising a job's
priority is all that promotion takes.

A source that fails is left alone for a moment that doubles up to :data:`_MOST_PAUSE_S`, then gets one request
at a time until one succeeds: a dead registry is not hammered, one that is back is in use within that moment.

Not here: the request itself (:mod:`veneer.store.transfer`), verification, decoding, the disk.
"""

import heapq
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import trio

from veneer.errors import IntegrityError, RateLimited, Unavailable, VeneerError
from veneer.index.model import SpanTable
from veneer.source.base import BlobSource
from veneer.store.stats import StoreStats
from veneer.store.transfer import Priority, Settle, SpanJob, Transfer
from veneer.store.turns import Turns
from veneer.timing import DeviceRanges

__all__ = ["FetchQueue", "Priority", "SpanJob", "hops"]

_log = logging.getLogger(__name__)

#: Tries of one span whose bytes are not what they should be: more would not help, fewer would not be fair.
_INTEGRITY_TRIES = 3
#: Pause after the first failed request of a source; doubled by each further one, up to the most.
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 1.0
#: The most that a source's own Retry-After is believed.
_MOST_RETRY_AFTER_S = 10.0


def hops(jobs: Iterable[SpanJob], spans: SpanTable, most: int) -> Iterator[tuple[list[SpanJob], int]]:
    """Cut jobs into lists for one thread hop each, and their plain bytes: at most ``most``, or one job."""
    hop: list[SpanJob] = []
    size = 0
    for job in jobs:
        length = spans.starts[job.number + 1] - spans.starts[job.number]
        if hop and size + length > most:
            yield hop, size
            hop, size = [], 0
        hop.append(job)
        size += length
    if hop:
        yield hop, size


class FetchQueue:
    """The jobs of one device and the requests to its source. Used from the store's own thread only.

    Args:
        source: where ranges are read.
        spans: how the blob is cut.
        nursery: owns the requests.
        turns: says when a request may be sent; has the estimate of the link, which is used and kept up to date.
        stats: where requests are counted.
        deadline_s: after which a request counts as stalled.
        settle: gets jobs in ascending order, the blob offset of the bytes, and the bytes; it ends each job by
            :meth:`finish` or :meth:`reject`.
        adopt: whether a span inside a gap is missing, so that its bytes are worth keeping.
        ranges: notes when what happened to a request.
        replace: for a device whose bytes may be had without its source, what is slower: sees to a job that a
            reader waits for, so that the source is not asked a second time for it.
        besides: told of the jobs of every request as it is sent, to ask for what they need besides.
    """

    def __init__(
        self,
        source: BlobSource,
        spans: SpanTable,
        nursery: trio.Nursery,
        *,
        turns: Turns,
        stats: StoreStats,
        deadline_s: float,
        settle: Settle,
        adopt: Callable[[int], bool],
        ranges: DeviceRanges,
        replace: Callable[[SpanJob], None] | None = None,
        besides: Callable[[Sequence[SpanJob]], None] | None = None,
    ) -> None:
        self.jobs: dict[int, SpanJob] = {}
        self.turns = turns
        self.link = turns.link
        #: What is in one repository is one image, or as good as one.
        self.image = source.name.partition("@")[0]
        self._source = source
        self._spans = spans
        self._nursery = nursery
        self._stats = stats
        self._deadline_s = deadline_s
        self._settle = settle
        self._adopt = adopt
        self._ranges = ranges
        self._replace = replace
        self._besides = besides
        self._queued: dict[int, SpanJob] = {}
        self._heap: list[tuple[Priority, int, int]] = []
        self._order = itertools.count()
        self._active: set[trio.CancelScope] = set()
        self._failures = 0
        self._not_before = -math.inf
        self._pausing = False

    @property
    def failing(self) -> bool:
        """Whether the latest request that ended had failed."""
        return self._failures > 0

    def submit(self, job: SpanJob) -> None:
        """Queue a job that is in :attr:`jobs`; it starts in the next round of the scheduler or later."""
        if self.failing and job.priority is Priority.DEMAND and self.replace(job):
            return
        self._queued[job.number] = job
        heapq.heappush(self._heap, (job.priority, next(self._order), job.number))
        self._schedule()

    def promote(self, job: SpanJob, priority: Priority) -> None:
        """Make a job more urgent."""
        if priority < job.priority:
            job.priority = priority
            if job.number in self._queued:
                self.submit(job)

    def abandon(self, job: SpanJob) -> None:
        """Take note that somebody left a job: one that nobody wants, and is not under way, is dropped."""
        if not job.waiters and not job.wanted:
            self._drop(job)

    def _drop(self, job: SpanJob) -> None:
        if self._queued.get(job.number) is job:
            del self._queued[job.number]
            self.finish(job, None, job.setback)
            self.link.freed.unpark_all()

    def replace(self, job: SpanJob) -> bool:
        """Have the bytes of a job made without the source; False if that cannot be."""
        if self._replace is None:
            return False
        self._queued.pop(job.number, None)
        if not job.replaced:
            job.replaced = True
            self._replace(job)
        return True

    def finish(self, job: SpanJob, plain: bytes | None, error: VeneerError | None = None) -> None:
        """End a job; the next reader of a failed span starts a new one."""
        if self.jobs.get(job.number) is job:
            del self.jobs[job.number]
        job.finish(plain, error)

    def reject(self, job: SpanJob, error: IntegrityError) -> None:
        """Its bytes were wrong: ask again, or end it with the error."""
        span = self._spans[job.number]
        where = f"span {job.number}, bytes {span.stored_offset}+{span.stored_length}"
        _log.warning("%s: %s, try %d: %s", self._source.name, where, job.attempts + 1, error)
        self._try_again(job, error)

    def _try_again(self, job: SpanJob, error: IntegrityError) -> None:
        job.attempts += 1
        self._stats.verify_failures += 1
        if job.attempts >= _INTEGRITY_TRIES or self._replace is not None:
            self._pause()
            self._give_up(job, error)
        else:
            self._again(job, error)

    def _again(self, job: SpanJob, error: VeneerError) -> None:
        job.setback = error
        self._stats.retries += 1
        self.submit(job)

    def close(self) -> None:
        """Give up everything that is queued or under way."""
        for job in list(self.jobs.values()):
            self._drop(job)
        self.turns.forget(self)
        for scope in self._active:
            scope.cancel()

    def _schedule(self) -> None:
        if trio.current_time() >= self._not_before:
            self.turns.want(self)
        elif not self._pausing:
            self._pausing = True
            self._nursery.start_soon(self._go_on)

    async def _go_on(self) -> None:
        while trio.current_time() < self._not_before:  # noqa: ASYNC110 - a failure meanwhile makes it later
            await trio.sleep_until(self._not_before)
        self._pausing = False
        self.turns.want(self)

    def head(self) -> Priority | None:
        """See :class:`~veneer.store.turns.Queue`."""
        if trio.current_time() < self._not_before or (self._failures and self._active):
            return None
        while self._heap:
            priority, _, number = self._heap[0]
            job = self._queued.get(number)
            if job is not None and job.priority == priority:
                return priority
            heapq.heappop(self._heap)
        return None

    def begin(self) -> None:
        """See :class:`~veneer.store.turns.Queue`."""
        priority, _, number = self._heap[0]
        self.turns.began(self, priority)
        scope = trio.CancelScope()
        self._active.add(scope)
        self._nursery.start_soon(self._fetch, self._range(number, priority), priority, scope)

    def queued(self) -> Mapping[Priority, int]:
        """See :class:`~veneer.store.turns.Queue`."""
        return Counter(job.priority for job in self._queued.values())

    def _range(self, number: int, priority: Priority) -> deque[SpanJob]:
        """Take a job off the queue, with those neighbours that go into the same request."""
        link = self.link
        # Bulk has cut its ranges itself. A profile is in the order of use: a reader finds its span on the way.
        nobody_waits = {
            Priority.PROFILE: link.background_limit,
            Priority.COMPLETION: link.background_limit,
            Priority.BULK: link.bulk_limit,
        }
        limit = nobody_waits.get(priority, link.range_limit)
        first, last = self._extend(number, limit, link.gap_limit)
        if priority is Priority.DEMAND:
            first, last = self._reach(first, last, *link.reach)
        jobs = deque[SpanJob]()
        for n in range(first, last + 1):
            job = self._queued.pop(n, None)
            if job is None and n not in self.jobs and self._adopt(n):
                job = self.jobs[n] = SpanJob(n, Priority.READAHEAD)
            if job is not None:
                jobs.append(job)
        return jobs

    def _extend(self, number: int, limit: int, gap: int) -> tuple[int, int]:
        """The first and last queued span of the range around ``number``."""
        offsets, lengths, queued = self._spans.stored_offsets, self._spans.stored_lengths, self._queued
        first = last = number
        begin, end = offsets[number], offsets[number] + lengths[number]
        for n in range(number + 1, len(lengths)):
            past = offsets[n] + lengths[n]
            if offsets[n] - end > gap or past - begin > limit:
                break
            if n in queued:
                last, end = n, past
        for n in range(number - 1, -1, -1):
            if begin - offsets[n] - lengths[n] > gap or end - offsets[n] > limit:
                break
            if n in queued:
                first, begin = n, offsets[n]
        return first, last

    def _reach(self, first: int, last: int, before: int, behind: int) -> tuple[int, int]:
        """The first and last span of what a demand brings along, at most so many stored bytes on either side.

        Files of one directory lie together in a tar, and who reads one often reads the next.
        """
        offsets, lengths = self._spans.stored_offsets, self._spans.stored_lengths
        begin, end = offsets[first] - before, offsets[first] + behind
        while (
            last + 1 < len(lengths) and offsets[last + 1] + lengths[last + 1] <= end and self._is_free(last + 1)
        ):
            last += 1
        while first > 0 and offsets[first - 1] >= begin and self._is_free(first - 1):
            first -= 1
        return first, last

    def _is_free(self, number: int) -> bool:
        return number not in self.jobs and self._adopt(number)

    async def _fetch(self, jobs: deque[SpanJob], priority: Priority, scope: trio.CancelScope) -> None:
        if self._besides is not None:
            self._besides(jobs)
        mine = list(jobs)
        transfer = Transfer(
            jobs,
            self._source,
            self._spans,
            link=self.link,
            stats=self._stats,
            deadline_s=self._deadline_s,
            settle=self._settle,
            ranges=self._ranges,
        )
        try:
            try:
                with scope:
                    await transfer.run()
            except VeneerError as error:
                self._failed(jobs, error)
            else:
                if scope.cancelled_caught:
                    for job in mine:
                        self.finish(job, None, Unavailable(f"{self._source.name}: the device was given up"))
                else:
                    self._failures = 0
        finally:
            # Only now: ranges must not arrive faster than they are verified and written.
            self._active.discard(scope)
            self.turns.bytes[priority] += transfer.received
            self.turns.ended(self, priority)
            if self._queued:
                self._schedule()

    def _failed(self, jobs: Iterable[SpanJob], error: VeneerError) -> None:
        self._pause(error)
        _log.log(logging.INFO if self._failures > 1 else logging.WARNING, "request failed: %s", error)
        for job in jobs:
            if isinstance(error, IntegrityError):
                self._try_again(job, error)
            elif error.temporary and job.waiters and self._replace is None:
                self._again(job, error)
            else:
                self._give_up(job, error)

    def _give_up(self, job: SpanJob, error: VeneerError) -> None:
        if not job.waiters or not self.replace(job):
            self.finish(job, None, error)

    def _pause(self, error: VeneerError | None = None) -> None:
        now = trio.current_time()
        pause = 0.0
        if now >= self._not_before:
            # Requests that fail together count once.
            self._failures += 1
            pause = min(_MOST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        if isinstance(error, RateLimited) and error.retry_after_s:
            pause = max(pause, min(error.retry_after_s, _MOST_RETRY_AFTER_S))
        self._not_before = max(self._not_before, now + pause)
