"""How a job gets its bytes: found on this machine, or taken out of what a request brought.

Hashing, decoding and disk work is done in the event loop when it is little, else in threads, as many as there
are processors. A device that is given up is closed only when no thread can still be using its file: a closed
descriptor's number soon belongs to another file.

Used from the store's own thread only.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from veneer.errors import IntegrityError
from veneer.store.attached import AttachedDevice
from veneer.store.devicefile import DeviceFile
from veneer.store.fetch import SpanJob, hops
from veneer.store.presence import Form
from veneer.store.stats import StoreStats

__all__ = ["Answers", "Threads"]

#: Plain bytes that are worked on in the event loop: a thread hop costs as much as hashing so much.
_INLINE = 64 << 10
#: Plain bytes of one hop: enough to make the hop cheap, few enough that the first span is not kept waiting.
_HOP = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """The threads of one store, and the files that wait for them."""

    def __init__(self) -> None:
        self.limiter = trio.CapacityLimiter(os.cpu_count() or 1)
        self._calls: set[object] = set()
        self._retired: list[tuple[DeviceFile, set[object]]] = []

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in a thread. A cancellation waits for its end."""
        call = object()
        self._calls.add(call)
        try:
            return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self.limiter)
        finally:
            self._calls.remove(call)
            for file, calls in self._retired:
                calls.discard(call)
                if not calls:
                    file.close()
            self._retired = [(file, calls) for file, calls in self._retired if calls]

    def retire(self, file: DeviceFile) -> None:
        """Close a file, which no new call will use, once every call that runs now has ended."""
        if self._calls:
            self._retired.append((file, set(self._calls)))
        else:
            file.close()

    def close(self) -> None:
        """Close what is left; no call may be running."""
        for file, _ in self._retired:
            file.close()
        self._retired = []


class Answers:
    """Ends the jobs of all devices of a store.

    Args:
        stats: where what happens is counted.
    """

    def __init__(self, stats: StoreStats) -> None:
        self.threads = Threads()
        self._stats = stats

    async def find(self, attached: AttachedDevice, jobs: Sequence[SpanJob]) -> None:
        """Answer jobs from the disk or from memory; those that cannot be are queued for the source."""
        stats = self._stats
        for hop, size in hops(jobs, attached.spans, _HOP):
            numbers = [job.number for job in hop]
            found = await self._work(attached, size, attached.find_now, numbers, attached.remembered(numbers))
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
            self._stats.uncached += attached.form is Form.PLAIN
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
        return await self.threads.run(function, *args, **kwargs)
