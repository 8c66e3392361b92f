"""The short way of ``veneer run`` and ``status``: what goes it, and that it is short."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.cli import quick
from veneer.cli.run import COMMAND, Arguments
from veneer.cli.worker import read_run
from veneer.container.run import Outcome

ENVIRON = {"HOME": "/root", "VENEER_CACHE_DIR": "/c", "VENEER_RUN_DIR": "/r", "VENEER_CACHE_QUOTA": "3G"}


def test_it_imports_next_to_nothing() -> None:
    """Each of these takes a start longer than all of the short way."""
    heavy = {
        "argparse",
        "dataclasses",
        "json",
        "re",
        "socket",
        "subprocess",
        "signal",
        "typing",
        "pathlib",
        "enum",
    }
    program = f"import sys; sys.path[:0] = {sys.path!r}; import veneer.cli.quick; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", program]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "veneer.container.run" in shown.stdout.split()
    assert not heavy.intersection(shown.stdout.split())


def test_the_words_mean_what_the_command_takes_them_for() -> None:
    words = [
        "-e",
        "A=b",
        "-u",
        "bob",
        "-v",
        "/etc:/e:ro",
        "--workload",
        "w",
        "--backend",
        "fuse",
        "--runtime",
        "crun",
        "-i",
        "r.example/a:1",
        "--",
        "ls",
        "-h",
    ]
    found = read_run(words, ENVIRON)
    assert found is not None
    request, settings, report = found
    args = COMMAND.parser("veneer run").parse(words, Arguments())
    assert (request.image, request.workload, request.runtime) == (args.image, "w", "crun")
    options = request.options
    assert (options.arguments, options.user, options.interactive) == (("ls", "-h"), "bob", True)
    assert dict(options.environment) == {"A": "b"}
    assert [str(volume.source) for volume in options.volumes] == ["/etc"]
    assert settings == replace(args.settings(ENVIRON), backend="fuse")
    assert report == args.report
    assert (str(settings.cache_dir), settings.cache_quota) == ("/c", 3 << 30)


@pytest.mark.parametrize(
    "words",
    [
        *(["-h"], ["--help"], ["--json", "i"], ["-q", "i"], ["--verbose", "i"], ["-t", "i"], ["--timing", "i"]),
        *(
            ["--report", "f", "i"],
            ["--timing-record", "f.json", "i"],
            ["-e", "HOME", "i"],
            ["-v", "etc:/e", "i"],
        ),
        *(["oci:layout:tag"], ["--cache-dir", "c", "i"], ["--authfile", "a", "i"], ["--ca-file", "c", "i"]),
        *([], ["--nonsense", "i"], ["-v", "/nowhere/at/all:/e", "i"], ["--timeout", "-1", "i"]),
    ],
    ids=" ".join,
)
def test_what_only_the_command_can_do_goes_the_long_way(words: list[str]) -> None:
    """It depends on the terminal, the directory or the environment of whoever typed it, or is wrong."""
    assert read_run(words, ENVIRON) is None


def test_a_relative_volume_is_not_looked_for_where_the_daemon_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, short in ((f"{tmp_path}/here", True), ("here", False), ("./here", False)):
        assert (read_run(["-v", f"{path}:/e", "i"], ENVIRON) is not None) == short, path


def test_the_same_words_mean_the_same_only_where_all_else_is_as_before(tmp_path: Path) -> None:
    words = ["-iv", f"{tmp_path}/here:/e", "i"]
    assert read_run(words, ENVIRON) is None
    (tmp_path / "here").mkdir()
    assert read_run(words, ENVIRON) is not None
    (tmp_path / "here").rmdir()
    assert read_run(words, ENVIRON) is None, "a volume that has gone is the command's to complain about"
    for directory in ("/c", "/d", "/c"):
        found = read_run(["i"], ENVIRON | {"VENEER_CACHE_DIR": directory})
        assert found is not None
        assert found.settings.cache_dir == Path(directory)


def test_the_daemon_is_told_what_settings_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "environ", {**ENVIRON, "REGISTRY_AUTH_FILE": '/a\n"', "XDG_RUNTIME_DIR": "/x", "OTHER": "1"}
    )
    asked = json.loads(quick._request("run", ["-e", "A=ü\ud800", "i"]))
    assert asked["op"] == "run"
    assert asked["words"] == ["-e", "A=ü\ud800", "i"]
    assert asked["environ"] == {**ENVIRON, "REGISTRY_AUTH_FILE": '/a\n"', "XDG_RUNTIME_DIR": "/x"}
    assert asked["pid"] == os.getpid()


GONE: dict[str, object] = {"type": "error", "code": 40, "message": "no such mount"}


@pytest.mark.parametrize(
    ("wanted", "last", "code", "said"),
    [
        (False, {"type": "ended", "report": "{}"}, 7, ""),
        (False, None, 7, ""),
        (False, GONE, 7, ""),
        (True, {"type": "ended", "report": "{}"}, 7, ""),
        (True, None, 40, "the daemon has gone"),
        (True, GONE, 40, "no such mount"),
    ],
)
def test_a_report_that_was_asked_for_is_written_or_missed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: bool,
    last: dict[str, object] | None,
    code: int,
    said: str,
) -> None:
    """The command's own status says nothing about it."""
    report = tmp_path / "report.json"
    path = str(report) if wanted else None
    made = {"type": "bundle", "id": "x", "bundle": "/b", "runtime": "/r", "interactive": False, "report": path}
    answers = iter([made, last])
    asked: list[bytes] = []

    def ask(request: bytes) -> dict[str, object] | None:
        asked.append(request)
        return next(answers)

    class Run:
        def __init__(self, *_args: object, **_more: object) -> None: ...

        def run(self, *_args: object) -> Outcome:
            return Outcome(7, None, (0.0, 0.0), 1.0)

    monkeypatch.setattr(quick, "_ask", ask)
    monkeypatch.setattr(quick, "ContainerRun", Run)
    assert quick._run(["i"]) == code
    assert said in capsys.readouterr().err
    assert report.exists() == (wanted and code == 7)
    ended = json.loads(asked[1])
    told = ended.pop("report", None)
    assert ended == {"op": "ended", "id": "x"}
    assert (set(told) == {"exit_code", "mounted_s", "total_s"}) if wanted else (told is None)


def test_a_report_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick._write(str(tmp_path / "none/report"), "{}") == 2
    assert "cannot write the report" in capsys.readouterr().err


def test_relative_settings_of_the_environment_go_the_long_way() -> None:
    for name, absolute in itertools.product(
        ("VENEER_CACHE_DIR", "VENEER_CA_FILE", "REGISTRY_AUTH_FILE"), (0, 1)
    ):
        found = read_run(["i"], ENVIRON | {name: "/a" if absolute else "a"})
        assert (found is not None) == bool(absolute), name
