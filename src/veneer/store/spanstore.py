"""Read any range of any device: from the cache when it is there, else fetched once, verified and kept.

Invariant: no byte that has not been verified against its span's digest reaches a reader or the disk. A reader
gets exactly the bytes it asked for, or an error; errors are not remembered, the next read tries again.

A fetch belongs to the store: a cancelled reader cancels nobody else. All methods are for tasks of the trio
loop that the store was opened in. Hashing, decoding and writing of more than a little is done in threads.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

import trio

from veneer.codec import check_and_decode
from veneer.errors import IntegrityError, Unavailable, VeneerError
from veneer.events import Progress, Reporter, silent
from veneer.index.model import Device
from veneer.settings import Settings
from veneer.source.base import BlobSource
from veneer.store.attached import AttachedDevice, Decode, Twins
from veneer.store.cache import DeviceCache
from veneer.store.fetch import FetchQueue, Priority, SpanJob, hops
from veneer.store.link import LinkEstimate
from veneer.store.memory import MemoryCache
from veneer.store.presence import Form
from veneer.store.stats import StoreStats

__all__ = ["AttachedDevice", "Form", "OnAccess", "Priority", "SpanStore", "open_store"]

#: Called for every answered read: device key (hex), offset, length, seconds that the reader waited.
OnAccess = Callable[[str, int, int, float], None]

#: Plain bytes that are worked on in the event loop: a thread hop costs as much as hashing so much.
_INLINE = 64 << 10
#: Plain bytes of one hop: enough to make the hop cheap, few enough that the first span is not kept waiting.
_HOP = 1 << 20
#: Plain bytes kept in memory of what the disk does not hold.
_MEMORY = 64 << 20
#: A source gives up at the same deadline, and knows why: its error is worth so much more waiting.
_GRACE_S = 0.25
#: Longest stretch that one read makes us read ahead.
_MOST_WINDOW = 32 << 20
#: Completion reads and hashes so much at a time, and asks for so much ahead.
_COMPLETION_STEP, _COMPLETION_WINDOW = 4 << 20, 16 << 20

P = ParamSpec("P")
T = TypeVar("T")


class SpanStore:
    """The spans of all attached devices. Use :func:`open_store`.

    Args:
        cache: the devices on disk.
        nursery: owns the fetches.
        read_deadline_s: how long one read waits before it fails with Unavailable.
        on_access: told of every answered read; must be quick.
    """

    def __init__(
        self,
        cache: DeviceCache,
        *,
        nursery: trio.Nursery,
        read_deadline_s: float,
        on_access: OnAccess | None = None,
    ) -> None:
        self.stats: StoreStats = cache.stats
        self.on_access = on_access
        self._cache = cache
        self._nursery = nursery
        self._deadline_s = read_deadline_s
        self._memory = MemoryCache(_MEMORY)
        self._limiter = trio.CapacityLimiter(os.cpu_count() or 1)
        self._attached: dict[bytes, AttachedDevice] = {}
        self._links: dict[str, LinkEstimate] = {}
        self._twins = Twins()
        self._unindexed: list[AttachedDevice] = []

    def attach(
        self,
        device: Device,
        source: BlobSource,
        *,
        form: Form | None = None,
        decode: Decode = check_and_decode,
    ) -> AttachedDevice:
        """Make a device readable. A device that is attached already stays as it is, with its first source.

        Args:
            device: what it is.
            source: where its blob is read.
            form: what the disk holds: plain bytes unless a codec is sealed, whose plain bytes stay in memory.
            decode: verifies and decodes stored bytes; another one than the default brings a key.
        """
        if attached := self._attached.get(device.key.raw):
            return attached
        sealed = any(codec.seal for codec in device.spans.codecs)
        if sealed and form is Form.PLAIN:
            raise ValueError("plain bytes of sealed spans must not reach the disk")
        form = form or (Form.STORED if sealed else Form.PLAIN)
        file = self._cache.open(device, form)
        attached = AttachedDevice(
            device, source, form, cache=self._cache, file=file, memory=self._memory, decode=decode
        )
        # Blobs of one registry share its link; what goes before the first slash names it.
        link = self._links.setdefault(source.name.partition("/")[0], LinkEstimate())
        attached.queue = FetchQueue(
            source,
            device.spans,
            self._nursery,
            link=link,
            stats=self.stats,
            deadline_s=self._deadline_s,
            settle=partial(self._settle, attached),
            adopt=attached.is_missing,
        )
        self._attached[device.key.raw] = attached
        self._unindexed.append(attached)
        return attached

    def cached(self, attached: AttachedDevice, offset: int, length: int) -> bytes | None:
        """The bytes if they are here and trusted, else None. Never waits, never fetches."""
        data = attached.peek(offset, length)
        if data is not None:
            stats = self.stats
            stats.reads += 1
            stats.hits += 1
            stats.bytes_read += length
            if self.on_access is not None:
                self.on_access(attached.device.key.hex, offset, length, 0.0)
        return data

    async def read(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        *,
        window: tuple[int, int] | None = None,
        priority: Priority = Priority.DEMAND,
    ) -> bytes:
        """Exactly ``length`` verified bytes from ``offset`` of the device.

        Args:
            attached: which device.
            offset: in the device.
            length: in bytes; the range must lie in the device.
            window: device range (start, end) that is worth fetching too if this read has to fetch.
            priority: whom the read may overtake.

        Raises:
            IntegrityError: the source keeps sending other bytes than the digest promises.
            Unavailable: nothing usable came within the deadline.
            VeneerError: what else the source or the codec reported.
        """
        if (data := self.cached(attached, offset, length)) is not None:
            await trio.lowlevel.checkpoint()
            return data
        stats, started = self.stats, trio.current_time()
        stats.reads += 1
        stats.misses += 1
        try:
            data = await self._gather(attached, offset, length, window, priority)
        except VeneerError:
            stats.errors += 1
            raise
        stats.bytes_read += length
        if self.on_access is not None:
            self.on_access(attached.device.key.hex, offset, length, trio.current_time() - started)
        return data

    def prefetch(
        self,
        attached: AttachedDevice,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.READAHEAD,
    ) -> None:
        """Queue what is missing of the device from ``start`` to ``end`` (clipped), and wait for nothing."""
        start = max(0, start)
        end = min(end, attached.size, start + _MOST_WINDOW)
        if start < end:
            numbers = attached.spans.covering(start, end - start)
            jobs = attached.queue.jobs
            wanted = (n for n in numbers if n not in jobs and not attached.is_ready(n))
            self._start(attached, wanted, priority)

    async def complete(self, attached: AttachedDevice, report: Reporter = silent) -> None:
        """Fetch all that is missing of a device, read all of it, and check it against its diffID.

        Raises:
            IntegrityError: a span, or the device as a whole, is not what it was promised to be.
            VeneerError: what else reading reported.
        """
        device, size, starts = attached.device, attached.size, attached.spans.starts
        item, hasher = device.blob.digest.hex[:12], device.diff_id.hasher()
        offset = 0
        while offset < size:
            end = min(offset + _COMPLETION_STEP, size)
            # A step ends with a span: none is decoded twice.
            end = starts[attached.spans.covering(end - 1, 1)[0] + 1]
            window = (offset, offset + _COMPLETION_WINDOW)
            data = await self.read(attached, offset, end - offset, window=window, priority=Priority.COMPLETION)
            await trio.to_thread.run_sync(hasher.update, data, limiter=self._limiter)
            offset = end
            report(Progress("fetch", item, offset, size))
        device.diff_id.check_hash(hasher, f"contents of layer {device.blob.digest}")

    def close(self) -> None:
        """Close the devices; called when no task uses the store any more."""
        self._cache.close()

    async def _gather(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        window: tuple[int, int] | None,
        priority: Priority,
    ) -> bytes:
        end = offset + length
        pieces: dict[int, bytes] = {}
        absent: list[int] = []
        numbers = attached.spans.covering(offset, length)
        for number in numbers:
            if (piece := attached.peek_span(number, offset, end)) is not None:
                pieces[number] = piece
            else:
                absent.append(number)
        jobs = self._start(attached, absent, priority)
        if window is not None:
            self.prefetch(attached, *window, priority=max(priority, Priority.READAHEAD))
        await self._wait(attached, jobs, offset, length)
        starts = attached.spans.starts
        for job in jobs:
            if job.plain is None:
                raise job.error or AssertionError("a job ended with neither bytes nor an error")
            start = starts[job.number]
            pieces[job.number] = job.plain[max(0, offset - start) : end - start]
        return b"".join(pieces[number] for number in numbers) if len(numbers) != 1 else pieces[numbers[0]]

    async def _wait(self, attached: AttachedDevice, jobs: Sequence[SpanJob], offset: int, length: int) -> None:
        for job in jobs:
            job.waiters += 1
        try:
            with trio.move_on_after(self._deadline_s + _GRACE_S) as scope:
                for job in jobs:
                    await job.done.wait()
        finally:
            for job in jobs:
                job.waiters -= 1
                if not job.waiters:
                    attached.queue.abandon(job)
        if scope.cancelled_caught:
            setback = next((job.setback for job in jobs if job.setback), None)
            why = f": {setback.message}" if setback else ""
            what = f"{attached.source.name}: {length} bytes at {offset} of the device"
            raise Unavailable(
                f"{what} did not come within {self._deadline_s:g} s{why}",
                hint="reading again works as soon as the registry answers; what is cached stays readable",
            ) from setback

    def _start(self, attached: AttachedDevice, numbers: Iterable[int], priority: Priority) -> list[SpanJob]:
        """The job of each span: the one under way, made more urgent if need be, or a new one."""
        if self._unindexed:
            # Not when attached: a warm mount never needs it, and a cold one has time while it waits.
            self._nursery.start_soon(self._index_twins, self._unindexed)
            self._unindexed = []
        queue = attached.queue
        jobs: list[SpanJob] = []
        local: list[SpanJob] = []
        for number in numbers:
            if (job := queue.jobs.get(number)) is not None:
                queue.promote(job, priority)
            else:
                job = queue.jobs[number] = SpanJob(number, priority)
                if attached.is_local(number):
                    local.append(job)
                else:
                    queue.submit(job)
            jobs.append(job)
        if local:
            self._nursery.start_soon(self._find, attached, local)
        return jobs

    async def _index_twins(self, devices: Sequence[AttachedDevice]) -> None:
        for attached in devices:
            self._twins.add(attached)
            await trio.lowlevel.checkpoint()

    async def _find(self, attached: AttachedDevice, jobs: Sequence[SpanJob]) -> None:
        """Answer jobs from the disk; those that cannot be are queued for the source."""
        stats = self.stats
        for hop, size in hops(jobs, attached.spans, _HOP):
            found = await self._work(attached, size, attached.find_now, [job.number for job in hop])
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

    async def _settle(
        self, attached: AttachedDevice, jobs: Sequence[SpanJob], offset: int, data: bytes
    ) -> None:
        """Verify, decode and keep what a request brought, and answer its jobs, those with waiters first."""
        stats, queue = self.stats, attached.queue
        urgent = sorted(jobs, key=lambda job: (job.priority, job.number))
        for hop, size in hops(urgent, attached.spans, _HOP):
            spans = [attached.spans[number] for number in sorted(job.number for job in hop)]
            outcomes = await self._work(attached, size, attached.decode_now, spans, offset, data)
            of_number = {job.number: job for job in hop}
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

    def _deliver(self, attached: AttachedDevice, job: SpanJob, plain: bytes, *, kept: bool) -> None:
        if not kept:
            attached.remember(job.number, plain)
            self.stats.uncached += attached.form is Form.PLAIN
        attached.queue.finish(job, plain)

    async def _work(
        self,
        attached: AttachedDevice,
        size: int,
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        if size <= _INLINE and attached.has_room(size):
            return function(*args, **kwargs)
        call = partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._limiter)


class open_store:  # noqa: N801 - reads and is used like a function: async with open_store(...) as store
    """The store of these settings, for the time of an ``async with``.

    An error of the body leaves as it is, not in the exception group that a nursery would make of it. Fetches
    that nobody waits for are dropped at the end.

    Raises:
        CacheError: the cache directory cannot be used at all.
    """

    def __init__(self, settings: Settings, *, on_access: OnAccess | None = None) -> None:
        self._settings = settings
        self._on_access = on_access

    async def __aenter__(self) -> SpanStore:
        settings = self._settings
        cache = await trio.to_thread.run_sync(DeviceCache, settings.cache_dir, settings.cache_quota)
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._store = SpanStore(
            cache,
            nursery=self._nursery,
            read_deadline_s=settings.read_deadline_s,
            on_access=self._on_access,
        )
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._nursery.cancel_scope.cancel()
        try:
            # Only a cancellation may be the nursery's own, and must be shown to it.
            grouped = isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None
            if grouped or isinstance(error, trio.Cancelled):
                return bool(await self._manager.__aexit__(kind, error, trace))
            await self._manager.__aexit__(None, None, None)
            return False
        finally:
            self._store.close()
