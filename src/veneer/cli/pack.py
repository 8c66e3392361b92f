"""``veneer pack``: what a start reads of an image, kept by this host in one piece."""

from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.backend import DEFAULT_WORKLOAD
from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.prefetch.profile import Profile

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer pack`` takes."""

    image: str
    profile: tuple[Path, ...]
    workload: str | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("PROFILE", type=existing_file, repeated=True)
    parser.add_argument(
        "--workload",
        metavar="NAME",
        help=f"What the pack is for; by default as the profile says, or {DEFAULT_WORKLOAD}.",
    )


def run(invocation: Invocation, args: Arguments) -> int:
    """Make a pack of IMAGE for this host: what a start reads, in its order, which mounts then have at once.

    PROFILE is a file; several are merged. Without one it is the profile that is kept here, which veneer
    profile record makes. The pack is kept in the cache directory. To put packs into a registry, give profiles
    to veneer convert.
    """
    from veneer.convert.local import make_local_pack
    from veneer.prefetch.profile import merge_profiles

    settings = invocation.settings
    profile = merge_profiles([_read(path) for path in args.profile]) if args.profile else None
    with invocation.output.reporting() as report:
        made = invocation.run(
            lambda: make_local_pack(args.image, profile, settings, workload=args.workload, report=report)
        )
    pack = made.pack
    blob, device = pack.blob, pack.content.device
    invocation.output.result(
        {
            "image": made.image,
            "workload": pack.workload,
            "size": device.spans.size,
            "stored_size": blob.size,
            "index_size": len(pack.index),
            "spans": len(device.spans),
            "places": len(pack.content.places),
            "digest": str(pack.descriptor.digest),
            "directory": str(made.directory),
        },
        f"workload {pack.workload} of {made.image}: {size_text(device.spans.size)} in {size_text(blob.size)}, "
        f"kept in {made.directory}",
    )
    return 0


def _read(path: Path) -> "Profile":
    from veneer.image.profiles import read_profile

    try:
        return read_profile(path)
    except OSError as error:
        raise UsageError(f"cannot read the profile {path}: {error.strerror}") from error


COMMAND = Command(run, Arguments, add_arguments)
