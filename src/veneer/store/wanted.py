"""What somebody will want soon is fetched for as long as somebody is there who says so.

Whoever reads waits for its own spans, and a window is read ahead once. This is for more than that: whole packs
and profiles. Who is cancelled here leaves nothing in the queues that nobody else wants; requests that are under
way end as they would have.
"""

from collections.abc import Iterable
from typing import NamedTuple

import trio

from veneer.store.attached import AttachedDevice
from veneer.store.jobs import Jobs
from veneer.store.transfer import Priority, SpanJob

__all__ = ["Range", "bring"]

#: Ranges queued before other tasks get a turn.
_AT_ONCE = 64


class Range(NamedTuple):
    """``length`` bytes from ``offset`` of a device."""

    device: AttachedDevice
    offset: int
    length: int


async def bring(jobs: Jobs, ranges: Iterable[Range], priority: Priority) -> None:
    """Fetch what is missing of these ranges, in their order. Returns when all has come, or has failed.

    Devices that have been detached are left out. Errors are not told.
    """
    wanted: list[tuple[AttachedDevice, SpanJob]] = []
    try:
        for number, (device, offset, length) in enumerate(ranges, 1):
            if length > 0 and not device.detached:
                missing = (n for n in device.spans.covering(offset, length) if not device.is_ready(n))
                for job in jobs.start(device, missing, priority):
                    job.wanted += 1
                    wanted.append((device, job))
            if not number % _AT_ONCE:
                await trio.lowlevel.checkpoint()
        for _, job in wanted:
            await job.done.wait()
    finally:
        for device, job in wanted:
            job.wanted -= 1
            device.queue.abandon(job)
