"""The command as a whole: what it imports, how it fails, what its documentation says."""

import json
import subprocess
import sys

import click
import pytest
import trio
from click.testing import CliRunner

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.main import COMMANDS, cli
from veneer.cli.render import Output, path_json, size_text, table
from veneer.errors import NotFound, RateLimited, UsageError, VeneerError
from veneer.events import Notice, Progress


def test_help_lists_every_command_without_importing_what_commands_need() -> None:
    code = (
        "import sys\n"
        "from veneer.cli.main import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "heavy = {'trio', 'httpx', 'pyfuse3', 'rich', 'zstandard', 'msgpack', 'cryptography'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_exit_status(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    subject = cli.get_command(click.Context(cli), name)
    if not isinstance(subject, click.Group):
        assert "Exit status:" in result.output
        assert "--json" in result.output


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("what")
def failing(invocation: Invocation, what: str) -> int:
    """Fail in the way that the argument names."""

    async def nested() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            await trio.sleep_forever()

    async def refuse() -> None:
        raise NotFound(
            "GET of manifest app:1 at localhost: not found", hint="look again", status=404, codes=("X",)
        )

    async def bug() -> None:
        raise RuntimeError("a bug")

    match what:
        case "foreseen":
            invocation.run(nested)
        case "bug":
            invocation.run(bug)
        case "code":
            return 7
        case _:
            raise UsageError("no such failure")
    return 0


def test_a_foreseen_error_is_two_lines_and_its_exit_code() -> None:
    result = CliRunner().invoke(failing, ["foreseen"])
    assert result.exit_code == 11
    assert result.stdout == ""
    assert result.stderr == "error: GET of manifest app:1 at localhost: not found\nhint: look again\n"


def test_a_foreseen_error_with_json_is_one_line() -> None:
    result = CliRunner().invoke(failing, ["foreseen", "--json"])
    assert result.exit_code == 11
    line = json.loads(result.stderr.splitlines()[-1])
    assert line["type"] == "error"
    assert line["code"] == 11
    assert line["status"] == 404
    assert line["hint"] == "look again"


def test_a_bug_is_not_disguised() -> None:
    result = CliRunner().invoke(failing, ["bug"])
    assert isinstance(result.exception, RuntimeError)


def test_exit_codes_of_commands_and_usage() -> None:
    assert CliRunner().invoke(failing, ["code"]).exit_code == 7
    assert CliRunner().invoke(failing, ["other"]).exit_code == 2
    assert CliRunner().invoke(failing, ["code", "--platform", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(failing, ["code", "--cache-quota", "ten"]).exit_code == 2
    assert CliRunner().invoke(failing, ["code", "--timeout", "-1"]).exit_code == 2


def test_options_reach_the_settings() -> None:
    seen: list[Invocation] = []

    @click.command()
    @command
    def probe(invocation: Invocation) -> None:
        seen.append(invocation)

    arguments = [
        "--cache-dir",
        "/c",
        "--cache-quota",
        "2G",
        "--insecure",
        "a:1",
        "--insecure",
        "b",
        "--timeout",
        "5",
    ]
    result = CliRunner().invoke(probe, [*arguments, "--platform", "linux/arm/v7"])
    assert result.exit_code == 0, result.output
    settings = seen[0].settings
    assert str(settings.cache_dir) == "/c"
    assert settings.cache_quota == 2 << 30
    assert settings.insecure >= {"a:1", "b"}
    assert settings.read_deadline_s == 5
    assert str(settings.platform) == "linux/arm/v7"


def test_progress_without_a_terminal_is_sparse_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().reporting() as report:
        for done in range(0, 1001, 10):
            report(Progress("push", "sha256:ab", done, 1000))
        report(Notice("3 device nodes were dropped"))
    assert capsys.readouterr().err == "push sha256:ab: 1000 B of 1000 B\nnote: 3 device nodes were dropped\n"


def test_progress_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(json=True).reporting() as report:
        report(Progress("push", "x", 1, None, "spans"))
    line = json.loads(capsys.readouterr().err)
    assert line == {"type": "progress", "task": "push", "item": "x", "done": 1, "total": None, "unit": "spans"}


def test_quiet_still_prints_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(quiet=True)
    with output.reporting() as report:
        report(Notice("never mind"))
    output.result({}, "the answer")
    output.fail(VeneerError("it broke"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("the answer\n", "error: it broke\n")


def test_errors_as_json_carry_what_the_class_knows(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).fail(RateLimited("slow down", retry_after_s=3))
    assert json.loads(capsys.readouterr().err)["retry_after_s"] == 3


def test_texts() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 84_410_368, 1 << 42)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "80.5 MiB",
        "4.0 TiB",
    ]
    assert table([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"
    assert path_json(b"usr/bin") == {"path": "usr/bin"}
    assert path_json(b"\xff") == {"path": "\ufffd", "path_b64": "/w=="}
