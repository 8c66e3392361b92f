"""``veneer lab sweep``: what other sizes, levels and orders than the defaults would cost."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file, not_directory
from veneer.cli.render import table
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.events import Reporter
    from veneer.lab.records import Network
    from veneer.lab.sweep_record import Sweep
    from veneer.prefetch.profile import Profile

__all__ = ["SWEEP"]

_NETWORKS = ("0ms", "10ms-1gbit", "50ms-100mbit")
_WHAT = ("all", "layers", "packs")


class SweepArguments(CommonArguments):
    """What ``veneer lab sweep`` takes."""

    image: str
    profile: Path
    output: Path | None
    what: str
    networks: list[str]
    think: float
    sample: int


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def add_sweep_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("PROFILE", type=existing_file)
    add = parser.add_argument
    add("-o", "--output", type=not_directory, metavar="FILE", help="Write the results to FILE as JSON.")
    add(
        "--what",
        choices=_WHAT,
        default="all",
        metavar="WHAT",
        help="Ways to cut and compress layers, packs, or all. [default: %(default)s]",
    )
    add(
        "--networks",
        type=_names,
        default=list(_NETWORKS),
        metavar="NAME,...",
        help=f"Distances that starts are computed for. [default: {','.join(_NETWORKS)}]",
    )
    add(
        "--think",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="The program's own pauses are those of the profile times FACTOR. [default: %(default)s]",
    )
    add(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="Compress one of N spans that the start does not need, and estimate the others. [default: 1]",
    )


def sweep(invocation: Invocation, args: SweepArguments) -> int:
    """Try other sizes, levels and orders on IMAGE, and compute what its start would take.

    PROFILE is a file of veneer profile record: it says what the start reads. Sizes and processor times are
    measured on the bytes of the layers that it is about; starts are computed for lines of each length, without
    a profile for ways to store layers, and with nothing but the pack for ways to make packs. Each value is
    tried with the defaults of all others.
    """
    from veneer.image.profiles import read_profile
    from veneer.lab.distance import parse_network
    from veneer.lab.sweep_record import write_sweep
    from veneer.lab.sweep_report import sweep_rows

    if not args.think >= 0:
        raise UsageError("--think must not be negative")
    if args.sample < 1:
        raise UsageError("--sample must be at least 1")
    try:
        profile = read_profile(args.profile)
    except OSError as error:
        raise UsageError(f"cannot read the profile {args.profile}: {error.strerror}") from error
    networks = [parse_network(name) for name in args.networks]
    with invocation.output.reporting() as report:
        found = invocation.run(lambda: _run(invocation, args, profile, networks, report))
    if args.output is not None:
        try:
            write_sweep(args.output, found)
        except OSError as error:
            raise UsageError(f"cannot write {args.output}: {error.strerror}") from error
    tables = (sweep_rows(found, group) for group in found.groups)
    text = "\n\n".join(table([heading, *rows]) for heading, rows in tables)
    invocation.output.result(asdict(found), text)
    return 0


async def _run(
    invocation: Invocation,
    args: SweepArguments,
    profile: "Profile",
    networks: "list[Network]",
    report: "Reporter",
) -> "Sweep":
    import tempfile

    from veneer.image import open_image
    from veneer.lab.sweep import swept
    from veneer.store.spanstore import open_store

    settings = invocation.settings
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=settings.cache_dir) as directory:
        # Not the usual cache: all of the layers is read, which would push out what starts need.
        own = replace(settings, cache_dir=Path(directory))
        async with open_store(own) as store, open_image(args.image, own, report=report) as image:
            result = await swept(
                image,
                profile,
                store,
                networks,
                own.cache_dir,
                what=args.what,
                think=args.think,
                sample=args.sample,
                command=sys.argv,
                report=report,
            )
    return result


SWEEP = Command(sweep, SweepArguments, add_sweep_arguments)
