"""What a bench writes can be read again, and nothing else can."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.lab.records import (
    Environment,
    Event,
    ImageEvent,
    LimitEvent,
    Machine,
    Network,
    NetworkEvent,
    ResultWriter,
    RunEvent,
    SetupEvent,
    SystemEvent,
    read_environment,
    read_events,
)

ENVIRONMENT = Environment(
    schema=1,
    began="2026-01-02T03:04:05Z",
    command=("veneer", "lab", "bench"),
    working_directory="/tmp",
    commit=None,
    modified=False,
    seed=7,
    blocks={"0ms": 3},
    images=("base",),
    systems=("containerd",),
    networks=(Network("0ms", 0.0, 0.0),),
    versions={"runc": "1.1"},
    machine=Machine("6.18", "x86_64", "a cpu", 2, 1 << 30, "ext4 /dev/vda", None, {"governor": "none"}),
)
RUN = RunEvent(
    image="base",
    system="containerd",
    network="0ms",
    block=0,
    position=2,
    outcome="ok",
    seconds=0.25,
    command=("ctr", "run"),
    began_s=1.0,
    first_output_s=None,
    exit_code=0,
    network_bytes=10,
    network_bytes_up=1,
    connections=1,
    cpu_s=0.2,
    proxy_cpu_s=0.0,
    requests=None,
    checks={"lazy": True},
    error=None,
    report={"mount": {"layers": [1, 2.5, None]}},
    timing=None,
    at_s=1.25,
)
EVENTS: tuple[Event, ...] = (
    ImageEvent("base", "sha256:" + "0" * 64, ("echo", "hello"), "exit", 1, 100, 200, 0.1),
    SystemEvent("containerd", "containerd with overlayfs", False, True, None, 0.1),
    NetworkEvent("0ms", 0.0, 0.1, 9000.0, 8000.0, 1.5, 0.2),
    SetupEvent("base", "convert", 1.5, {"index_size": 100.0}, 0.3),
    RUN,
    replace(RUN, outcome="timeout", seconds=None, exit_code=None, error="no answer within 60 s", report=None),
    LimitEvent("base", "0ms", 0.1, 2, 1000, 0.05, 3.0),
)


def write(directory: Path) -> None:
    with ResultWriter(directory, ENVIRONMENT) as writer:
        for event in EVENTS:
            writer.write(event)


def test_results_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "results")
    assert read_environment(tmp_path / "results") == ENVIRONMENT
    assert tuple(read_events(tmp_path / "results")) == EVENTS


def test_an_interrupted_bench_leaves_what_it_measured(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, ENVIRONMENT)
    writer.write(RUN)
    assert list(read_events(tmp_path)) == [RUN]
    writer.__exit__()


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileExistsError):
        write(tmp_path)


def test_what_no_bench_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_environment(tmp_path)
    with pytest.raises(NotFound):
        list(read_events(tmp_path))
    write(tmp_path)
    events, environment = tmp_path / "events.jsonl", tmp_path / "environment.json"
    good = json.loads(events.read_text().splitlines()[4])
    for change in ({"block": "0"}, {"block": True}, {"seconds": "1"}, {"colour": 1}, {"event": "walk"}):
        events.write_text(json.dumps(good | change) + "\n")
        with pytest.raises(IntegrityError):
            list(read_events(tmp_path))
    del good["image"]
    events.write_text(json.dumps(good) + "\n")
    with pytest.raises(IntegrityError, match="image"):
        list(read_events(tmp_path))
    environment.write_text(environment.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UnsupportedFormat):
        read_environment(tmp_path)
