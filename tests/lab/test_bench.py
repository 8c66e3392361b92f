"""One short bench from end to end, with a real registry, containerd and runc: what it leaves can be trusted."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from veneer.errors import Unavailable, UsageError
from veneer.lab import session
from veneer.lab.build import store_image
from veneer.lab.distance import parse_network
from veneer.lab.imageset import ImageSpec, Probe
from veneer.lab.records import LimitEvent, NetworkEvent, RunEvent, SetupEvent, read_environment, read_events
from veneer.lab.servers import find_program, free_port
from veneer.lab.session import BenchPlan, find_systems, run_bench
from veneer.lab.summary import summarize

BUSYBOX = Path(find_program("busybox")).read_bytes()
PORT = free_port()
PROGRAM = ImageSpec(
    "program",
    "",
    (),
    ("/bin/busybox", "echo", "hello"),
    Probe("exit", "hello"),
    # Something that a start has no use for: what is lazy fetches less than the image.
    {"bin/busybox": BUSYBOX, "data": os.urandom(8 << 20)},
)
SERVER = ImageSpec(
    "server",
    "",
    (),
    # The first process of a container ignores what it does not handle.
    (
        "/bin/busybox",
        "sh",
        "-c",
        f"trap 'exit 0' TERM INT; busybox httpd -f -p 127.0.0.1:{PORT} -h /www & wait",
    ),
    Probe("http", "served", PORT),
    {"bin/busybox": BUSYBOX, "www/index.html": b"served\n", "data": os.urandom(8 << 20)},
)
LAZY = ("veneer-recorded", "veneer-sidecar", "veneer-warm", "veneer-warm-always")
SYSTEMS = (*LAZY, "containerd", "parallel-pull", "local-warm", "broken")


def plan(tmp_path: Path, **changes: object) -> BenchPlan:
    images = (PROGRAM, SERVER)
    for image in images:
        store_image(image, (), tmp_path / "images")
    made = BenchPlan(
        images=images,
        systems=SYSTEMS,
        networks=(parse_network("2ms-400mbit"),),
        blocks={"2ms-400mbit": 2},
        seed=3,
        output=tmp_path / "results",
        image_dir=tmp_path / "images",
        work_dir=tmp_path / "work",
        given={"broken": "echo {image} {cmd}; exit 3"},
        resets={"broken": f"touch {tmp_path}/reset"},
        timed=frozenset({"program"}),
        tools_warm=False,
        command=("veneer", "lab", "bench"),
    )
    return replace(made, **changes)  # type: ignore[arg-type] # fields of a plan


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a bench."""
    tmp_path = tmp_path_factory.mktemp("bench")
    # A busy machine may not be as far away as it should be; here it does not matter.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.lab.distance._judge", lambda *_: None)
        run_bench(plan(tmp_path))
    assert (tmp_path / "reset").exists()
    assert not (tmp_path / "work").exists()
    return tmp_path / "results"


def runs(results: Path) -> list[RunEvent]:
    return [event for event in read_events(results) if isinstance(event, RunEvent)]


def test_every_block_has_every_system_once_in_an_order_of_its_own(results: Path) -> None:
    orders = []
    for image in ("program", "server"):
        for block in range(2):
            members = [run for run in runs(results) if (run.image, run.block) == (image, block)]
            assert [run.position for run in members] == list(range(len(SYSTEMS)))
            orders.append(tuple(run.system for run in members))
            assert set(orders[-1]) == set(SYSTEMS)
    assert len(set(orders)) > 1


def test_whatever_works_has_a_time_and_counters_that_prove_how_it_started(results: Path) -> None:
    wrong = [(run.image, run.system, run.error) for run in runs(results) if run.outcome != "ok"]
    assert [one for one in wrong if one[1] != "broken"] == []
    for run in runs(results):
        if run.system == "broken":
            continue
        assert run.seconds is not None
        assert all(run.checks.values())
        if run.system in ("containerd", "parallel-pull"):
            assert run.network_bytes > 8 << 20
        elif run.system == "local-warm":
            assert run.network_bytes == run.connections == 0
        else:
            assert run.checks
            assert bool(run.requests) is (run.system != "veneer-warm")
            assert run.network_bytes < 4 << 20
            assert run.report is not None
            assert run.report["bytes_fetched"] == pytest.approx(run.network_bytes, rel=0.5, abs=20_000)
        if run.image == "program":
            assert run.last_output_s is not None
            assert run.last_output_s < run.seconds
        else:
            assert run.last_output_s is None
        if run.network_bytes:
            assert run.arrival_bytes[-1] == run.network_bytes
        if run.system == "veneer-recorded":
            report = run.report["report"] if run.report else None
            assert isinstance(report, Mapping)
            assert [layer["cached"] for layer in report["layers"]] == [0]  # the pack was all that it read
        assert (run.timing is not None) == (run.block < 0)


def test_what_fails_has_no_time_but_its_output(results: Path) -> None:
    broken = [run for run in runs(results) if run.system == "broken"]
    assert len(broken) == 4
    for run in broken:
        assert run.outcome == ("died" if run.image == "server" else "failed")
        assert (run.seconds, run.exit_code) == (None, 3)
        assert "status 3" in (run.error or "")
        kept = (results / "output" / f"{run.image}.broken.{run.network}.{run.block}.log").read_text()
        assert f"/lab/{run.image}-plain:1 /bin/busybox" in kept


def test_the_events_say_what_was_made_and_how_far_the_registry_was(results: Path) -> None:
    events = list(read_events(results))
    steps = {(event.image, event.step) for event in events if isinstance(event, SetupEvent)}
    shared = {"plain", "lazy", "tree"}
    assert {step for image, step in steps if image == "rehearsal"} == shared
    for image in ("program", "server"):
        assert {step for name, step in steps if name == image} == shared | {"recorded", "sidecar"}
    assert [event.name for event in events if isinstance(event, NetworkEvent)] == ["2ms-400mbit"]
    environment = read_environment(results)
    assert environment.blocks == {"2ms-400mbit": 2}
    assert "containerd" in environment.versions
    assert environment.versions["python"].endswith(f" of {sys.base_prefix}")
    limits = [event for event in events if isinstance(event, LimitEvent)]
    assert [limit.image for limit in limits] == ["program", "server"]
    for limit in limits:
        line_s = 3 * 0.002 + limit.needed_bytes * 8 / 400e6
        assert limit.seconds == pytest.approx(line_s + limit.warm_run_s)


def test_the_summary_counts_failures_and_pairs(results: Path) -> None:
    summary = summarize(results)
    assert summary.failures == 4
    assert summary.reference == "containerd"
    rows = {(row.image, row.system): row for row in summary.rows}
    assert len(rows) == 2 * len(SYSTEMS)
    own = rows["program", "containerd"]
    assert own.ratio is not None
    assert (own.ratio.count, own.ratio.median) == (2, 1.0)
    assert rows["server", "broken"].seconds is None
    again = [(one.image, one.system, one.command is not None) for one in summary.again]
    warm = ("veneer-warm", "veneer-warm-always")
    assert sorted(again) == [
        (image, name, image == "program") for image in ("program", "server") for name in warm
    ]
    assert rows["server", "broken"].failures == 2


def test_what_a_failed_start_has_mounted_goes_with_the_bench(tmp_path: Path) -> None:
    def bench() -> None:
        wanted = cast("BenchPlan", SimpleNamespace(work_dir=tmp_path / "work", systems=()))
        with session._workplace(wanted, ()) as place:
            (place.directory / "rootfs").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.directory / "rootfs"], check=True)
            raise Unavailable("it failed")

    with pytest.raises(Unavailable, match="it failed"):
        bench()
    assert not (tmp_path / "work").exists()


def test_results_are_not_written_over(results: Path) -> None:
    before = (results / "events.jsonl").read_bytes()
    with pytest.raises(UsageError, match="results already"):
        run_bench(plan(results.parent))
    assert (results / "events.jsonl").read_bytes() == before


def test_systems_are_chosen_by_name() -> None:
    assert find_systems((), {"mine": "x"}) == (*session.SYSTEMS, "mine")
    assert find_systems(("mine", "containerd", "mine"), {"mine": "x"}) == ("mine", "containerd")
    assert find_systems(("containerd",), {"mine": "x"}) == ("containerd", "mine")
    with pytest.raises(UsageError, match="no such system: yours"):
        find_systems(("yours",), {"mine": "x"})
