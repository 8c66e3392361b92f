"""The command as a whole: what it imports, how it fails, what its documentation says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from veneer import __version__
from veneer.cli.command import AnyCommand, Command, CommonArguments, Group, Invocation
from veneer.cli.container import ContainerArguments
from veneer.cli.main import COMMANDS, VENEER
from veneer.cli.parser import Parser
from veneer.cli.render import Output, path_json, size_text, table
from veneer.errors import NotFound, RateLimited, UsageError, VeneerError
from veneer.events import Notice, Progress
from veneer.settings import Settings

#: What commands import when they serve, fetch or draw, and must not when they only ask or explain.
HEAVY = {"asyncio", "click", "cryptography", "httpx", "msgpack", "pyfuse3", "rich", "trio", "zstandard"}
HEAVY |= {"hashlib", "logging", "subprocess"}


def imported_by(*argv: str, env: Mapping[str, str] | None = None) -> set[str]:
    """What a command imports, as the interpreter reports it."""
    command = [sys.executable, "-X", "importtime", "-m", "veneer", *argv]
    environment = os.environ | (env or {})
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "veneer.cli.quick" in modules
    return modules


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["cache", "--help"]])
def test_help_imports_next_to_nothing(argv: list[str]) -> None:
    assert not imported_by(*argv) & HEAVY


@pytest.mark.parametrize(("words", "short"), [([], True), (["--json"], False)])
def test_status_imports_nothing_heavy(tmp_path: Path, words: list[str], short: bool) -> None:
    modules = imported_by("status", *words, env={"VENEER_RUN_DIR": str(tmp_path)})
    assert ("veneer.cli.command" in modules) is not short
    assert not modules & HEAVY


def test_help_lists_every_command_in_order() -> None:
    result = invoke("--help")
    assert (result.exit_code, result.stderr) == (0, "")
    _, _, listing = result.stdout.partition("\ncommands:\n")
    assert [line.split()[0] for line in listing.splitlines()[: len(COMMANDS)]] == list(COMMANDS)


def commands(
    name: str = "", entry: AnyCommand | Group = VENEER
) -> Iterator[tuple[list[str], AnyCommand | Group]]:
    yield name.split(), entry
    if isinstance(entry, Group):
        for child in entry.summaries:
            yield from commands(f"{name} {child}", entry.find(child))


@pytest.mark.parametrize(("argv", "entry"), [*commands()])
def test_every_command_has_help(argv: list[str], entry: AnyCommand | Group) -> None:
    result = invoke(*argv, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == invoke(*argv, "-h").stdout
    assert result.stdout.startswith(" ".join(["usage: veneer", *argv, "[OPTIONS]"]))
    assert max(map(len, result.stdout.splitlines())) <= 105
    if isinstance(entry, Command):
        for text in (
            "exit status:",
            "--json",
            "--quiet",
            "--verbose",
            "--platform OS/ARCH",
            "--timeout SECONDS",
        ):
            assert text in result.stdout


def test_without_a_command_the_help_is_an_error() -> None:
    for argv in ([], ["cache"]):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "\ncommands:\n" in result.stderr


def test_the_version() -> None:
    assert invoke("--version")[:2] == (0, f"veneer, version {__version__}\n".encode())


class FailingArguments(CommonArguments):
    what: str


def fail(invocation: Invocation, args: FailingArguments) -> int:
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

    async def interrupt() -> None:
        raise KeyboardInterrupt

    match args.what:
        case "foreseen":
            invocation.run(nested)
        case "bug":
            invocation.run(bug)
        case "interrupt":
            invocation.run(interrupt)
        case "code":
            return 7
        case _:
            raise UsageError("no such failure")
    return 0


FAILING = Command(fail, FailingArguments, lambda parser: parser.add_word("WHAT"))


def test_a_foreseen_error_is_two_lines_and_its_exit_code() -> None:
    result = invoke("foreseen", entry=FAILING)
    assert result.exit_code == 11
    assert result.stdout == ""
    assert result.stderr == "error: GET of manifest app:1 at localhost: not found\nhint: look again\n"


def test_twice_verbose_shows_where_it_failed() -> None:
    result = invoke("foreseen", "-vv", entry=FAILING)
    assert result.exit_code == 11
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.endswith("\nhint: look again\n")
    assert "Traceback" not in invoke("foreseen", "-v", entry=FAILING).stderr


def test_a_foreseen_error_with_json_is_one_line() -> None:
    result = invoke("foreseen", "--json", entry=FAILING)
    assert result.exit_code == 11
    line = json.loads(result.stderr)
    assert line["type"] == "error"
    assert line["code"] == 11
    assert line["status"] == 404
    assert line["hint"] == "look again"


def test_a_bug_is_not_disguised() -> None:
    with pytest.raises(RuntimeError):
        invoke("bug", entry=FAILING)


def test_exit_codes_of_commands() -> None:
    assert invoke("code", entry=FAILING).exit_code == 7
    assert invoke("interrupt", entry=FAILING) == (130, b"", "")


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("stat", "no such command: stat", "did you mean status?"),
        ("frobnicate", "no such command: frobnicate", "see veneer --help"),
        ("cache lsd", "no such command: lsd", "did you mean ls?"),
        ("--backend fuse status", "no such option: --backend", "see veneer --help"),
        ("status --no-progres", "no such option: --no-progres", "did you mean --no-progress?"),
        ("status --no-progr=1", "no such option: --no-progr", "did you mean --no-progress?"),
        ("status -x", "no such option: -x", "see veneer status --help"),
        ("ls", "missing IMAGE", "see veneer ls --help"),
        ("cat image", "missing PATH", "see veneer cat --help"),
        ("ls image / more", "unexpected argument 'more'", "see veneer ls --help"),
        ("status --timeout", "--timeout: expected one argument", "see veneer status --help"),
        ("status --timeout ten", "--timeout: invalid float value: 'ten'", "see veneer status --help"),
        ("status --timeout -1", "--timeout must be positive", None),
        ("status --timeout nan", "--timeout must be positive", None),
        ("status --platform nonsense", "invalid platform 'nonsense'", "write it as os/arch or os/arch/variant"),
        ("status --cache-quota ten", "invalid size 'ten'", "write it like 512M or 10G"),
        ("mount image dir --upper /dev/null", "/dev/null is not a directory", None),
        ("run image --report /", "/ is a directory", None),
        ("bundle image dir --entrypoint '", '--entrypoint "\'": No closing quotation', None),
        ("registry serve dir --tls-cert /no/file", "/no/file does not exist", None),
        ("registry serve dir --port 65536", "--port 65536 is not between 0 and 65535", None),
    ],
)
def test_wrong_usage(line: str, message: str, hint: str | None) -> None:
    argv = line.split()
    result = invoke(*argv)
    lines = [f"error: {message}", *([f"hint: {hint}"] if hint else [])]
    assert result == (2, b"", "".join(f"{line}\n" for line in lines))
    result = invoke(*argv, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stderr) == {"type": "error", "code": 2, "message": message, "hint": hint}


@pytest.mark.parametrize("option", ["--backend", "--network"])
def test_a_wrong_choice_names_the_right_ones(option: str) -> None:
    result = invoke("run", "image", option, "wrong")
    assert result.exit_code == 2
    right = "fuse" if option == "--backend" else "host"
    assert option in result.stderr
    assert right in result.stderr


class SeenArguments(ContainerArguments):
    image: str
    path: Path


def parse(*argv: str) -> SeenArguments:
    seen: list[SeenArguments] = []

    def run(_invocation: Invocation, args: SeenArguments) -> int:
        seen.append(args)
        return 0

    def add_arguments(parser: Parser) -> None:
        parser.add_word("IMAGE")
        parser.add_word("PATH", type=Path, default=Path("/"))
        ContainerArguments.add_container(parser)

    result = invoke(*argv, entry=Command(run, SeenArguments, add_arguments))
    assert result == (0, b"", "")
    return seen[0]


def test_options_and_words_come_in_any_order() -> None:
    for line in ("-t a b c d", "a -t b c d", "a b c d -t", "a b -t -- c d", "-t -- a b c d"):
        args = parse(*line.split())
        assert args.tty
        assert (args.image, args.path, args.arguments) == ("a", Path("b"), ("c", "d"))
    assert (parse("a").path, parse("a").arguments) == (Path("/"), ())
    assert parse("a", "-").path == Path("-")


def test_nothing_after_two_dashes_is_an_option() -> None:
    words = ("sh", "-c", "exec", "--", "-t", "--json", "--help")
    args = parse("a", "b", "--", *words)
    assert args.arguments == words
    assert (args.tty, args.json) == (False, False)
    assert parse("--", "-a", "-b").path == Path("-b")


def test_minus_v_is_a_volume_where_there_are_volumes() -> None:
    args = parse("a", "-v", "/a:/b", "-v/c:/d:ro", "--verbose", "-it", "-uroot", "-e", "A=b c", "--env=B=-")
    assert (args.volume, args.verbose) == (["/a:/b", "/c:/d:ro"], 1)
    assert (args.interactive, args.tty, args.user, args.env) == (True, True, "root", ["A=b c", "B=-"])


def test_options_reach_the_settings() -> None:
    seen: list[Settings] = []

    def run(invocation: Invocation, _args: CommonArguments) -> int:
        seen.append(invocation.settings)
        return 0

    probe = Command(run, CommonArguments)
    options = "--cache-dir /c --cache-quota 2G --insecure a:1 --insecure b --timeout 5 --platform linux/arm/v7"
    environment = {"VENEER_INSECURE": "c", "VENEER_CA_FILE": "/ca", "VENEER_CACHE_DIR": "/d"}
    assert invoke(*options.split(), entry=probe, env=environment).exit_code == 0
    assert invoke("--authfile", "/auth", entry=probe, env=environment).exit_code == 0
    first, second = seen
    assert (str(first.cache_dir), first.cache_quota, first.read_deadline_s) == ("/c", 2 << 30, 5)
    assert first.insecure == {"a:1", "b", "c"}
    assert str(first.platform) == "linux/arm/v7"
    assert (str(second.cache_dir), str(second.ca_file), str(second.authfile)) == ("/d", "/ca", "/auth")
    assert second.insecure == {"c"}


def test_what_was_printed_before_an_error_arrives() -> None:
    code = (
        "import sys\n"
        "from veneer.cli import main, status\n"
        "from veneer.cli.command import Command, CommonArguments\n"
        "from veneer.errors import CacheError\n"
        "def run(invocation, args):\n"
        "    sys.stdout.write('part')\n"
        "    raise CacheError('then it broke')\n"
        "status.COMMAND = Command(run, CommonArguments)\n"
        "main.main()\n"
    )
    command = ["env", "-u", "PYTHONUNBUFFERED", sys.executable, "-c", code, "status"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (30, "part", "error: then it broke\n")


def test_whoever_stops_reading_hears_no_complaint() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as broken:
        for argv in (["--help"], ["ls", "--help"], ["cache", "du"]):
            command = ["env", "-u", "PYTHONUNBUFFERED", sys.executable, "-m", "veneer", *argv]
            result = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, check=False)
            assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


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
