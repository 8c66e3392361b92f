"""A start as a waterfall: phases on top, below them every range request with queue, wait, transfer, verify.

Up to :data:`MOST_ROWS` requests have a row each, with what they are; more than that share rows, as requests
that run at different times can. Below, on the same axis: readers that wait, and the bytes that have come.
"""

from collections.abc import Sequence

from veneer.draw.scale import Scale, bytes_text, ms_text
from veneer.draw.svg import Drawing, joined
from veneer.timing.record import TimedPhase, TimedRange, TimingRecord

__all__ = ["MOST_ROWS", "draw_waterfall"]

#: Requests that get a row each.
MOST_ROWS = 120

_WIDTH, _LEFT, _RIGHT = 1200.0, 284.0, 84.0
_ROW, _BAR = 17.0, 11.0
_LANE = 9.0
_BYTES_HEIGHT = 74.0
_SEGMENTS = (
    ("queue", "queued, not sent yet"),
    ("wait", "waiting for the first byte"),
    ("transfer", "bytes arrive"),
    ("verify", "verify, decode, write"),
)
#: Width of a letter of a mark's name, which is written lower where it would touch another one.
_MARK_LETTER = 6.9


def draw_waterfall(record: TimingRecord, *, note: str = "") -> Drawing:
    """The drawing of a start. ``note`` goes below its title."""
    return _Waterfall(record).draw(note)


class _Waterfall:
    """One drawing while it is made; ``y`` is how far down it is."""

    def __init__(self, record: TimingRecord) -> None:
        self.record = record
        end = max(record.end, 1.0)
        self.x = Scale(0.0, end * 1.02, _LEFT, _WIDTH - _RIGHT)
        self.drawing = Drawing(_WIDTH, 0, f"Waterfall of a start of {record.image}")
        self.y = 0.0

    def draw(self, note: str) -> Drawing:
        """Everything, from top to bottom."""
        self._head(note)
        top = self.y + 20
        axis = self._marks()
        self._section("PHASES")
        for phase in self._phases():
            self._phase(phase)
        ranges = self.record.ranges
        if ranges:
            self.y += 10
            self._section(self._ranges_name())
            if len(ranges) <= MOST_ROWS:
                for one in ranges:
                    self._range_row(one)
            else:
                self._lanes(ranges)
            self.y += 8
            self._waiting()
            self._bytes()
        self._grid(top, axis)
        self.drawing.height = self.y + 34
        return self.drawing

    # Head

    def _head(self, note: str) -> None:
        record, draw = self.record, self.drawing
        draw.text(20, 30, _short(record.image, 90), "head")
        command = " ".join(record.command)
        draw.text(20, 50, _short(command, 130) if command else "mounted, nothing run", "mono sub")
        facts = joined(
            [
                f"first output {ms_text(at)}" if (at := record.mark("first output")) is not None else "",
                f"end {ms_text(at)}" if (at := record.mark("end")) is not None else "",
                f"mounted {ms_text(at)}" if (at := record.mark("mounted")) is not None else "",
                f"{len(record.ranges)} range requests, {bytes_text(record.bytes_fetched)}",
                record.backend,
                record.digest[:19],
                note,
            ]
        )
        draw.text(20, 70, facts, "sub")
        x = _LEFT
        for look, name in _SEGMENTS:
            draw.rect(x, 82, 11, 11, look, round_=2)
            draw.text(x + 16, 91.5, name, "small")
            x += 26 + 6.1 * len(name)
        self.y = 100.0

    def _marks(self) -> float:
        """Names of the marks; returns where the axis begins."""
        self.y += 12
        taken: list[list[tuple[float, float]]] = []
        for mark in sorted(self.record.marks, key=lambda one: one.at):
            x, name = self.x(mark.at), f"{mark.name} {ms_text(mark.at)}"
            width = _MARK_LETTER * len(name) + 8
            flipped = x + width > _WIDTH
            low, high = (x - width, x) if flipped else (x, x + width)
            level = next(
                (n for n, row in enumerate(taken) if all(high <= a or b <= low for a, b in row)), len(taken)
            )
            if level == len(taken):
                taken.append([])
            taken[level].append((low, high))
            anchor = "end" if flipped else "start"
            at = x - 4 if flipped else x + 4
            self.drawing.text(at, self.y + 12 + 14 * level, name, "markname", anchor=anchor)
        levels = max(1, len(taken))
        self.y += 14 * levels + 6
        return self.y

    def _section(self, name: str) -> None:
        self.drawing.text(20, self.y + 14, name, "section")
        self.y += 20

    # Phases

    def _phases(self) -> list[TimedPhase]:
        return sorted(self.record.phases, key=lambda one: (one.began, -(one.ended or 0)))

    def _phase(self, phase: TimedPhase) -> None:
        end = self.x.high if phase.ended is None else phase.ended
        x, width = self.x(phase.began), max(1.5, self.x(end) - self.x(phase.began))
        self.drawing.text(_LEFT - 12, self.y + 11, phase.name, anchor="end")
        self.drawing.text(20, self.y + 11, phase.process, "note")
        look = "cli" if phase.process == "cli" else "daemon"
        lasted = "goes on" if phase.ended is None else ms_text(phase.ended - phase.began)
        tip = f"{phase.name}: {lasted}, from {ms_text(phase.began)}"
        self.drawing.rect(x, self.y + 2, width, _BAR, look, tip, round_=2)
        self._beside(x, width, lasted)
        self.y += _ROW

    def _beside(self, x: float, width: float, text: str) -> None:
        """A text right of a bar, or left of it at the right edge."""
        if x + width + 7 * len(text) + 6 < _WIDTH:
            self.drawing.text(x + width + 5, self.y + 11, text, "note")
        else:
            self.drawing.text(x - 5, self.y + 11, text, "note", anchor="end")

    # Ranges

    def _ranges_name(self) -> str:
        record = self.record
        lost = f"; {record.lost_ranges} earlier requests are not kept" if record.lost_ranges else ""
        name = "RANGE" if len(record.ranges) == 1 else "RANGES"
        return f"{len(record.ranges)} {name}, IN THE ORDER SENT{lost}"

    def _range_row(self, one: TimedRange) -> None:
        device = self.record.devices[one.device]
        name = device.kind if device.kind == "pack" else f"layer {one.device + 1}"
        self.drawing.text(20, self.y + 11, name, "note")
        self.drawing.text(72, self.y + 11, one.priority, "note")
        where = f"{bytes_text(one.length)} at {bytes_text(one.offset)}"
        self.drawing.text(_LEFT - 12, self.y + 11, where, "small", anchor="end")
        self._bar(one, self.y + 2, _BAR)
        x = self.x(one.sent)
        self._beside(x, self.x(one.ended) - x, one.error or ms_text(one.ended - one.sent))
        self.y += _ROW

    def _lanes(self, ranges: Sequence[TimedRange]) -> None:
        """Requests that do not run at the same time share a row."""
        free: list[float] = []
        lanes: list[int] = []
        for one in ranges:
            lane = next((n for n, end in enumerate(free) if end <= one.sent), len(free))
            if lane == len(free):
                free.append(0.0)
            free[lane] = one.ended
            lanes.append(lane)
        for lane, one in zip(lanes, ranges, strict=True):
            self._bar(one, self.y + lane * (_LANE + 2), _LANE, queue=False)
        self.drawing.text(_LEFT - 12, self.y + 10, "requests at the same time", "small", anchor="end")
        self.drawing.text(_LEFT - 12, self.y + 24, f"up to {len(free)}", "note", anchor="end")
        self.y += max(28.0, len(free) * (_LANE + 2))

    def _bar(self, one: TimedRange, y: float, height: float, *, queue: bool = True) -> None:
        draw, tip = self.drawing, _tip(self.record, one)
        began, ended = self.x(one.sent), self.x(one.ended)
        if queue and one.queued < one.sent:
            x = self.x(one.queued)
            draw.rect(x, y + height / 2 - 1.5, began - x, 3, "queue", tip)
        times = (one.sent, one.first_byte, one.last_byte, one.ready)
        last = one.sent
        for (look, _), at in zip(_SEGMENTS[1:], times[1:], strict=True):
            # Verification of what came first may end before the last bytes come.
            at = one.ended if at is None and look == "wait" else at
            if at is None or at <= last:
                continue
            draw.rect(self.x(last), y, max(0.75, self.x(at) - self.x(last)), height, look, tip)
            last = at
        if one.error is not None:
            draw.rect(began, y, max(2.0, ended - began), height, "failed", f"{tip}; {one.error}")

    # Below

    def _waiting(self) -> None:
        waits = [read for read in self.record.reads if read.wait > 0]
        self.drawing.text(_LEFT - 12, self.y + 11, "readers that wait", "small", anchor="end")
        self.drawing.text(
            20, self.y + 11, f"{len(waits)} of {len(self.record.reads)}" if waits else "none", "note"
        )
        for read in waits:
            x = self.x(read.at - read.wait)
            tip = f"waited {ms_text(read.wait)} for {bytes_text(read.length)} at {bytes_text(read.offset)}"
            self.drawing.rect(x, self.y + 2, max(0.75, self.x(read.at) - x), _BAR, "waiting", tip)
        self.y += _ROW + 4

    def _bytes(self) -> None:
        came = sorted((one.last_byte, one.length) for one in self.record.ranges if one.last_byte is not None)
        total = sum(length for _, length in came)
        if not total:
            return
        top, bottom = self.y + 6, self.y + _BYTES_HEIGHT
        scale = Scale(0, total, bottom, top)
        points, so_far = [(self.x(0), bottom)], 0
        for at, length in came:
            points.append((self.x(at), scale(so_far)))
            so_far += length
            points.append((self.x(at), scale(so_far)))
        points.append((self.x(self.x.high), scale(so_far)))
        self.drawing.area([*points, (self.x(self.x.high), bottom)], "transfer wash")
        self.drawing.path(points, "l0")
        self.drawing.text(_LEFT - 12, top + 8, "bytes that have come", "small", anchor="end")
        self.drawing.text(self.x(self.x.high) + 5, top + 4, bytes_text(total), "tick")
        self.y = bottom

    def _grid(self, top: float, axis: float) -> None:
        draw = self.drawing
        bottom = self.y + 6
        for tick in self.x.ticks(9):
            x = self.x(tick)
            draw.grid(x, axis, x, bottom)
            draw.text(x, bottom + 16, ms_text(tick), "tick", anchor="middle")
        draw.line(self.x(0), bottom, self.x(self.x.high), bottom, "axis")
        for mark in self.record.marks:
            x = self.x(mark.at)
            draw.line(x, top - 6, x, bottom, "mark", f"{mark.name} {ms_text(mark.at)}")


def _tip(record: TimingRecord, one: TimedRange) -> str:
    device = record.devices[one.device]
    parts = [
        f"{one.priority}: {bytes_text(one.length)} at {one.offset} of the {device.kind} {device.blob[:19]}",
        f"{one.spans} span" + ("s" if one.spans > 1 else ""),
        f"queued {ms_text(one.sent - one.queued)}",
    ]
    if one.first_byte is not None:
        parts.append(f"waited {ms_text(one.first_byte - one.sent)}")
    if one.first_byte is not None and one.last_byte is not None:
        parts.append(f"transferred in {ms_text(one.last_byte - one.first_byte)}")
    if one.ready is not None and one.last_byte is not None:
        parts.append(
            f"ready {ms_text(one.ready - one.last_byte)} after the last byte, {ms_text(one.busy)} of work"
        )
    return ", ".join(parts)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
