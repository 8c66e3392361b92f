"""What has to hold for a start to count: one that took another way than its system stands for is a failure."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from veneer.errors import Unavailable
from veneer.lab.bench import Blocks, _Runner
from veneer.lab.build import BuiltImage
from veneer.lab.distance import Counters, Distance, parse_network
from veneer.lab.imageset import ImageSpec, Probe
from veneer.lab.records import ResultWriter, RunEvent
from veneer.lab.systems import Containerd, Facts, Launch, Local, ParallelPull, System
from veneer.lab.variants import Variants
from veneer.lab.veneered import Veneered
from veneer.lab.workplace import Subject, Workplace

STORED = 10 << 20
SUBJECT = Subject(
    ImageSpec("app", "", (), ("true",), Probe("exit"), {}),
    BuiltImage("app", "", f"sha256:{'0' * 64}", 1, STORED, 2 * STORED, ()),
    Path("/nowhere"),
)


def counters(bytes_down: int = 0) -> Counters:
    return Counters(bytes_down, 0, 0, 0.0, ())


class Place(Workplace):
    """Leaves the page cache of this machine alone."""

    def drop_page_cache(self) -> None:
        pass


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, 0)


@pytest.fixture
def variants(place: Place, tmp_path: Path) -> Variants:
    return Variants(place, tmp_path, lambda *_: None)


def held(system: System, report: object = None, bytes_down: int = 0) -> bool:
    """Whether a start counts after which the counters say so."""
    if report is not None:
        (system.place.directory / "report.json").write_text(json.dumps(report))
    return all(system.facts(SUBJECT, counters(bytes_down)).checks.values())


def report(
    fetched: int, pack: Mapping[str, object] | None = None, *, spans: int = 0, cached: int = 5
) -> dict[str, object]:
    store, layers = {"spans_fetched": spans}, [{"cached_spans": cached}, {"cached_spans": 2}]
    return {
        "bytes_fetched": fetched,
        "requests": 3,
        "report": {"pack": pack, "store": store, "layers": layers},
    }


@pytest.fixture(autouse=True)
def first_report(tmp_path: Path) -> None:
    """Of the start before a warm one."""
    (tmp_path / "first-report.json").write_text(json.dumps(report(1000)))


@pytest.mark.parametrize("name", ["veneer-recorded", "veneer-static", "veneer-sidecar", "veneer-warm"])
def test_a_start_that_did_not_use_its_pack_does_not_count(place: Place, variants: Variants, name: str) -> None:
    system = Veneered(place, variants, name)
    assert held(system, report(1000, {"mapped": True}))
    assert not held(system, report(1000, {"mapped": False}))
    assert not held(system, report(1000))


@pytest.mark.parametrize("name", ["veneer-recorded", "veneer-static", "veneer-sidecar", "veneer-none"])
def test_a_lazy_start_that_fetched_everything_does_not_count(
    place: Place, variants: Variants, name: str
) -> None:
    system = Veneered(place, variants, name)
    assert held(system, report(STORED - 1, {"mapped": True}))
    assert not held(system, report(STORED, {"mapped": True}))


def test_a_warm_start_that_fetched_something_again_does_not_count(place: Place, variants: Variants) -> None:
    system = Veneered(place, variants, "veneer-warm")
    pack = {"mapped": True}
    assert held(system, report(1000, pack))
    assert held(system, report(1000, pack, spans=2, cached=7)), "no two starts read the same"
    assert not held(system, report(1000, pack, spans=2, cached=6))
    assert not held(system, report(1000, pack, spans=1))


def test_a_start_of_veneer_without_counters_does_not_count(place: Place, variants: Variants) -> None:
    system = Veneered(place, variants, "veneer-none")
    assert not held(system)
    assert held(system, report(1000))
    system.wipe(SUBJECT)
    assert not held(system), "the report of an earlier start is none of this one"
    for broken in ({**report(1000), "report": None}, {**report(1000), "bytes_fetched": None}):
        with pytest.raises(Unavailable):
            held(system, broken)


def test_a_pull_that_pulled_less_does_not_count(place: Place, variants: Variants) -> None:
    for system in (Containerd(place, variants), ParallelPull(place, variants)):
        assert held(system, bytes_down=STORED)
        assert not held(system, bytes_down=STORED - 1)
    local = Local(place, variants, warm=True)
    assert held(local)
    assert not held(local, bytes_down=1)


class Stated(System):
    """Runs, and says whether that was the way."""

    about = ""

    def __init__(self, place: Workplace, variants: Variants, name: str, *, right: bool) -> None:
        super().__init__(place, variants)
        self.name = name
        self._right = right

    def wipe(self, subject: Subject) -> None:
        pass

    def launch(self, subject: Subject, port: int) -> Launch:
        return Launch(("true",), self.place.environment)

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        return Facts({"it ran": True, "it went that way": self._right})

    def finish(self, subject: Subject) -> None:
        pass


class Line:
    """No way at all."""

    port = 0

    def reset(self) -> None:
        pass

    def counters(self) -> Counters:
        return counters()


class Written(list[RunEvent]):
    """Takes events."""

    write = list[RunEvent].append


def test_what_does_not_count_has_no_time(place: Place, variants: Variants, tmp_path: Path) -> None:
    systems = [Stated(place, variants, "right", right=True), Stated(place, variants, "wrong", right=False)]
    network = parse_network("2ms-400mbit")
    blocks = Blocks((SUBJECT,), systems, (network,), {network.name: 1}, 1, tools_warm=False)
    written = Written()
    runner = _Runner(place, blocks, SUBJECT, cast("ResultWriter", written), tmp_path, 0.0)
    runner.block(SUBJECT, network, cast("Distance", Line()), 0, random.Random(1))
    found: dict[str, Any] = {run.system: run for run in written}
    assert (found["right"].outcome, found["right"].error) == ("ok", None)
    assert found["right"].seconds is not None
    assert (found["wrong"].outcome, found["wrong"].seconds) == ("failed", None)
    assert found["wrong"].error == "not true: it went that way"
    assert (tmp_path / "output/app.wrong.2ms-400mbit.0.log").exists()
