"""``veneer cat``: one file of an image, in a few requests."""

import os
import sys
from contextlib import aclosing

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command

__all__ = ["cat"]


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("image")
@click.argument("path")
def cat(invocation: Invocation, image: str, path: str) -> None:
    """Print the file PATH of IMAGE without pulling the image. Symlinks are followed inside of it.

    With --json, the content goes to standard output as it is, and only errors are JSON.
    """
    from veneer.image import open_image
    from veneer.image.files import read_file
    from veneer.store.spanstore import open_store

    async def run() -> None:
        settings = invocation.settings
        with invocation.output.reporting() as report:
            async with open_image(image, settings, report=report) as opened, open_store(settings) as store:
                async with aclosing(read_file(opened, store, os.fsencode(path))) as pieces:
                    async for piece in pieces:
                        sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()

    invocation.run(run)
