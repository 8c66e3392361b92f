"""Figures of a result directory: what the table at the end of a bench says, computed from the events alone."""

import statistics as stdlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.lab.records import LimitEvent, Network, RunEvent, SystemEvent, read_environment, read_events
from veneer.lab.statistics import Estimate, Ratio, paired_ratios, ratio_of, summary_of

__all__ = ["AGAIN_AIM", "AIMS", "Again", "Row", "Summary", "summarize"]

#: What the project aims at: part of containerd's time, by system and network.
AIMS = {
    "veneer-recorded": {"0ms": 0.09, "10ms-1gbit": 0.10, "50ms-100mbit": 0.07},
    "veneer-static": {"0ms": 0.30, "10ms-1gbit": 0.30, "50ms-100mbit": 0.30},
    "veneer-none": {"0ms": 0.20, "10ms-1gbit": 0.30, "50ms-100mbit": 0.40},
    "veneer-plain": {"0ms": 0.50, "10ms-1gbit": 0.55, "50ms-100mbit": 0.80},
    "veneer-sidecar": {"0ms": 0.10, "10ms-1gbit": 0.11, "50ms-100mbit": 0.08},
}
#: And of the time of :data:`_LOCAL` when the same container is started again.
AGAIN_AIM = 1.15
_LOCAL = "local-warm"
_AGAIN = ("veneer-warm", "veneer-warm-always")
#: They are for starts like this one.
AIMED_IMAGES = ("python", "python-sci")


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one image over one network.

    Args:
        image: which.
        network: which.
        system: which.
        failures: runs that have no time.
        seconds: of those that have; None when none has.
        ratio: to the reference, in pairs; None without pairs.
        aim: for the median of the ratio, if there is one.
        to_limit: median by the limit of the model; None when that is not known.
        network_bytes: median.
        requests: median; None where nobody counts them.
    """

    image: str
    network: str
    system: str
    failures: int
    seconds: Estimate | None
    ratio: Ratio | None
    aim: float | None
    to_limit: float | None
    network_bytes: float
    requests: float | None


@dataclass(frozen=True, slots=True)
class Again:
    """A second start, as a part of what an unpacked tree of this machine takes, in pairs.

    Args:
        image: which.
        network: which.
        system: which.
        ready: to the end of the program, told by the last byte that it writes, or to a server's first answer.
        command: to the end of the command, which of veneer's comes when nothing is mounted any more, and of the
            other one before; None for servers.
    """

    image: str
    network: str
    system: str
    ready: Ratio
    command: Ratio | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows, and the limits that they are compared with.

    Args:
        reference: system that ratios are to; None when it did not take part.
        networks: that were used.
        rows: by network, image and system, in the order in which those were asked for.
        overall: geometric mean of the median ratios of all images, by network and system.
        limits: of the model.
        again: second starts next to local ones.
    """

    reference: str | None
    networks: tuple[Network, ...]
    rows: tuple[Row, ...]
    overall: tuple[tuple[str, str, float], ...]
    limits: tuple[LimitEvent, ...]
    again: tuple[Again, ...]

    @property
    def failures(self) -> int:
        """Runs that have no time."""
        return sum(row.failures for row in self.rows)

    def to_json(self) -> dict[str, object]:
        """As ``veneer lab bench --json`` prints it."""
        return asdict(self)


def summarize(directory: Path) -> Summary:
    """Read a result directory. Raises NotFound, IntegrityError, UnsupportedFormat."""
    environment = read_environment(directory)
    runs: list[RunEvent] = []
    found: dict[tuple[str, str], LimitEvent] = {}
    reference: str | None = None
    for event in read_events(directory):
        if isinstance(event, RunEvent) and event.block >= 0:
            runs.append(event)
        elif isinstance(event, LimitEvent):
            found[event.image, event.network] = event
        elif isinstance(event, SystemEvent) and event.reference:
            reference = event.name
    ratios = paired_ratios(runs, reference) if reference else {}
    groups: dict[tuple[str, str, str], list[RunEvent]] = {}
    for run in runs:
        groups.setdefault((run.image, run.network, run.system), []).append(run)
    rows = [
        _row(groups[image, network.name, system], ratios.get((image, network.name, system), []), found)
        for network in environment.networks
        for image in environment.images
        for system in environment.systems
        if (image, network.name, system) in groups
    ]
    again = tuple(_again(runs, [network.name for network in environment.networks]))
    return Summary(reference, environment.networks, tuple(rows), _overall(rows), tuple(found.values()), again)


def _again(runs: Sequence[RunEvent], networks: Sequence[str]) -> Iterator[Again]:
    programs = {run.image for run in runs if run.last_output_s is not None}
    ready = paired_ratios(runs, _LOCAL, _ready)
    commands = paired_ratios([run for run in runs if run.image in programs], _LOCAL)
    for key in sorted(ready, key=lambda key: networks.index(key[1])):
        if key[2] in _AGAIN:
            command = commands.get(key)
            yield Again(*key, ratio_of(ready[key]), ratio_of(command) if command else None)


def _ready(run: RunEvent) -> float | None:
    """When a start was over, unless it does not count."""
    if run.seconds is None or run.last_output_s is None:
        return run.seconds
    return run.last_output_s


def _row(runs: Sequence[RunEvent], ratios: Sequence[float], found: dict[tuple[str, str], LimitEvent]) -> Row:
    first = runs[0]
    times = [run.seconds for run in runs if run.seconds is not None]
    seconds = summary_of(times) if times else None
    limit = found.get((first.image, first.network))
    requests = [run.requests for run in runs if run.requests is not None]
    aimed = AIMS.get(first.system, {}) if first.image in AIMED_IMAGES else {}
    return Row(
        first.image,
        first.network,
        first.system,
        len(runs) - len(times),
        seconds,
        ratio_of(ratios) if ratios else None,
        aimed.get(first.network),
        seconds.median / limit.seconds if seconds and limit else None,
        stdlib.median(run.network_bytes for run in runs),
        stdlib.median(requests) if requests else None,
    )


def _overall(rows: Sequence[Row]) -> tuple[tuple[str, str, float], ...]:
    medians: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            medians.setdefault((row.network, row.system), []).append(row.ratio.median)
    return tuple((*key, ratio_of(values).mean) for key, values in medians.items())
