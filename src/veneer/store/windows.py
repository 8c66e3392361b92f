"""The windows that spans of a gzip layer are decoded with: a device of their own, asked for beside the spans.

They are requested when the spans are, so that they cost no time of their own, and kept as stored: each is
needed once for every time that its span is fetched.
"""

from collections.abc import Sequence

from veneer.index.model import WINDOW_SIZE
from veneer.store.attached import AttachedDevice
from veneer.store.jobs import Jobs
from veneer.store.transfer import Priority, SpanJob

__all__ = ["Windows"]


class Windows:
    """The windows of one device. Used from the store's own thread only.

    Args:
        attached: the device that has them.
        jobs: those of the store.
    """

    def __init__(self, attached: AttachedDevice, jobs: Jobs) -> None:
        self.attached = attached
        self._jobs = jobs

    def want(self, jobs: Sequence[SpanJob]) -> None:
        """Ask for those of spans that are under way, and wait for nothing."""
        wanted: dict[int, Priority] = {}
        for job in jobs:
            frame = self._frame(job.number)
            wanted[frame] = min(job.priority, wanted.get(frame, job.priority))
        for frame, priority in wanted.items():
            if not self.attached.is_ready(frame):
                self._jobs.start(self.attached, [frame], priority)

    async def read(self, number: int, priority: Priority) -> bytes:
        """That of span ``number``, verified. Raises VeneerError."""
        offset, frame = number * WINDOW_SIZE, self._frame(number)
        if (window := self.attached.peek(offset, WINDOW_SIZE)) is not None:
            return window
        jobs = self._jobs.start(self.attached, [frame], priority)
        await self._jobs.wait(self.attached, jobs, offset, WINDOW_SIZE)
        if (plain := jobs[0].plain) is None:
            raise jobs[0].error or AssertionError("a job ended with neither bytes nor an error")
        start = offset - self.attached.spans.starts[frame]
        return plain[start : start + WINDOW_SIZE]

    def _frame(self, number: int) -> int:
        return self.attached.spans.covering(number * WINDOW_SIZE, 1)[0]
