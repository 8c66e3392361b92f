"""What counts as a warm start: what it fetches is what the first start did not read. What a start leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from veneer.lab.distance import Counters
from veneer.lab.variants import Variants
from veneer.lab.veneered import VENEERED, Veneered
from veneer.lab.workplace import Subject, Workplace


def report(cached_spans: int, fetched: int) -> bytes:
    return json.dumps(
        {
            "requests": 4,
            "bytes_fetched": 52_000 * fetched,
            "report": {
                "layers": [{"cached_spans": 0}, {"cached_spans": cached_spans}],
                "store": {"spans_fetched": fetched},
                "pack": {"mapped": True},
            },
        }
    ).encode()


@pytest.mark.parametrize(("name", "asked"), [("veneer-warm", False), ("veneer-warm-always", True)])
def test_whether_the_registry_is_asked_again_is_a_system_of_its_own(
    tmp_path: Path, name: str, asked: bool
) -> None:
    place = cast("Workplace", SimpleNamespace(directory=tmp_path, environment={}))
    subject = cast("Subject", SimpleNamespace(reference=lambda port, variant: f"127.0.0.1:{port}/{variant}"))
    system = Veneered(place, cast("Variants", None), name)
    first, second = system.warm_up(subject, 5), system.launch(subject, 5)
    assert first is not None
    for launch in (first, second):
        assert ("--pull missing" in " ".join(launch.argv)) is not asked
        assert launch.argv[-1] == "127.0.0.1:5/recorded"


@pytest.mark.parametrize(
    ("cached_spans", "fetched", "counts"), [(12, 9, True), (3, 0, True), (12, 10, False), (3, 1, False)]
)
def test_a_second_start_may_read_something_new_but_nothing_twice(
    tmp_path: Path, cached_spans: int, fetched: int, counts: bool
) -> None:
    place = cast("Workplace", SimpleNamespace(directory=tmp_path, environment={}))
    system = Veneered(place, cast("Variants", None), "veneer-warm")
    subject = cast("Subject", SimpleNamespace(reference=lambda port, variant: f"127.0.0.1:{port}/{variant}"))
    launches = [system.warm_up(subject, 5), system.launch(subject, 5)]
    for launch, contents in zip(launches, (report(3, 3), report(cached_spans, fetched)), strict=True):
        assert launch is not None
        Path(launch.argv[launch.argv.index("--report") + 1]).write_bytes(contents)
    facts = system.facts(subject, cast("Counters", None))
    assert facts.checks == {"nothing was fetched again": counts, "it used the pack": True}


@pytest.mark.parametrize("name", sorted(VENEERED))
def test_what_is_kept_for_another_start_is_let_go_of_where_there_is_none(tmp_path: Path, name: str) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(argv: list[str], environment: dict[str, str]) -> bytes:
        ran.append((argv, environment))
        return b""

    place = cast("Workplace", SimpleNamespace(directory=tmp_path, environment={"A": "b"}, run=run))
    system = Veneered(place, cast("Variants", None), name)
    system.finish(cast("Subject", None))
    _, warm, *_ = VENEERED[name]
    ((argv, environment),) = ran
    if warm:
        assert argv[1:] == ["status"], "it waits for what is cleaned up, and lets go of nothing"
    else:
        assert argv[1:] == ["cache", "gc"]
        assert environment == {"A": "b", "VENEER_CACHE_DIR": str(tmp_path / "veneer-cache")}
        launched = system.launch(cast("Subject", SimpleNamespace(reference=lambda *_: "x")), 1)
        assert environment["VENEER_CACHE_DIR"] == launched.environment["VENEER_CACHE_DIR"]
