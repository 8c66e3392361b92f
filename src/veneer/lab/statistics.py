"""Statistics of starts: medians and percentiles with bootstrap intervals, and ratios of pairs.

Times of starts are skewed and few, so nothing here assumes a distribution: intervals are percentiles of
medians of resampled values (Efron 1979), from a generator with a seed, so that the same events give the same
figures. Systems are compared by the ratio of two runs of the same block, which whatever slowed the machine
down met alike. A ratio's interval says how sure its median is; with three pairs it is wide, and that is what
it should say.
"""

import math
import random
import statistics as stdlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from veneer.lab.records import RunEvent

__all__ = [
    "Estimate",
    "Ratio",
    "bootstrap",
    "geometric_mean",
    "paired_ratios",
    "percentile",
    "ratio_of",
    "summary_of",
]

CONFIDENCE = 0.95
RESAMPLES = 2_000
SEED = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with its interval, and the tail.

    Args:
        count: how many values.
        median: of them.
        low: where its 95 % interval begins.
        high: where it ends.
        p90: ninetieth percentile.
        p95: ninety-fifth; with fewer than 20 values it is close to the largest.
        smallest: of all.
        largest: of all.
    """

    count: int
    median: float
    low: float
    high: float
    p90: float
    p95: float
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratios of pairs: their median and geometric mean, each with its 95 % interval as (low, high)."""

    count: int
    median: float
    median_interval: tuple[float, float]
    mean: float
    mean_interval: tuple[float, float]


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which ``part`` (0 to 1) of the others are. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios. Raises ValueError when one is not positive, or there are none."""
    if not values or min(values) <= 0:
        raise ValueError("a geometric mean is of positive values")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """The percentile interval of a statistic; the same arguments give the same interval."""
    source = random.Random(seed)
    made = [statistic(source.choices(values, k=len(values))) for _ in range(resamples)]
    outside = (1 - confidence) / 2
    return percentile(made, outside), percentile(made, 1 - outside)


def summary_of(values: Sequence[float]) -> Estimate:
    """A median with everything around it. Raises ValueError without values."""
    low, high = bootstrap(values, stdlib.median)
    return Estimate(
        len(values),
        stdlib.median(values),
        low,
        high,
        percentile(values, 0.9),
        percentile(values, 0.95),
        min(values),
        max(values),
    )


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Median and geometric mean of ratios. Raises ValueError without ratios."""
    return Ratio(
        len(ratios),
        stdlib.median(ratios),
        bootstrap(ratios, stdlib.median),
        geometric_mean(ratios),
        bootstrap(ratios, geometric_mean),
    )


def paired_ratios(
    runs: Iterable[RunEvent],
    reference: str,
    time_of: Callable[[RunEvent], float | None] = lambda run: run.seconds,
) -> Mapping[tuple[str, str, str], list[float]]:
    """Time of a run by that of the reference in the same block: by (image, network, system), in blocks' order.

    Blocks where one of the two has no time are left out; those of a timing record are no blocks.
    """
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for run in runs:
        if (seconds := time_of(run)) is not None and run.block >= 0:
            times.setdefault((run.image, run.network, run.block), {})[run.system] = seconds
    out: dict[tuple[str, str, str], list[float]] = {}
    for (image, network, _), by_system in sorted(times.items()):
        if reference not in by_system:
            continue
        for system, seconds in by_system.items():
            out.setdefault((image, network, system), []).append(seconds / by_system[reference])
    return out
