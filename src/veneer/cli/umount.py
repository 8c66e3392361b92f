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
    parser.add_argument("--lazy", action="store_true", help="Detach now; go on serving whoever uses it still.")


def run(invocation: Invocation, args: Arguments) -> int:
    """Unmount DIRECTORY. What was written without --upper is thrown away."""
    from veneer.daemon.mounts import umount

    record = umount(args.directory, invocation.settings.run_dir.absolute(), lazy=args.lazy)
    document = {"mountpoint": str(record.mountpoint), "image": record.image, "lazy": args.lazy}
    invocation.output.result(document, "")
    return 0


COMMAND = Command(run, Arguments, add_arguments)
