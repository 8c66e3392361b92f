"""``veneer cat``: one file of an image, in a few requests."""

import os
import sys
from contextlib import aclosing

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer cat`` takes."""

    image: str
    path: str


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("PATH")


def run(invocation: Invocation, args: Arguments) -> int:
    """Print the file PATH of IMAGE without pulling the image. Symlinks are followed inside of it.

    An image without an index is downloaded into the cache, once.

    With --json, the content goes to standard output as it is, and only errors are JSON.
    """
    from veneer.image import open_image
    from veneer.image.files import read_file
    from veneer.store.spanstore import open_store

    async def work() -> None:
        settings = invocation.settings
        with invocation.output.reporting() as report:
            async with (
                open_store(settings) as store,
                open_image(args.image, settings, keeper=store, report=report) as opened,
            ):
                async with aclosing(read_file(opened, store, os.fsencode(args.path))) as pieces:
                    async for piece in pieces:
                        sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()

    invocation.run(work)
    return 0


COMMAND = Command(run, Arguments, add_arguments)
