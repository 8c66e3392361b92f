"""``veneer bundle``: what an OCI runtime needs to run an image."""

from pathlib import Path
from typing import Unpack

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.container import ContainerArguments, container_options, options_of

__all__ = ["bundle"]


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("image")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@container_options
def bundle(invocation: Invocation, image: str, directory: Path, **options: Unpack[ContainerArguments]) -> int:
    """Write the OCI runtime bundle of IMAGE into DIRECTORY: config.json, and rootfs to mount the image on.

    Then: veneer mount IMAGE DIRECTORY/rootfs && runc run --bundle DIRECTORY NAME
    """
    from veneer.container.run import write_image_bundle

    chosen, directory = options_of(options), directory.absolute()

    async def work() -> None:
        with invocation.output.reporting() as report:
            await write_image_bundle(image, directory, chosen, invocation.settings, report=report)

    invocation.run(work)
    invocation.output.result({"bundle": str(directory)}, "")
    return 0
