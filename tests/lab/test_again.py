"""A figure can be measured again from what is kept of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.test_records import ENVIRONMENT
from veneer.cli.command import execute
from veneer.cli.main import VENEER
from veneer.errors import NotFound
from veneer.lab.records import ResultWriter
from veneer.lab.session import BenchPlan


def test_the_stored_command_line_is_run_again_into_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[BenchPlan] = []

    def run_bench(plan: BenchPlan, _report: object) -> None:
        plans.append(plan)
        ResultWriter(plan.output, ENVIRONMENT).__exit__()

    monkeypatch.setattr("veneer.lab.session.run_bench", run_bench)
    monkeypatch.chdir(tmp_path)
    options = ["--systems", "containerd,mine", "--networks", "5ms-50mbit", "--blocks", "7", "--seed", "9"]
    given = ["--system", "mine=x {image}", "--image-dir", "kept", "gcc", "redis"]
    monkeypatch.setattr(sys, "argv", ["veneer", "lab", "bench", "-o", "first", *options, *given])
    assert execute(VENEER, "veneer", sys.argv[1:]) == 0
    environment = replace(ENVIRONMENT, command=tuple(plans[0].command), working_directory=str(tmp_path))
    ResultWriter(tmp_path / "results", environment).__exit__()

    monkeypatch.chdir("/")
    again = ["lab", "bench", "--again", str(tmp_path / "results"), "-o", str(tmp_path / "again")]
    assert execute(VENEER, "veneer", again) == 0
    first, second = plans
    assert second == replace(
        first, output=tmp_path / "again", work_dir=tmp_path / "again.work", command=second.command
    )
    assert (first.seed, first.blocks, first.image_dir) == (9, {"5ms-50mbit": 7}, tmp_path / "kept")


def test_there_must_be_something_to_do_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["lab", "bench", "--json", "--again", str(tmp_path), "-o", str(tmp_path / "x")]
    assert execute(VENEER, "veneer", again) == NotFound.exit_code
    assert "environment.json" in json.loads(capsys.readouterr().err)["message"]
