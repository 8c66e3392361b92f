"""The timing record of one start, as a value and as JSON. Specified in ``docs/reference/timing.md``.

Times are milliseconds since the record's zero, which is a moment of CLOCK_MONOTONIC: records that were made on
one machine since it booted can be laid over each other.

Nothing in a record is believed: it is small enough to look at, and its numbers are numbers. Whoever draws one
escapes its texts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Self

from veneer.errors import UnsupportedFormat
from veneer.oci.canonical import Json, parse_json
from veneer.timing.facts import Facts, bad, count, number, text
from veneer.timing.recorder import Timing

__all__ = [
    "MAX_RECORD_SIZE",
    "TIMING_TYPE",
    "TimedDevice",
    "TimedMark",
    "TimedPhase",
    "TimedRange",
    "TimedRead",
    "TimingRecord",
]

#: In the document; another version has another name.
TIMING_TYPE = "application/vnd.veneer.timing.v1+json"
#: Several times what a full log of requests and reads takes.
MAX_RECORD_SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class TimedDevice:
    """A device that ranges are of.

    Args:
        blob: digest of its blob.
        kind: ``layer`` or ``pack``.
        size: of the device, in bytes.
        stored_size: of the blob.
    """

    blob: str
    kind: str
    size: int
    stored_size: int


class TimedPhase(NamedTuple):
    """Something that took time.

    Args:
        process: whose: ``cli`` or ``daemon``, which stands for whoever serves the mount.
        name: what, as listed in the reference.
        began: ms.
        ended: ms; None when it was going on still.
    """

    process: str
    name: str
    began: float
    ended: float | None


class TimedMark(NamedTuple):
    """Something that happened at one moment; ``at`` in ms."""

    process: str
    name: str
    at: float


@dataclass(frozen=True, slots=True)
class TimedRange:
    """One range request; see :class:`~veneer.timing.recorder.RangeTimes`. Times in ms.

    Args:
        device: index into the record's devices.
        offset: in the blob.
        length: in the blob.
        plain_offset: in the device.
        plain_length: in the device.
        spans: how many it is for.
        priority: ``demand``, ``profile``, ``stream``, ``readahead``, ``completion`` or ``bulk``.
        queued: when it was asked for.
        sent: when it left.
        first_byte: None when nothing came.
        last_byte: when the latest byte came.
        ready: when what came was verified, decoded and written; None when that never happened.
        busy: how long that took, part of it maybe before the last byte.
        error: why it failed, or None.
    """

    device: int
    offset: int
    length: int
    plain_offset: int
    plain_length: int
    spans: int
    priority: str
    queued: float
    sent: float
    first_byte: float | None
    last_byte: float | None
    ready: float | None
    busy: float
    error: str | None

    def later(self, by: float) -> "TimedRange":
        """The same, so many ms later."""
        return replace(
            self,
            queued=_later(self.queued, by),
            sent=_later(self.sent, by),
            first_byte=_known_later(self.first_byte, by),
            last_byte=_known_later(self.last_byte, by),
            ready=_known_later(self.ready, by),
        )

    @property
    def ended(self) -> float:
        """The last that is known of it."""
        return max(t for t in (self.sent, self.first_byte, self.last_byte, self.ready) if t is not None)


class TimedRead(NamedTuple):
    """An answered read of a device.

    Args:
        at: when it was answered, in ms.
        device: index into the record's devices.
        offset: in the device.
        length: in bytes.
        wait: how long it waited, in ms.
    """

    at: float
    device: int
    offset: int
    length: int
    wait: float


@dataclass(frozen=True, slots=True)
class TimingRecord:
    """What took how long in one start.

    Args:
        image: the reference.
        digest: of the manifest.
        backend: how it was mounted.
        command: what ran; empty when nothing did.
        zero_s: the moment from which times are counted, in seconds of CLOCK_MONOTONIC.
        phases: in the order in which they ended.
        marks: moments.
        devices: of the mount.
        ranges: in the order in which they were sent.
        reads: in the order in which they were answered.
        lost_ranges: requests of the store since its start, of this mount or not, that are not kept any more.
        lost_reads: the same of reads.
    """

    image: str
    digest: str
    backend: str
    command: tuple[str, ...]
    zero_s: float
    phases: tuple[TimedPhase, ...]
    marks: tuple[TimedMark, ...]
    devices: tuple[TimedDevice, ...]
    ranges: tuple[TimedRange, ...]
    reads: tuple[TimedRead, ...]
    lost_ranges: int = 0
    lost_reads: int = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that all ranges asked for."""
        return sum(one.length for one in self.ranges)

    @property
    def end(self) -> float:
        """The last moment that anything is known of, in ms; at least 0."""
        times = [mark.at for mark in self.marks] + [one.ended for one in self.ranges]
        times += [read.at for read in self.reads]
        times += [phase.began if phase.ended is None else phase.ended for phase in self.phases]
        return max(times, default=0.0)

    def mark(self, name: str) -> float | None:
        """When something happened last, or None."""
        return next((mark.at for mark in reversed(self.marks) if mark.name == name), None)

    def lasted(self, name: str) -> float | None:
        """How long the phase of that name took, all times together; None if it never ended."""
        times = [one.ended - one.began for one in self.phases if one.name == name and one.ended is not None]
        return sum(times) if times else None

    def with_command(self, timing: Timing, command: Sequence[str]) -> "TimingRecord":
        """The same with what the command line noted, whose beginning becomes zero."""
        zero_s = timing.began
        by = 1e3 * (self.zero_s - zero_s)
        phases = [
            TimedPhase(
                "cli", one.name, _ms(one.began, zero_s), None if one.ended is None else _ms(one.ended, zero_s)
            )
            for one in timing.phases
        ]
        marks = [TimedMark("cli", one.name, _ms(one.at, zero_s)) for one in timing.marks]
        phases += [
            one._replace(began=_later(one.began, by), ended=_known_later(one.ended, by)) for one in self.phases
        ]
        marks += [one._replace(at=_later(one.at, by)) for one in self.marks]
        return replace(
            self,
            zero_s=zero_s,
            phases=tuple(sorted(phases, key=lambda one: (one.began, one.name))),
            marks=tuple(sorted(marks, key=lambda one: one.at)),
            ranges=tuple(one.later(by) for one in self.ranges),
            reads=tuple(one._replace(at=_later(one.at, by)) for one in self.reads),
            command=tuple(command),
        )

    def to_json(self) -> dict[str, Json]:
        """The document."""
        members = asdict(self)
        for name in ("phases", "marks"):
            members[name] = [one._asdict() for one in getattr(self, name)]
        members["reads"] = [list(one) for one in self.reads]
        document: dict[str, Json] = {"mediaType": TIMING_TYPE, "bytes_fetched": self.bytes_fetched}
        document.update(members)
        return document

    @classmethod
    def parse(cls, data: bytes, what: str = "timing record") -> Self:
        """Read a document. Raises IntegrityError, or UnsupportedFormat for another version."""
        return cls.from_json(parse_json(data, what, limit=MAX_RECORD_SIZE))

    @classmethod
    def from_json(cls, value: Json) -> Self:
        """Read what :meth:`to_json` made. Raises as :meth:`parse`."""
        facts = Facts(value, "it")
        if facts.get("mediaType") != TIMING_TYPE:
            raise UnsupportedFormat(
                f"no timing record of a known version: {str(facts.get('mediaType'))[:80]!r}"
            )
        devices = tuple(map(_device, facts.objects("devices")))
        return cls(
            image=facts.text("image"),
            digest=facts.text("digest"),
            backend=facts.text("backend"),
            command=facts.texts("command"),
            zero_s=facts.number("zero_s"),
            phases=tuple(
                TimedPhase(one.text("process"), one.text("name"), one.number("began"), one.time("ended"))
                for one in facts.objects("phases")
            ),
            marks=tuple(
                TimedMark(one.text("process"), one.text("name"), one.number("at"))
                for one in facts.objects("marks")
            ),
            devices=devices,
            ranges=tuple(_range(one, len(devices)) for one in facts.objects("ranges")),
            reads=tuple(_read(row, len(devices)) for row in facts.rows("reads")),
            lost_ranges=facts.count("lost_ranges"),
            lost_reads=facts.count("lost_reads"),
        )


# Moving


def _ms(at: float, zero_s: float) -> float:
    return round(1e3 * (at - zero_s), 3)


def _later(at: float, by: float) -> float:
    return round(at + by, 3)


def _known_later(at: float | None, by: float) -> float | None:
    return None if at is None else _later(at, by)


# Reading


def _device(facts: Facts) -> TimedDevice:
    return TimedDevice(facts.text("blob"), facts.text("kind"), facts.count("size"), facts.count("stored_size"))


def _range(facts: Facts, devices: int) -> TimedRange:
    device = facts.count("device")
    if device >= devices:
        raise bad("a range is of no device")
    error = facts.get("error")
    return TimedRange(
        device=device,
        offset=facts.count("offset"),
        length=facts.count("length"),
        plain_offset=facts.count("plain_offset"),
        plain_length=facts.count("plain_length"),
        spans=facts.count("spans"),
        priority=facts.text("priority"),
        queued=facts.number("queued"),
        sent=facts.number("sent"),
        first_byte=facts.time("first_byte"),
        last_byte=facts.time("last_byte"),
        ready=facts.time("ready"),
        busy=facts.number("busy"),
        error=None if error is None else text(error, "error"),
    )


def _read(row: list[Json], devices: int) -> TimedRead:
    if len(row) != 5:
        raise bad("a read is no list of time, device, offset, length and wait")
    device = count(row[1], "device of a read")
    if device >= devices:
        raise bad("a read is of no device")
    return TimedRead(
        number(row[0], "time of a read"),
        device,
        count(row[2], "offset of a read"),
        count(row[3], "length of a read"),
        number(row[4], "wait of a read"),
    )
