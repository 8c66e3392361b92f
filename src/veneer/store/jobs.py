"""The jobs of all devices of a store: how they begin, get their bytes, and how long one waits for them.

A job's span is found on this machine, or taken out of what a request to the source brought. Hashing, decoding
and disk work is done in the event loop when it is little, else in threads.

Used from the store's own thread only. Not here: what to ask of a source (:mod:`veneer.store.fetch`).
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import ParamSpec, TypeVar

import trio

from veneer.errors import IntegrityError, Unavailable, VeneerError
from veneer.index.model import Span
from veneer.store.attached import AttachedDevice
from veneer.store.bulk import Bulk
from veneer.store.decoder import Decoder
from veneer.store.decoder_main import WRONG
from veneer.store.fetch import Priority, SpanJob, hops
from veneer.store.presence import Form
from veneer.store.proof import hash_ahead
from veneer.store.stats import StoreStats
from veneer.store.threads import Threads
from veneer.store.twins import Twins

__all__ = ["Jobs"]

#: Plain bytes that are worked on in the event loop: a thread hop costs as much as hashing so much.
_INLINE = 64 << 10
#: Plain bytes of one hop: enough to make the hop cheap, few enough that the first span is not kept waiting.
_HOP = 1 << 20
#: The same when nobody waits for any of them.
_BULK_HOP = 2 << 20
#: Plain bytes still to come that are worth starting a process: below, it takes more than it saves.
_WORTH_A_PROCESS = 32 << 20
#: The part of its time that a reader waits for a source when the same bytes can be had elsewhere.
_PATIENCE = 1 / 6
#: A source gives up at the same deadline, and knows why: its error is worth so much more waiting.
_GRACE_S = 0.25

P = ParamSpec("P")
T = TypeVar("T")


class Jobs:
    """Begins and ends jobs.

    Args:
        stats: where what happens is counted.
        nursery: owns the work.
        deadline_s: how long one waits.
        decoder: does what nobody waits for, if it can.
    """

    def __init__(
        self, stats: StoreStats, *, nursery: trio.Nursery, deadline_s: float, decoder: Decoder | None = None
    ) -> None:
        self.threads = Threads()
        self._decoder = decoder
        self._stats = stats
        self._nursery = nursery
        self._deadline_s = deadline_s
        self._twins = Twins()
        self._unindexed: list[AttachedDevice] = []

    def add(self, attached: AttachedDevice) -> None:
        """Take a new device: look for its spans in the others from now on, and for theirs in it."""
        attached.bulk = Bulk(
            attached.spans,
            attached,
            attached.queue,
            partial(self.start, attached, priority=Priority.BULK),
            came=partial(self._nursery.start_soon, hash_ahead, attached, self.threads),
            nursery=self._nursery,
            stats=self._stats,
        )
        self._unindexed.append(attached)

    def remove(self, attached: AttachedDevice) -> None:
        """Forget a device: what is queued for it, its memory, and its file once no thread uses that."""
        if attached in self._unindexed:
            self._unindexed.remove(attached)
        self._twins.remove(attached)
        attached.queue.close()
        if (file := attached.detach()) is not None:
            self.threads.retire(file)

    def start(self, attached: AttachedDevice, numbers: Iterable[int], priority: Priority) -> list[SpanJob]:
        """The job of each span: the one under way, made more urgent if need be, or a new one."""
        if self._unindexed:
            # Not when attached: a warm mount never needs it, and a cold one has time while it waits.
            self._nursery.start_soon(self._index_twins, self._unindexed)
            self._unindexed = []
        queue = attached.queue
        jobs: list[SpanJob] = []
        local: list[SpanJob] = []
        fresh: int | None = None
        for number in numbers:
            if (job := queue.jobs.get(number)) is not None:
                queue.promote(job, priority)
            else:
                job = queue.jobs[number] = SpanJob(number, priority)
                fresh = number if fresh is None else fresh
                if attached.is_local(number):
                    local.append(job)
                else:
                    queue.submit(job)
            jobs.append(job)
        if local:
            self._nursery.start_soon(self._find, attached, local)
        if priority is Priority.DEMAND and fresh is not None:
            attached.bulk.missed(fresh)
        return jobs

    async def wait(self, attached: AttachedDevice, jobs: Sequence[SpanJob], offset: int, length: int) -> None:
        """Wait until jobs have ended, for the time that a read may take. Raises Unavailable."""
        for job in jobs:
            job.waiters += 1
        try:
            with trio.move_on_after(self._deadline_s + _GRACE_S) as scope:
                if attached.original is not None:
                    await self._wait_a_little(attached, jobs)
                for job in jobs:
                    await job.done.wait()
        finally:
            for job in jobs:
                job.waiters -= 1
                attached.queue.abandon(job)
        if scope.cancelled_caught:
            setback = next((job.setback for job in jobs if job.setback), None)
            why = f": {setback.message}" if setback else ""
            what = f"{attached.source.name}: {length} bytes at {offset} of the device"
            raise Unavailable(
                f"{what} did not come within {self._deadline_s:g} s{why}",
                hint="reading again works as soon as the registry answers; what is cached stays readable",
            ) from setback

    async def _wait_a_little(self, attached: AttachedDevice, jobs: Sequence[SpanJob]) -> None:
        """Wait for a source that another way stands in for, but not for long."""
        with trio.move_on_after(self._deadline_s * _PATIENCE):
            for job in jobs:
                await job.done.wait()
        for job in jobs:
            if not job.done.is_set():
                attached.queue.replace(job)

    def replace(self, attached: AttachedDevice, job: SpanJob) -> None:
        """Have a span of a device that is a copy from where it was copied."""
        self._nursery.start_soon(self._replace, attached, job)

    async def _replace(self, attached: AttachedDevice, job: SpanJob) -> None:
        original = attached.original
        if original is None:
            raise ValueError("the device is no copy")
        span = attached.spans[job.number]
        try:
            plain = await original(span.offset, span.length, job.priority)
        except VeneerError as error:
            attached.queue.finish(job, None, error)
            return
        self._stats.replaced += 1
        found = await self._work(False, attached.find_now, [job.number], {job.number: plain})
        self._deliver(attached, job, found.plain[job.number], kept=job.number not in found.unkept)

    async def _find(self, attached: AttachedDevice, jobs: Sequence[SpanJob]) -> None:
        """Answer jobs from the disk or from memory; those that cannot be are queued for the source."""
        stats = self._stats
        for hop, size in hops(jobs, attached.spans, _HOP):
            numbers = [job.number for job in hop]
            inline = _is_little(attached, size) and not attached.has_twin(numbers)
            found = await self._work(inline, attached.find_now, numbers, attached.remembered(numbers))
            stats.spans_decoded += found.decoded
            stats.copied += found.copied
            stats.reverified += found.reverified
            stats.dropped += found.dropped
            stats.verify_failures += found.dropped
            for job in hop:
                if (plain := found.plain.get(job.number)) is None:
                    attached.queue.submit(job)
                else:
                    self._deliver(attached, job, plain, kept=job.number not in found.unkept)

    async def settle(self, attached: AttachedDevice, jobs: Sequence[SpanJob], offset: int, data: bytes) -> None:
        """Verify, decode and keep what a request brought, and answer its jobs, those with waiters first."""
        stats, queue = self._stats, attached.queue
        urgent = sorted(jobs, key=lambda job: (job.priority, job.number))
        most = _BULK_HOP if urgent[0].priority >= Priority.COMPLETION else _HOP
        # Whoever waits does not wait for what came along.
        waited, others = [job for job in urgent if job.waiters], [job for job in urgent if not job.waiters]
        for hop, size in chain(hops(waited, attached.spans, most), hops(others, attached.spans, most)):
            spans = [attached.spans[number] for number in sorted(job.number for job in hop)]
            windows: dict[int, bytes] = {}
            if attached.read_window is not None:
                try:
                    windows = {job.number: await attached.read_window(job.number, job.priority) for job in hop}
                except VeneerError as error:
                    for job in hop:
                        queue.finish(job, None, error)
                    continue
            of_number = {job.number: job for job in hop}
            if urgent[0].priority is Priority.BULK:
                done = await self._entrust(attached, of_number, spans, offset, data)
                spans = [span for span in spans if span.number not in done]
                if not spans:
                    continue
                size = sum(span.length for span in spans)
            inline = _is_little(attached, size)
            outcomes, cpu_s = await self._work(
                inline, _metered, attached.decode_now, spans, offset, data, windows
            )
            queue.link.observe_check(sum(span.stored_length for span in spans), cpu_s)
            for outcome in outcomes:
                job = of_number[outcome.number]
                stats.spans_decoded += 1
                if outcome.plain is not None:
                    stats.spans_fetched += 1
                    self._deliver(attached, job, outcome.plain, kept=outcome.kept)
                elif isinstance(outcome.error, IntegrityError):
                    queue.reject(job, outcome.error)
                else:
                    queue.finish(job, None, outcome.error)

    async def _entrust(
        self,
        attached: AttachedDevice,
        jobs: Mapping[int, SpanJob],
        spans: Sequence[Span],
        offset: int,
        data: bytes,
    ) -> Collection[int]:
        """Have a process of its own do it. The numbers of the spans that are done with."""
        decoder, file = self._decoder, attached.entrustable
        if decoder is None or file is None:
            return ()
        if not decoder.running:
            if attached.bulk.takes_all and attached.size - file.map.present_bytes >= _WORTH_A_PROCESS:
                decoder.want()
            return ()
        length = sum(span.length for span in spans)
        if (generation := attached.entrust(length)) is None:
            return ()
        digests: dict[int, bytes] = {}
        with self.threads.using():
            try:
                answer = await decoder.fill(file.fd, spans, offset, data)
                if answer is not None:
                    pairs = zip(spans, answer.digests, strict=False)
                    digests = {span.number: digest for span, digest in pairs if digest != WRONG}
                    attached.queue.link.observe_check(sum(span.stored_length for span in spans), answer.cpu_s)
            finally:
                taken = attached.take_over(file, length, generation, digests)
            if not taken:
                return ()
            done: list[int] = []
            for number in digests:
                job = jobs[number]
                # Others need no more than to know that it is there.
                plain = file.read_span(number) if job.waiters else None
                if plain is not None or not job.waiters:
                    done.append(number)
                    attached.queue.finish(job, plain)
        self._stats.spans_decoded += len(done)
        self._stats.spans_fetched += len(done)
        self._stats.entrusted += len(done)
        return done

    def _deliver(self, attached: AttachedDevice, job: SpanJob, plain: bytes, *, kept: bool) -> None:
        if not kept:
            attached.remember(job.number, plain)
            self._stats.uncached += attached.form is Form.PLAIN
        attached.queue.finish(job, plain)

    async def _index_twins(self, devices: Sequence[AttachedDevice]) -> None:
        for attached in devices:
            if not attached.detached:
                self._twins.add(attached)
            await trio.lowlevel.checkpoint()

    async def _work(self, inline: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if inline:
            return function(*args, **kwargs)
        return await self.threads.run(function, *args, **kwargs)


def _metered(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call returns, and the processor time that it took."""
    began = time.thread_time()
    return function(*args, **kwargs), time.thread_time() - began


def _is_little(attached: AttachedDevice, size: int) -> bool:
    """Whether the event loop can do it: so much plain data, and nothing to be evicted for it."""
    return size <= _INLINE and attached.has_room(size)
