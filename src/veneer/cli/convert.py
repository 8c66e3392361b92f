"""``veneer convert``: make an image lazily loadable."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text
from veneer.errors import UsageError

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer convert`` takes."""

    source: str
    destination: str
    devices: str
    profile: Sequence[Path]
    no_static: bool
    workload_command: str | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("SOURCE")
    parser.add_word("DESTINATION")
    parser.add_argument(
        "--devices",
        choices=("drop", "keep"),
        default="drop",
        help="What becomes of device nodes when the image is mounted. [default: %(default)s]",
    )

    parser.add_argument(
        "--profile",
        type=existing_file,
        action="append",
        default=[],
        metavar="FILE",
        help="Add a pack of what this profile says that a start reads; may be repeated.",
    )
    parser.add_argument(
        "--workload-command",
        metavar="COMMAND",
        help="What the image will be started with, in place of its Cmd, for the pack that is made without a "
        "profile.",
    )
    parser.add_argument(
        "--no-static",
        action="store_true",
        help="Add no pack of what the image's files tell that a start will read.",
    )


def run(invocation: Invocation, args: Arguments) -> int:
    """Make a lazily loadable copy of the image SOURCE and push it as DESTINATION.

    The copy is an ordinary OCI image with the same config and diffIDs. All platforms are converted unless
    --platform names one. An interrupted conversion goes on where it was when it is run again.

    Unless there is a profile of the default workload, a pack is added of what the start of the image's command
    will read, as far as its files tell; nothing of it is run.
    """
    from veneer.convert.convert import convert
    from veneer.image.profiles import read_profile

    settings = invocation.settings
    chosen = args.platform or os.environ.get("VENEER_PLATFORM")
    try:
        profiles = [read_profile(path) for path in args.profile]
    except OSError as error:
        raise UsageError(f"cannot read the profile {error.filename}: {error.strerror}") from error
    static = None if args.no_static else _words(args.workload_command or "")
    with invocation.output.reporting() as report:
        result = invocation.run(
            lambda: convert(
                args.source,
                args.destination,
                settings,
                devices=args.devices,
                profiles=profiles,
                static=static,
                platform=settings.platform if chosen else None,
                report=report,
            )
        )
    lines = []
    for image in result.images:
        spans = sum(layer.spans for layer in image.layers)
        before = sum(layer.source.size for layer in image.layers)
        after = sum(layer.blob.size for layer in image.layers)
        how = "copied as it was" if image.copied else f"{size_text(before)} before"
        lines.append(
            f"{image.platform}: {len(image.layers)} layers, {size_text(after)} in {spans} spans ({how}), "
            f"index {size_text(image.index.size)}"
        )
        lines += [
            f"  {'static ' if pack.static else ''}pack of {pack.workload}: "
            f"{size_text(pack.size)} in {size_text(pack.stored_size)}"
            for pack in image.packs
        ]
        lines += [f"  left out of the index: {count} x {what}" for what, count in image.dropped.items()]
    lines.append(result.destination)
    invocation.output.result(result.to_json(), "\n".join(lines))
    return 0


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--workload-command {text!r}: {error}") from error


COMMAND = Command(run, Arguments, add_arguments)
