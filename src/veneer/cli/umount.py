"""``veneer umount``: the end of a mount."""

from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer umount`` takes."""

    directory: Path
    lazy: bool


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("DIRECTORY", type=Path)
    parser.add_argument("--lazy", action="store_true", help="Unmount also what is in use here.")


def run(invocation: Invocation, args: Arguments) -> int:
    """Unmount DIRECTORY. What was written without --upper is thrown away.

    What uses the file system still is named: with --lazy whoever had files open, and in any case other mount
    namespaces, such as those of containers, that have a copy of the mount. It is served until they have left.
    """
    from veneer.daemon.mounts import umount

    record, stopped = umount(args.directory, invocation.settings.run_dir.absolute(), lazy=args.lazy)
    if stopped.users is not None:
        users = ", ".join(stopped.users) or "somebody who cannot be seen from here"
        invocation.output.say(
            f"note: {record.mountpoint} is unmounted, but in use still by {users}; served until they have left"
        )
    document = {
        "mountpoint": str(record.mountpoint),
        "image": record.image,
        "lazy": args.lazy,
        "in_use": stopped.users is not None,
        "users": stopped.users or [],
    }
    invocation.output.result(document, "")
    return 0


COMMAND = Command(run, Arguments, add_arguments)
