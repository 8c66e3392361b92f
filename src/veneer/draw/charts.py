"""The plots of a report: distributions, ratios, time over distance, bytes over time, places over time."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from veneer.draw.plot import Axis, Plot
from veneer.draw.scale import Scale, bytes_text, ms_text, number_text
from veneer.draw.style import SERIES
from veneer.draw.svg import Drawing
from veneer.timing.record import TimingRecord

__all__ = [
    "Bar",
    "Curve",
    "draw_arrivals",
    "draw_bars",
    "draw_bytes",
    "draw_cdf",
    "draw_curves",
    "draw_places",
    "touched",
]


@dataclass(frozen=True, slots=True)
class Curve:
    """A series of points.

    Args:
        name: in the legend.
        look: number of its colour.
        points: x and y, in ascending order of x.
        intervals: low and high of y, one for each point, or none at all.
    """

    name: str
    look: int
    points: tuple[tuple[float, float], ...]
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its interval.

    Args:
        group: written once, above the bars that have it.
        name: beside the bar.
        look: number of its colour.
        value: how long it is.
        low: of the interval.
        high: of the interval.
        aim: a mark to reach, if there is one.
    """

    group: str
    name: str
    look: int
    value: float
    low: float
    high: float
    aim: float | None = None


def draw_cdf(title: str, values: Mapping[str, Sequence[float]], looks: Mapping[str, int]) -> Drawing:
    """The part of starts that were ready by a time, in seconds, for each system that has any."""
    found = {name: sorted(seconds) for name, seconds in values.items() if seconds}
    low = min(seconds[0] for seconds in found.values())
    high = max(seconds[-1] for seconds in found.values())
    log = low > 0 and high / low > 8
    start = low / 1.15 if log else 0.0
    x = Axis("seconds until ready", start, max(high * 1.08, start + 1e-3), log)
    legend = [(name, looks[name]) for name in found]
    plot = Plot(title, x, Axis("part of the starts", 0.0, 1.0), legend=legend)
    for name, seconds in found.items():
        points, part = [(x.low, 0.0)], 0.0
        for number, value in enumerate(seconds, 1):
            points += [(value, part), (value, part := number / len(seconds))]
        points.append((x.high, 1.0))
        middle = number_text(seconds[(len(seconds) - 1) // 2])
        plot.line(points, looks[name], tip=f"{name}: {len(seconds)} starts, median {middle} s")
    return plot.drawing


def draw_bars(title: str, bars: Sequence[Bar], *, reference: str, width: float = 760) -> Drawing:
    """Ratios as bars with intervals, the aim of each marked; 1 is ``reference``."""
    row, left, top = 20.0, 168.0, 62.0
    high = max([1.05, *(bar.high * 1.05 for bar in bars), *(bar.aim or 0 for bar in bars)])
    groups = list(dict.fromkeys(bar.group for bar in bars))
    height = top + row * len(bars) + 24 * len(groups) + 30
    drawing = Drawing(width, height, title)
    drawing.text(0, 15, title, "title")
    drawing.text(0, 36, f"ratio to {reference}, paired; shorter is faster", "note")
    drawing.line(width - 210, 32, width - 210, 42, "aim")
    drawing.text(width - 204, 41, "aim: at or left of the mark", "note")
    scale = Scale(0.0, high, left, width - 110)
    y = top
    for group in groups:
        drawing.text(0, y + 13, group, "section")
        y += 24
        for bar in (one for one in bars if one.group == group):
            _bar(drawing, bar, scale, y)
            y += row
    for tick in scale.ticks(8):
        drawing.grid(scale(tick), top, scale(tick), y + 4)
        drawing.text(scale(tick), y + 19, number_text(tick), "tick", anchor="middle")
    drawing.line(scale(1), top, scale(1), y + 4, "limit")
    drawing.text(scale(1) + 4, top + 4, reference, "limitname")
    return drawing


def _bar(drawing: Drawing, bar: Bar, scale: Scale, y: float) -> None:
    drawing.text(scale.start - 10, y + 12, bar.name, "small", anchor="end")
    interval = f"{number_text(bar.low)} to {number_text(bar.high)}"
    tip = f"{bar.group} {bar.name}: {number_text(bar.value)} ({interval})"
    if bar.aim is not None:
        tip += f", aim {number_text(bar.aim)}"
    drawing.rect(scale.start, y + 2, scale(bar.value) - scale.start, 12, f"s{bar.look % SERIES}", tip, round_=2)
    middle = y + 8
    drawing.line(scale(bar.low), middle, scale(bar.high), middle, "whisker")
    for end in (bar.low, bar.high):
        drawing.line(scale(end), middle - 3, scale(end), middle + 3, "whisker")
    if bar.aim is not None:
        drawing.line(scale(bar.aim), y, scale(bar.aim), y + 16, "aim")
    met = "" if bar.aim is None else (" ✓" if bar.value <= bar.aim else " ✗")
    drawing.text(
        scale(max(bar.value, bar.high, bar.aim or 0.0)) + 8, y + 12, f"{number_text(bar.value)}{met}", "small"
    )


def draw_curves(
    title: str,
    curves: Sequence[Curve],
    x_title: str,
    y_title: str,
    *,
    limit: Curve | None = None,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = True,
    bytes_x: bool = False,
    width: float = 560,
) -> Drawing:
    """Curves over one axis, with intervals where they have some.

    Args:
        title: above it.
        curves: at least one point in all.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
        limit: a dashed line below which nothing can be.
        log_x: equal ratios are equally far apart on the horizontal axis.
        log_y: the same of the vertical one.
        zero: the vertical axis begins at 0.
        bytes_x: the horizontal axis is of bytes.
        width: of the drawing.
    """
    points = [point for curve in [*curves, *([limit] if limit else [])] for point in curve.points]
    highs = [high for curve in curves for _, high in curve.intervals]
    xs, ys = [x for x, _ in points], [y for _, y in points] + highs
    low_x, high_x = min(xs), max(xs)
    if log_x:
        low_x, high_x = low_x / 1.2, high_x * 1.2
    else:
        margin = (high_x - low_x or 1.0) * 0.05
        low_x, high_x = low_x - margin, high_x + margin
    if log_y:
        low_y, high_y = min(ys) / 1.2, max(ys) * 1.2
    else:
        low_y = 0.0 if zero else min(ys) - 0.08 * ((max(ys) - min(ys)) or max(ys) or 1.0)
        high_y = max(ys) + 0.08 * ((max(ys) - low_y) or 1.0)
    plot = Plot(
        title,
        Axis(x_title, low_x, high_x, log_x, bytes_text if bytes_x else number_text),
        Axis(y_title, low_y, high_y, log_y),
        legend=[(curve.name, curve.look) for curve in curves],
        width=width,
    )
    for curve in curves:
        plot.line(curve.points, curve.look)
        for number, (x, y) in enumerate(curve.points):
            if curve.intervals:
                plot.whisker(x, *curve.intervals[number])
            shown = bytes_text(x) if bytes_x else number_text(x)
            plot.dot(x, y, curve.look, f"{curve.name}: {number_text(y)} at {shown}")
    if limit is not None and limit.points:
        plot.limit(limit.points, limit.name)
    return plot.drawing


def draw_arrivals(title: str, curves: Sequence[Curve], needed: float | None) -> Drawing:
    """Bytes that have come over time, in seconds and bytes; what a curve has above ``needed`` is waste."""
    megabytes = 1e6
    end = max(x for curve in curves for x, _ in curve.points)
    most = max([needed or 0.0, *(y for curve in curves for _, y in curve.points), 1.0]) / megabytes
    first = min(curve.points[-1][0] for curve in curves)
    log = first > 0 and end / first > 8
    x = Axis("seconds since the command was started", first / 20 if log else 0.0, end * 1.05, log)
    legend = [(curve.name, curve.look) for curve in curves]
    plot = Plot(title, x, Axis("MB through the line", 0.0, most * 1.08), legend=legend)
    for curve in curves:
        points, so_far = [(x.low, 0.0)], 0.0
        for at, size in curve.points:
            points += [(max(at, x.low), so_far / megabytes), (max(at, x.low), size / megabytes)]
            so_far = size
        plot.line(
            points, curve.look, tip=f"{curve.name}: {bytes_text(so_far)} by {number_text(points[-1][0])} s"
        )
        plot.dot(*points[-1], curve.look, f"{curve.name}: {bytes_text(so_far)}")
    if needed:
        plot.limit([(x.low, needed / megabytes), (x.high, needed / megabytes)], "needed")
    return plot.drawing


def touched(record: TimingRecord, but: Collection[int] = ()) -> list[tuple[float, int]]:
    """When bytes of devices were read for the first time, in ms, and how many; ``but`` are left out."""
    seen: dict[int, set[int]] = {}
    page = 4096
    out: list[tuple[float, int]] = []
    for read in record.reads:
        if read.device in but:
            continue
        pages = seen.setdefault(read.device, set())
        wanted = set(range(read.offset // page, -(-(read.offset + read.length) // page)))
        if new := wanted - pages:
            pages |= new
            out.append((read.at, min(len(new) * page, read.length)))
    return out


def draw_bytes(title: str, record: TimingRecord) -> Drawing:
    """Bytes of devices that have come, and those of them that were read: between the two is waste so far."""
    came = sorted((one.last_byte, one.plain_length) for one in record.ranges if one.last_byte is not None)
    read = touched(record)
    end = max(record.end, 1.0)
    total, used = sum(size for _, size in came), sum(size for _, size in read)
    plot = Plot(
        title,
        Axis("milliseconds since the command was started", 0.0, end * 1.02),
        Axis("MiB, uncompressed", 0.0, max(total, used, 1) * 1.08 / _MIB),
    )
    curves = [("waste", "l4", came, total, "have come"), ("need", "l2", read, used, "were read")]
    for look, line, steps, size, name in curves:
        points, so_far = [plot.at(0, 0)], 0
        for at, more in steps:
            points.append(plot.at(at, so_far / _MIB))
            so_far += more
            points.append(plot.at(at, so_far / _MIB))
        points.append(plot.at(plot.x.high, so_far / _MIB))
        plot.drawing.area([*points, plot.at(plot.x.high, 0)], f"{look} wash")
        plot.drawing.path(points, line, f"{bytes_text(size)} {name}")
    facts = _waste_text(record)
    plot.drawing.text(0, 29, facts, "note")
    return plot.drawing


def _waste_text(record: TimingRecord) -> str:
    """What came and was read. Of a pack that is there as a whole, the kernel reads without asking."""
    packs = {number for number, device in enumerate(record.devices) if device.kind == "pack"}
    came = [one for one in record.ranges if one.last_byte is not None]
    pack = sum(one.plain_length for one in came if one.device in packs)
    layers = sum(one.plain_length for one in came if one.device not in packs)
    parts = [f"pack {bytes_text(pack)}, reads not seen once it is there"] if pack else []
    if layers:
        used = sum(size for _, size in touched(record, but=packs))
        never = 100 * max(0, layers - used) / layers
        parts.append(f"layers {bytes_text(layers)}, {bytes_text(used)} read, {never:.0f} % never so far")
    return "; ".join(parts)


def draw_places(title: str, record: TimingRecord, *, width: float = 560, height: float = 320) -> Drawing:
    """Where on the devices bytes came from, and where they were read first, over time.

    Devices that something was asked or read of are stacked. The darker a cell, the more of it was read for the
    first time just then.
    """
    shown = {one.device for one in record.ranges} | {read.device for read in record.reads}
    sizes = [max(1, device.size) if n in shown else 0 for n, device in enumerate(record.devices)]
    bases = [sum(sizes[:number]) for number in range(len(sizes))]
    whole = sum(sizes) or 1
    plot = Plot(
        title,
        Axis("milliseconds since the command was started", 0.0, max(record.end, 1.0) * 1.02),
        Axis("MiB, devices stacked", 0.0, whole / _MIB),
        width=width,
        height=height,
    )
    draw = plot.drawing
    draw.text(0, 29, "wide: range requests, from sent to ready; dark: first touched by a reader", "note")
    for number, (base, device) in enumerate(zip(bases, record.devices, strict=True)):
        if number not in shown:
            continue
        if base:
            draw.line(plot.x.start, plot.y(base / _MIB), plot.x.end, plot.y(base / _MIB), "axis")
        name = f"{device.kind} {device.blob[7:19]}" if device.kind == "pack" else f"layer {number + 1}"
        draw.text(plot.x.end - 3, plot.y((base + sizes[number]) / _MIB) + 11, name, "tiny", anchor="end")
    for one in record.ranges:
        low = bases[one.device] + one.plain_offset
        top = plot.y((low + one.plain_length) / _MIB)
        tip = f"{one.priority}: {bytes_text(one.plain_length)}, ready {ms_text(one.ended)}"
        wide = max(1.0, plot.x(one.ended) - plot.x(one.sent))
        draw.rect(plot.x(one.sent), top, wide, max(1.2, plot.y(low / _MIB) - top), "transfer wash", tip)
    for column, row, level in _cells(record, plot, bases):
        draw.rect(column, row, _CELL, _CELL, f"heat{level}")
    return draw


_MIB = 1 << 20
#: Edge of a cell, in pixels, and how many grades of it there are.
_CELL = 3.0
_GRADES = 4


def _cells(record: TimingRecord, plot: Plot, bases: Sequence[int]) -> list[tuple[float, float, int]]:
    """Cells with first touches: left, top, grade from 1 up."""
    counts: dict[tuple[int, int], int] = {}
    seen: dict[int, set[int]] = {}
    page = 4096
    for read in record.reads:
        pages = seen.setdefault(read.device, set())
        for number in range(read.offset // page, -(-(read.offset + read.length) // page)):
            if number not in pages:
                pages.add(number)
                x, y = plot.x(read.at), plot.y((bases[read.device] + number * page) / _MIB)
                key = int(x // _CELL), int(y // _CELL)
                counts[key] = counts.get(key, 0) + 1
    most = max(counts.values(), default=1)
    return [
        (column * _CELL, row * _CELL, max(1, math.ceil(_GRADES * math.log1p(count) / math.log1p(most))))
        for (column, row), count in counts.items()
    ]
