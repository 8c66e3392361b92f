"""The figures of a report, made of a bench's events."""

from collections.abc import Sequence
from itertools import groupby

from veneer.draw.charts import (
    Bar,
    Curve,
    draw_arrivals,
    draw_bars,
    draw_bytes,
    draw_cdf,
    draw_curves,
    draw_places,
)
from veneer.draw.scale import bytes_text, number_text
from veneer.draw.style import SERIES
from veneer.draw.svg import Drawing
from veneer.draw.waterfall import draw_waterfall
from veneer.lab.records import Environment, Event, LimitEvent, RunEvent
from veneer.lab.summary import Row, Summary
from veneer.timing.record import TimingRecord

__all__ = ["Figures"]

#: A system looks the same on every figure of every report.
_LOOKS = {
    "veneer-recorded": 0,
    "veneer-static": 5,
    "veneer-none": 3,
    "veneer-plain": 4,
    "veneer-sidecar": 2,
    "veneer-warm": 9,
    "containerd": 1,
    "parallel-pull": 6,
    "local-warm": 7,
    "local-cold": 8,
}
#: Of the needed bytes; what fetched less had them already.
_LEAST_PART = 0.1
#: Times that differ more than this are shown by ratios.
_WIDE = 12.0


class Figures:
    """Drawings of one result directory.

    Args:
        environment: of it.
        events: all of them.
        summary: computed from them.

    Attributes:
        looks: number of the colour of each system.
        timed: runs with a timing record, by image, network and system.
    """

    def __init__(self, environment: Environment, events: Sequence[Event], summary: Summary) -> None:
        self._environment = environment
        self._summary = summary
        self._runs = [event for event in events if isinstance(event, RunEvent) and event.block >= 0]
        self._limits = {
            (event.image, event.network): event for event in events if isinstance(event, LimitEvent)
        }
        free = [n for n in range(SERIES) if n not in {_LOOKS.get(one) for one in environment.systems}] or [7]
        others = [one for one in environment.systems if one not in _LOOKS]
        self.looks = {
            one: _LOOKS[one] if one in _LOOKS else free[others.index(one) % len(free)]
            for one in environment.systems
        }
        found = [event for event in events if isinstance(event, RunEvent) and event.timing is not None]
        self.timed = [self._with_record(run) for run in _middle(found)]

    @staticmethod
    def _with_record(run: RunEvent) -> tuple[RunEvent, TimingRecord]:
        return run, TimingRecord.from_json(dict(run.timing or {}))  # type: ignore[arg-type] # it is JSON

    def ratios(self, network: str) -> Drawing:
        """Ratios to the reference, image by image."""
        bars = [
            Bar(
                row.image,
                row.system,
                self.looks[row.system],
                row.ratio.median,
                *row.ratio.median_interval,
                row.aim,
            )
            for row in self._rows(network=network)
            if row.ratio is not None and row.system != self._summary.reference
        ]
        reference = self._summary.reference or ""
        return draw_bars(f"Against {reference}, at {network}", bars, reference=reference, width=1000)

    def distribution(self, image: str, network: str) -> Drawing | None:
        """How many of the starts were ready by when; None without any."""
        values: dict[str, list[float]] = {system: [] for system in self._environment.systems}
        for run in self._runs:
            if (run.image, run.network) == (image, network) and run.seconds is not None:
                values[run.system].append(run.seconds)
        if not any(values.values()):
            return None
        return draw_cdf(f"{image}, at {network}: ready by", values, self.looks)

    def can_compare_distances(self, image: str) -> bool:
        """Whether there are times from more than one distance."""
        return len({row.network for row in self._rows(image=image) if row.seconds}) > 1

    def over_distance(self, image: str) -> Drawing:
        """Median times by round-trip time."""
        rtt = {network.name: network.rtt_ms for network in self._environment.networks}
        curves = []
        for system in self._environment.systems:
            rows = [row for row in self._rows(image=image) if row.system == system and row.seconds]
            points = sorted((rtt[row.network], row.seconds) for row in rows if row.seconds)
            if points:
                curves.append(
                    Curve(
                        system,
                        self.looks[system],
                        tuple((x, seconds.median) for x, seconds in points),
                        tuple((seconds.low, seconds.high) for _, seconds in points),
                    )
                )
        limits = sorted(
            (rtt[network], one.seconds) for (of, network), one in self._limits.items() if of == image
        )
        ys = [y for curve in curves for _, y in curve.points] + [y for _, y in limits]
        return draw_curves(
            f"{image}: median time by distance",
            curves,
            "round-trip time, ms",
            "seconds until ready",
            limit=Curve("limit of the model", 0, tuple(limits)) if limits else None,
            log_y=min(ys) > 0 and max(ys) / min(ys) > _WIDE,
        )

    def has_arrivals(self, image: str, network: str) -> bool:
        """Whether it was noted when bytes came."""
        return bool(self._arrived(image, network))

    def arrivals(self, image: str, network: str) -> Drawing:
        """Bytes over time, in the median run of each system."""
        curves = []
        for run in self._arrived(image, network):
            came = zip(run.arrival_s, run.arrival_bytes, strict=True)
            ready = run.seconds or run.arrival_s[-1]
            points = [(at, float(size)) for at, size in came if at <= ready]
            points.append((ready, points[-1][1] if points else 0.0))
            curves.append(Curve(run.system, self.looks[run.system], tuple(points)))
        limit = self._limits.get((image, network))
        return draw_arrivals(
            f"{image}, at {network}: bytes until ready", curves, float(limit.needed_bytes) if limit else None
        )

    def arrivals_text(self, image: str, network: str) -> str:
        """What each system fetched until it was ready, as a multiple of what was needed."""
        limit = self._limits.get((image, network))
        parts = []
        for row in self._rows(image=image, network=network):
            if row.network_bytes > 0:
                part = row.network_bytes / limit.needed_bytes if limit else 0.0
                times = f" ({number_text(part)} x)" if part > _LEAST_PART else ""
                parts.append(f"{row.system} {number_text(row.network_bytes / 1e6)} MB{times}")
        needed = f"Needed {number_text(limit.needed_bytes / 1e6)} MB. " if limit else ""
        return f"{needed}Medians: {', '.join(parts)}."

    def waterfall(self, title: str, record: TimingRecord) -> Drawing:
        """One start."""
        return draw_waterfall(record, note=title)

    def close_up(self, record: TimingRecord) -> list[Drawing]:
        """The same start: bytes and places over time; nothing when it fetched nothing."""
        if not record.ranges:
            return []
        fetched = bytes_text(record.bytes_fetched)
        return [
            draw_bytes(f"Bytes of devices over time ({fetched} fetched)", record),
            draw_places("Places on the devices over time", record),
        ]

    def _rows(self, *, image: str = "", network: str = "") -> list[Row]:
        return [
            row
            for row in self._summary.rows
            if (not image or row.image == image) and (not network or row.network == network)
        ]

    def _arrived(self, image: str, network: str) -> list[RunEvent]:
        found = [run for run in self._runs if (run.image, run.network) == (image, network) and run.arrival_s]
        return sorted(_middle(found), key=lambda run: self._environment.systems.index(run.system))


def _middle(runs: Sequence[RunEvent]) -> list[RunEvent]:
    """Of each image, network and system the run with the median time, in the order they came first."""

    def key(run: RunEvent) -> tuple[str, str, str]:
        return run.image, run.network, run.system

    order = {key(run): number for number, run in reversed([*enumerate(runs)])}
    chosen = []
    for _, group in groupby(sorted(runs, key=lambda run: order[key(run)]), key):
        by_time = sorted(group, key=lambda run: (run.seconds is None, run.seconds or 0.0))
        timed = [run for run in by_time if run.seconds is not None]
        chosen.append(timed[(len(timed) - 1) // 2] if timed else by_time[0])
    return chosen
