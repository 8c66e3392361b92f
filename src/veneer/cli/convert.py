"""``veneer convert``: make an image lazily loadable."""

import os

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.render import size_text

__all__ = ["convert"]


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("source")
@click.argument("destination")
@click.option(
    "--devices",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="What becomes of device nodes when the image is mounted.",
)
def convert(invocation: Invocation, source: str, destination: str, *, devices: str) -> None:
    """Make a lazily loadable copy of the image SOURCE and push it as DESTINATION.

    The copy is an ordinary OCI image with the same config and diffIDs. All platforms are converted unless
    --platform names one. An interrupted conversion goes on where it was when it is run again.
    """
    from veneer.convert.convert import convert as run

    settings = invocation.settings
    chosen = click.get_current_context().params.get("platform") or os.environ.get("VENEER_PLATFORM")
    with invocation.output.reporting() as report:
        result = invocation.run(
            lambda: run(
                source,
                destination,
                settings,
                devices=devices,
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
        lines += [f"  left out of the index: {count} x {what}" for what, count in image.dropped.items()]
    lines.append(result.destination)
    invocation.output.result(result.to_json(), "\n".join(lines))
