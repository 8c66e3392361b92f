"""Notes when things happened: phases of one mount, and the range requests and reads of a store.

Always on, so that a start that was slow can be looked at after it was slow. Therefore everything here is an
append to something bounded, and a look at one clock: :func:`time.monotonic`, which on Linux is
CLOCK_MONOTONIC and so the same in the command line and in the daemon.

Not for: adding up, drawing, or deciding anything. :mod:`veneer.timing.record` makes a document of it.
"""

import time
from collections import deque
from collections.abc import Collection
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple, Self

__all__ = [
    "UNTIMED",
    "DeviceRanges",
    "Mark",
    "Phase",
    "RangeLog",
    "RangeTimes",
    "Read",
    "Timing",
    "answered",
    "timed_range",
]

#: Requests of one store that are kept: a start has some ten to some thousand.
MAX_RANGES = 4096
#: Reads of one store that are kept: pages are read by some thousand questions of the kernel.
MAX_READS = 8192
#: Phases and marks of one mount: each happens once, or once more after an error.
MAX_PHASES = 64

_now = time.monotonic


class Phase(NamedTuple):
    """Something that took time.

    Args:
        name: what.
        began: in seconds of the monotonic clock.
        ended: the same; None while it goes on.
    """

    name: str
    began: float
    ended: float | None


class Mark(NamedTuple):
    """Something that happened at one moment."""

    name: str
    at: float


class _Running:
    """A phase while it goes on; noted when it ends, also by an error."""

    __slots__ = ("_began", "_name", "_timing")

    def __init__(self, timing: "Timing", name: str) -> None:
        self._timing = timing
        self._name = name

    def __enter__(self) -> Self:
        self._began = _now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timing.add(self._name, self._began, _now())


class Timing:
    """Phases and marks of one start. Appended to by any thread."""

    def __init__(self) -> None:
        self.began = _now()
        self.phases: deque[Phase] = deque(maxlen=MAX_PHASES)
        self.marks: deque[Mark] = deque(maxlen=MAX_PHASES)

    def phase(self, name: str) -> _Running:
        """Note how long the body of a ``with`` takes."""
        return _Running(self, name)

    def add(self, name: str, began: float, ended: float | None) -> None:
        """Note a phase whose times are known."""
        self.phases.append(Phase(name, began, ended))

    def mark(self, name: str, at: float | None = None) -> None:
        """Note that something happens now, or happened ``at``."""
        self.marks.append(Mark(name, _now() if at is None else at))


class _Untimed(Timing):
    """Notes nothing."""

    def add(self, name: str, began: float, ended: float | None) -> None:
        """Do nothing."""

    def mark(self, name: str, at: float | None = None) -> None:
        """Do nothing."""


#: For whoever is not interested.
UNTIMED: Timing = _Untimed()


class Read(NamedTuple):
    """A read of a device that was answered.

    Args:
        at: when it was answered.
        device: as :class:`RangeLog` was told.
        offset: in the device.
        length: in bytes.
        wait_s: how long it waited.
    """

    at: float
    device: str
    offset: int
    length: int
    wait_s: float


class RangeTimes:
    """One range request and what happened to it; times in seconds of the monotonic clock.

    Written by the tasks that see to it, in this order: ``queued``, ``sent``, ``answered``, ``first_byte``,
    ``last_byte``, ``ready``. What has not happened is None.

    Attributes:
        device: as :class:`RangeLog` was told.
        offset: where the range begins in the blob.
        length: of the range in the blob.
        plain_offset: where what it holds begins in the device.
        plain_length: how much of the device it holds.
        spans: how many spans it is for.
        priority: of its most urgent span when it was sent.
        queued: when the oldest of its spans was asked for.
        sent: when the request was handed to the source.
        answered: when the head of the latest answer came; None for a source without answers.
        first_byte: when the first bytes of the range came.
        last_byte: when the last did.
        ready: when all of it was verified, decoded and written, and its readers could go on.
        busy_s: seconds spent on that, which may begin before the last byte.
        error: why it failed.
    """

    __slots__ = (
        "answered",
        "busy_s",
        "device",
        "error",
        "first_byte",
        "last_byte",
        "length",
        "offset",
        "plain_length",
        "plain_offset",
        "priority",
        "queued",
        "ready",
        "sent",
        "spans",
    )

    def __init__(
        self,
        device: str,
        offset: int,
        length: int,
        plain: tuple[int, int],
        *,
        spans: int,
        priority: str,
        queued: float,
    ) -> None:
        self.device = device
        self.offset = offset
        self.length = length
        self.plain_offset, self.plain_length = plain
        self.spans = spans
        self.priority = priority
        self.queued = queued
        self.sent = _now()
        self.answered: float | None = None
        self.first_byte: float | None = None
        self.last_byte: float | None = None
        self.ready: float | None = None
        self.busy_s = 0.0
        self.error: str | None = None

    def came(self) -> None:
        """Note bytes of the range, maybe the last ones."""
        self.last_byte = _now()
        if self.first_byte is None:
            # A source that hands over a range as a whole tells when the answer began.
            self.first_byte = self.answered or self.last_byte

    def settled(self, began: float) -> None:
        """Note that what came so far is ready, after work since ``began``."""
        self.ready = _now()
        self.busy_s += self.ready - began


class DeviceRanges:
    """Notes the requests for one device."""

    __slots__ = ("_device", "_log")

    def __init__(self, log: "RangeLog", device: str) -> None:
        self._log = log
        self._device = device

    def sent(
        self, offset: int, length: int, plain: tuple[int, int], *, spans: int, priority: str, queued: float
    ) -> RangeTimes:
        """Note a request that is sent now. ``plain`` is offset and length of its bytes in the device."""
        times = RangeTimes(self._device, offset, length, plain, spans=spans, priority=priority, queued=queued)
        self._log.sent += 1
        self._log.ranges.append(times)
        return times


class RangeLog:
    """The latest requests and reads of one store. For the store's own thread.

    Attributes:
        sent: requests noted so far, forgotten ones included.
        answered: reads noted so far, forgotten ones included.
    """

    def __init__(self, *, most_ranges: int = MAX_RANGES, most_reads: int = MAX_READS) -> None:
        self.sent = self.answered = 0
        self.ranges: deque[RangeTimes] = deque(maxlen=most_ranges)
        # Rows of what a Read has, which takes longer to make.
        self.reads: deque[tuple[float, str, int, int, float]] = deque(maxlen=most_reads)

    def of(self, device: str) -> DeviceRanges:
        """What notes the requests for the device of that name."""
        return DeviceRanges(self, device)

    def read(self, device: str, offset: int, length: int, wait_s: float) -> None:
        """Note an answered read."""
        self.answered += 1
        self.reads.append((_now(), device, offset, length, wait_s))

    def since(self, began: float, devices: Collection[str]) -> tuple[list[RangeTimes], list[Read]]:
        """What was asked for and read of these devices since a moment."""
        return (
            [one for one in self.ranges if one.queued >= began and one.device in devices],
            [Read(*row) for row in self.reads if row[0] >= began and row[1] in devices],
        )


#: The range that the running task has asked for: connections are not told whose request they carry.
timed_range: ContextVar[RangeTimes | None] = ContextVar("timed_range", default=None)


def answered() -> None:
    """Note that the head of an answer has come, for whoever's request it is."""
    if (times := timed_range.get()) is not None:
        times.answered = _now()
