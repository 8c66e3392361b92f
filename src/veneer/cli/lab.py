"""``veneer lab``: images, networks and systems to measure starts with."""

from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation, group_of
from veneer.cli.lab_bench import BENCH, IMAGE_DIR
from veneer.cli.lab_report import REPORT
from veneer.cli.lab_sweep import SWEEP
from veneer.cli.parser import Parser, directory
from veneer.cli.render import size_text, table

__all__ = ["COMMAND"]


class ImagesArguments(CommonArguments):
    """What ``veneer lab images`` takes."""

    names: tuple[str, ...]
    output: Path
    force: bool


def add_images_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("NAMES", repeated=True)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=directory,
        default=IMAGE_DIR,
        metavar="DIR",
        help="Where they are kept. [default: %(default)s]",
    )
    add("--force", action="store_true", help="Build them anew, also those that are there.")


def images(invocation: Invocation, args: ImagesArguments) -> int:
    """Build the images of the lab, or those of NAMES, from distribution packages.

    They are kept in one OCI layout, DIR/layout, with a tag for each. What is there and was made from the same
    definition is left alone. Takes root, mmdebstrap, and apt as it is set up on this machine.
    """
    from dataclasses import asdict

    from veneer.lab.build import build_images
    from veneer.lab.imageset import find_images

    with invocation.output.reporting() as report:
        built = build_images(find_images(args.names), args.output, force=args.force, report=report)
    rows = [("IMAGE", "LAYERS", "STORED", "SIZE", "PACKAGES", "DIGEST")]
    for image in built:
        sizes = size_text(image.stored), size_text(image.size)
        rows.append((image.name, str(image.layers), *sizes, str(len(image.packages)), image.digest))
    invocation.output.result([asdict(image) for image in built], table(rows))
    return 0


COMMAND = group_of(
    "Measure what starts of containers cost, and compare with other systems.",
    {
        "images": Command(images, ImagesArguments, add_images_arguments),
        "bench": BENCH,
        "report": REPORT,
        "sweep": SWEEP,
    },
)
