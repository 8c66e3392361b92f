"""``veneer index``: make an image lazily loadable without changing it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text
from veneer.errors import UsageError

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer index`` takes."""

    image: str
    push: bool
    devices: str
    profile: Sequence[Path]
    no_static: bool
    workload_command: str | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_argument(
        "--push",
        action="store_true",
        help="Put the index into the image's repository, for everybody; else it is kept for this host.",
    )
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
    """Make an index of IMAGE as it is, so that it is mounted lazily without being converted.

    With --push the index becomes an artifact that refers to the image, with packs if there are any, and hosts
    that mount the image find it there; nothing of the image changes. Without, it is kept in the cache
    directory.

    Layers are fetched whole once. Gzip layers can be entered about every MiB, zstd layers between the frames
    that they have; to make a layer of a single frame lazy, use veneer convert. To see what an index says, use
    veneer inspect --index.
    """
    from veneer.convert.sidecar import make_sidecar
    from veneer.image.profiles import read_profile

    try:
        profiles = [read_profile(path) for path in args.profile]
    except OSError as error:
        raise UsageError(f"cannot read the profile {error.filename}: {error.strerror}") from error
    static = None if args.no_static else _words(args.workload_command or "")
    with invocation.output.reporting() as report:
        made = invocation.run(
            lambda: make_sidecar(
                args.image,
                invocation.settings,
                push=args.push,
                devices=args.devices,
                profiles=profiles,
                static=static,
                report=report,
            )
        )
    spans = sum(layer[2] for layer in made.layers)
    where = f"refers to it: {made.artifact}" if made.artifact else "kept for this host"
    sizes = f"{size_text(made.stored_size)} in {spans} spans, index {size_text(made.size)}"
    lines = [f"{len(made.layers)} layers, {sizes}"]
    for pack in made.packs:
        kind = "static pack" if pack.static else "pack"
        lines.append(f"  {kind} of {pack.workload}: {size_text(pack.size)} in {size_text(pack.stored_size)}")
    lines += [f"  left out of the index: {count} x {what}" for what, count in made.dropped.items()]
    lines.append(f"{made.image}, {where}")
    invocation.output.result(made.to_json(), "\n".join(lines))
    return 0


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--workload-command {text!r}: {error}") from error


COMMAND = Command(run, Arguments, add_arguments)
