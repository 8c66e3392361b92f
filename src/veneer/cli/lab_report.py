"""``veneer lab report``: what a bench measured, as one page."""

from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, directory, existing_file, not_directory
from veneer.cli.render import size_text
from veneer.errors import UsageError

__all__ = ["REPORT"]


class ReportArguments(CommonArguments):
    """What ``veneer lab report`` takes."""

    results: Path
    output: Path
    sweep: list[Path]


def add_report_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("RESULTS", type=directory)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=not_directory,
        default=Path("report.html"),
        metavar="FILE",
        help="Where the page goes. [default: %(default)s]",
    )
    add(
        "--sweep",
        type=existing_file,
        action="append",
        default=[],
        metavar="FILE",
        help="Results of veneer lab sweep, to be shown as well; may be repeated.",
    )


def report(invocation: Invocation, args: ReportArguments) -> int:
    """Make one HTML page of the directory RESULTS, which veneer lab bench has left.

    Tables and plots: ratios with intervals, distributions, time against distance, bytes over time, waterfalls
    of single starts. The page loads nothing, and has no scripts.
    """
    from veneer.lab.report import make_report

    page = make_report(args.results, sweeps=args.sweep).encode()
    try:
        args.output.write_bytes(page)
    except OSError as error:
        raise UsageError(f"cannot write the report {args.output}: {error.strerror}") from error
    invocation.output.result(
        {"report": str(args.output), "size": len(page)}, f"wrote {args.output}, {size_text(len(page))}"
    )
    return 0


REPORT = Command(report, ReportArguments, add_report_arguments)
