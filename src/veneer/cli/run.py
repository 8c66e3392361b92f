"""``veneer run``: a command in a container on a lazily mounted image."""

import json
from pathlib import Path

from veneer.cli.backend import add_backend_argument, add_pull_argument, add_workload_argument, with_backend
from veneer.cli.command import EXIT_STATUS, Command, Invocation
from veneer.cli.container import ContainerArguments, options_of
from veneer.cli.parser import Parser, not_directory
from veneer.cli.render import size_text
from veneer.cli.timing import add_timing_arguments, phases_text, write_timing
from veneer.errors import UsageError

__all__ = ["COMMAND"]

_EXIT_STATUS = EXIT_STATUS.replace("0 success", "that of the command; before it runs:\n ", 1)


class Arguments(ContainerArguments):
    """What ``veneer run`` takes."""

    image: str
    backend: str | None
    workload: str
    pull: str
    runtime: str | None
    timing: bool
    timing_record: Path | None
    report: Path | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    Arguments.add_container(parser)
    add_backend_argument(parser)
    add_workload_argument(parser)
    add_pull_argument(parser)
    add = parser.add_argument
    add("--runtime", metavar="NAME", help="OCI runtime; by default runc, then crun.")
    add_timing_arguments(parser, "Say at the end how long what took, and what was fetched.")
    add("--report", type=not_directory, metavar="FILE", help="Write times, requests and bytes to FILE as JSON.")


def run(invocation: Invocation, args: Arguments) -> int:
    """Run a command in a container on IMAGE; what it writes is thrown away.

    The command comes after two dashes: veneer run -e A=b IMAGE -- ls -l
    """
    from veneer.daemon.client import RunRequest, run_image

    settings, output = with_backend(invocation.settings, args.backend, args.pull), invocation.output
    timed = args.timing or args.timing_record is not None
    request = RunRequest(args.image, options_of(args), args.runtime, timed, args.workload)

    with output.reporting() as report:
        result = run_image(request, settings, report=report)
    if args.report is not None:
        try:
            args.report.write_text(json.dumps(result.to_json(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write the report {args.report}: {error.strerror}") from error
    if args.timing_record is not None and result.timing is not None:
        write_timing(args.timing_record, result.timing)
    if args.timing and result.timing is not None:
        first = "none" if result.first_output_s is None else f"after {result.first_output_s:.2f} s"
        output.say(
            f"mounted by {result.mount.backend} after {result.mounted_s:.2f} s, first output {first}, "
            f"ended after {result.total_s:.2f} s; {result.requests} requests, {size_text(result.bytes_fetched)}"
        )
        output.say(phases_text(result.timing))
    return result.exit_code


COMMAND = Command(run, Arguments, add_arguments, _EXIT_STATUS)
