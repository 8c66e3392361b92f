"""Known data give known figures."""

import random
import statistics as stdlib
from dataclasses import replace

import pytest

from tests.lab.test_records import RUN
from veneer.lab.records import RunEvent
from veneer.lab.statistics import (
    bootstrap,
    geometric_mean,
    paired_ratios,
    percentile,
    ratio_of,
    summary_of,
)


def run(system: str, block: int, seconds: float | None, image: str = "base") -> RunEvent:
    outcome = "failed" if seconds is None else "ok"
    return replace(RUN, image=image, system=system, block=block, seconds=seconds, outcome=outcome)


def test_percentiles_are_those_of_the_textbook() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert percentile(values, 0.4) == pytest.approx(29.0)
    assert percentile(values[::-1], 0.0) == 15.0
    assert percentile(values, 1.0) == 50.0
    assert percentile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError):
        percentile([], 0.5)


def test_a_geometric_mean_takes_twice_and_half_for_the_same() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([0.1, 0.1, 0.8]) == pytest.approx(0.2)
    for wrong in ([], [1.0, 0.0]):
        with pytest.raises(ValueError):
            geometric_mean(wrong)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    source, held = random.Random(5), 0
    for _ in range(200):
        values = [source.lognormvariate(0.0, 0.5) for _ in range(25)]
        low, high = bootstrap(values, stdlib.median, resamples=200)
        held += low <= 1.0 <= high  # the median of that distribution
    assert 180 <= held <= 199


def test_the_same_events_give_the_same_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert bootstrap(values, stdlib.median) == bootstrap(values, stdlib.median)
    assert bootstrap(values, stdlib.median, seed=2, resamples=7) != bootstrap(
        values, stdlib.median, seed=3, resamples=7
    )
    estimate = summary_of(values)
    assert (estimate.count, estimate.median, estimate.smallest, estimate.largest) == (5, 4.0, 1.0, 16.0)
    assert estimate.low <= estimate.median <= estimate.high


def test_runs_are_compared_in_their_block_only() -> None:
    runs = [
        run("veneer-none", 1, 1.0),
        run("containerd", 0, 10.0),
        run("veneer-none", 0, 1.0),
        run("containerd", 1, 2.0),
        run("veneer-none", 2, 5.0),
        run("containerd", 2, None),  # failed: no pair
        run("veneer-none", -1, 9.0),  # a start for its record
        run("containerd", -1, 9.0),
        run("containerd", 0, 1.0, image="gcc"),
    ]
    ratios = paired_ratios(runs, "containerd")
    assert ratios["base", "0ms", "veneer-none"] == [0.1, 0.5]
    assert ratios["base", "0ms", "containerd"] == [1.0, 1.0]
    assert ratios["gcc", "0ms", "containerd"] == [1.0]
    ratio = ratio_of(ratios["base", "0ms", "veneer-none"])
    assert ratio.count == 2
    assert ratio.median == pytest.approx(0.3)
    assert ratio.mean == pytest.approx(0.05**0.5)
