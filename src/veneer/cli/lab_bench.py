"""``veneer lab bench``: measure starts with several systems over several networks."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, directory
from veneer.cli.render import table
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.lab.session import BenchPlan
    from veneer.lab.summary import Again, Row, Summary

__all__ = ["BENCH", "IMAGE_DIR", "summary_text"]

#: Where images go when nobody says otherwise.
IMAGE_DIR = Path("build/lab-images")
_NETWORKS = ("0ms", "10ms-1gbit", "50ms-100mbit")
_BLOCKS = 3
_MAX_BLOCKS = 10_000


class BenchArguments(CommonArguments):
    """What ``veneer lab bench`` takes."""

    images: tuple[str, ...]
    output: Path | None
    image_dir: Path
    work_dir: Path | None
    systems: list[str]
    system: list[str]
    reset: list[str]
    networks: list[str]
    blocks: list[int]
    seed: int
    tools: str
    timing: list[str]
    again: Path | None


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > _MAX_BLOCKS:
        raise UsageError(f"invalid number of blocks {text!r}", hint="write it like 3, or 5,5,3")
    return numbers


def add_bench_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGES", repeated=True)
    add = parser.add_argument
    add("-o", "--output", type=directory, metavar="DIR", help="Where results go; made new.")
    add(
        "--systems",
        type=_names,
        default=[],
        metavar="NAME,...",
        help="Which systems, besides those of --system; by default all.",
    )
    add(
        "--system",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="One more system: a shell command with {image}, a reference, and {cmd}; may be repeated.",
    )
    add(
        "--reset",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="What wipes the state of such a system before each start.",
    )
    add(
        "--networks",
        type=_names,
        default=list(_NETWORKS),
        metavar="NAME,...",
        help=f"Distances to the registry. [default: {','.join(_NETWORKS)}]",
    )
    add(
        "--blocks",
        type=_numbers,
        default=[_BLOCKS],
        metavar="N,...",
        help="How often, for all networks or for each; large images half as often. [default: 3]",
    )
    add("--seed", type=int, default=1, metavar="N", help="Of the order in a block. [default: %(default)s]")
    add(
        "--tools",
        choices=("warm", "cold"),
        default="warm",
        help="Whether a tiny container is started before each start, so that only the image is cold. "
        "[default: %(default)s]",
    )
    add(
        "--timing",
        type=_names,
        default=[],
        metavar="NAME,...",
        help="Images that are started once more, for timing records.",
    )
    add(
        "--image-dir",
        type=directory,
        default=IMAGE_DIR,
        metavar="DIR",
        help="Where images are kept. [default: %(default)s]",
    )
    add(
        "--work-dir", type=directory, metavar="DIR", help="For what is deleted at the end; by default DIR.work."
    )
    add("--again", type=directory, metavar="DIR", help="Do again what these results are of.")


def bench(invocation: Invocation, args: BenchArguments) -> int:
    """Measure how long starts of IMAGES take with each system over each network.

    The time is that from the shell to the end of a program, or to the first answer of a server. Each block has
    every system once, in random order. All events are kept in DIR. Fails when a start fails. Takes root and
    what scripts/install lab installs. The machine should do nothing else.
    """
    from veneer.lab.session import run_bench
    from veneer.lab.summary import summarize

    if args.again is not None:
        return _again(invocation, args)
    plan = _plan(args)
    with invocation.output.reporting() as report:
        run_bench(plan, report)
    summary = summarize(plan.output)
    invocation.output.result(summary.to_json(), summary_text(summary))
    return 1 if summary.failures else 0


def _plan(args: BenchArguments) -> "BenchPlan":
    from veneer.lab.distance import parse_network
    from veneer.lab.imageset import find_images
    from veneer.lab.session import BenchPlan, find_systems
    from veneer.lab.systems import parse_given

    if args.output is None:
        raise UsageError("missing --output", hint="results are kept, so say where")
    networks = [parse_network(name) for name in args.networks]
    counts = args.blocks * len(networks) if len(args.blocks) == 1 else args.blocks
    if len(counts) != len(networks):
        raise UsageError(f"--blocks has {len(counts)} numbers for {len(networks)} networks")
    given, resets = parse_given(args.system), parse_given(args.reset)
    if astray := resets.keys() - given.keys():
        raise UsageError(
            f"--reset names {min(astray)}, which no --system is", hint="write the same NAME in both"
        )
    output = args.output.absolute()
    return BenchPlan(
        images=find_images(args.images),
        systems=find_systems(args.systems, given),
        networks=networks,
        blocks={network.name: count for network, count in zip(networks, counts, strict=True)},
        seed=args.seed,
        output=output,
        image_dir=args.image_dir.absolute(),
        work_dir=(args.work_dir or output.with_name(f"{output.name}.work")).absolute(),
        given=given,
        resets=resets,
        timed=frozenset(image.name for image in find_images(tuple(args.timing)))
        if args.timing
        else frozenset(),
        tools_warm=args.tools == "warm",
        command=sys.argv,
    )


def _again(invocation: Invocation, args: BenchArguments) -> int:
    """Run the command line of earlier results, with its paths as they were meant, into another directory."""
    from veneer.lab.records import read_environment

    if args.again is None or args.output is None:
        raise UsageError("missing --output", hint="results are kept, so say where")
    environment = read_environment(args.again)
    words = list(environment.command)
    if words[1:3] != ["lab", "bench"]:
        raise UsageError(f"{args.again} was not made by veneer lab bench")
    output = args.output.absolute()
    try:
        os.chdir(environment.working_directory)
    except OSError as error:
        raise UsageError(f"cannot go to {environment.working_directory}: {error.strerror}") from error
    repeated = BENCH.parser("veneer lab bench").parse(words[3:], BenchArguments())
    repeated.output, repeated.work_dir = output, None
    return bench(invocation, repeated)


def summary_text(summary: "Summary") -> str:
    """A table for each network, and what it all comes to."""
    parts = []
    for network in summary.networks:
        rows = [row for row in summary.rows if row.network == network.name]
        if not rows:
            continue
        heading = (
            "IMAGE",
            "SYSTEM",
            "RUNS",
            "MEDIAN",
            "95 %",
            "P90",
            "RATIO",
            "95 %",
            "AIM",
            "LIMIT",
            "MB",
            "REQ",
        )
        lines = [f"{network.name}: seconds; ratios to {summary.reference or 'nothing'}, in pairs"]
        parts.append("\n".join([*lines, table([heading, *map(_cells, rows)])]))
    if summary.again:
        names = ("IMAGE", "NETWORK", "STARTED AGAIN", "PAIRS", "RATIO", "95 %", "WITH CLEANING UP", "AIM")
        lines = ["to local-warm, in pairs, to the end of the program or a server's first answer"]
        parts.append("\n".join([*lines, table([names, *map(_again_cells, summary.again)])]))
    if summary.overall:
        rows_of = [(network, system, f"{ratio:.3f}") for network, system, ratio in summary.overall]
        parts.append(table([("NETWORK", "SYSTEM", "GEOMETRIC MEAN OF RATIOS"), *rows_of]))
    if summary.failures:
        parts.append(f"{summary.failures} runs failed; their logs are beside the events")
    return "\n\n".join(parts)


def _cells(row: "Row") -> tuple[str, ...]:
    seconds, ratio = row.seconds, row.ratio
    failed = f" (+{row.failures} failed)" if row.failures else ""
    return (
        row.image,
        row.system,
        f"{seconds.count if seconds else 0}{failed}",
        f"{seconds.median:.3f}" if seconds else "-",
        f"{seconds.low:.3f}-{seconds.high:.3f}" if seconds else "-",
        f"{seconds.p90:.3f}" if seconds else "-",
        f"{ratio.median:.3f}" if ratio else "-",
        f"{ratio.median_interval[0]:.3f}-{ratio.median_interval[1]:.3f}" if ratio else "-",
        f"{row.aim:.2f}" if row.aim is not None else "-",
        f"{row.to_limit:.2f}" if row.to_limit is not None else "-",
        f"{row.network_bytes / 1e6:.1f}",
        f"{row.requests:.0f}" if row.requests is not None else "-",
    )


def _again_cells(row: "Again") -> tuple[str, ...]:
    from veneer.lab.summary import AGAIN_AIM

    low, high = row.ready.median_interval
    return (
        row.image,
        row.network,
        row.system,
        str(row.ready.count),
        f"{row.ready.median:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row.command.median:.3f}" if row.command else "-",
        f"{AGAIN_AIM:.2f}",
    )


BENCH = Command(bench, BenchArguments, add_bench_arguments)
