"""The short way of ``veneer run`` and ``status``: what goes it, and that it is short."""

import itertools
import subprocess
import sys

import pytest

from veneer.cli.run import COMMAND, Arguments
from veneer.cli.worker import read_run

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
    assert (request.image, request.workload, request.runtime) == (args.image, "w", None)
    options = request.options
    assert (options.arguments, options.user, options.interactive) == (("ls", "-h"), "bob", True)
    assert dict(options.environment) == {"A": "b"}
    assert [str(volume.source) for volume in options.volumes] == ["/etc"]
    assert settings == args.settings(ENVIRON)
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


def test_relative_settings_of_the_environment_go_the_long_way() -> None:
    for name, absolute in itertools.product(
        ("VENEER_CACHE_DIR", "VENEER_CA_FILE", "REGISTRY_AUTH_FILE"), (0, 1)
    ):
        found = read_run(["i"], ENVIRON | {name: "/a" if absolute else "a"})
        assert (found is not None) == bool(absolute), name
