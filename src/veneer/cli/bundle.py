"""``veneer bundle``: what an OCI runtime needs to run an image."""

from pathlib import Path

from veneer.cli.command import Command, Invocation
from veneer.cli.container import ContainerArguments, options_of
from veneer.cli.parser import Parser, directory

__all__ = ["COMMAND"]


class Arguments(ContainerArguments):
    """What ``veneer bundle`` takes."""

    image: str
    directory: Path


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("DIRECTORY", type=directory)
    Arguments.add_container(parser)


def run(invocation: Invocation, args: Arguments) -> int:
    """Write the OCI runtime bundle of IMAGE into DIRECTORY: config.json, and rootfs to mount the image on.

    Then: veneer mount IMAGE DIRECTORY/rootfs && runc run --bundle DIRECTORY NAME
    """
    from veneer.container.bundle import write_image_bundle

    chosen, target = options_of(args), args.directory.absolute()

    async def work() -> None:
        with invocation.output.reporting() as report:
            await write_image_bundle(args.image, target, chosen, invocation.settings, report=report)

    invocation.run(work)
    invocation.output.result({"bundle": str(target)}, "")
    return 0


COMMAND = Command(run, Arguments, add_arguments)
