"""``veneer convert``: make an image lazily loadable."""

import os

from veneer.cli.command import Command, Invocation
from veneer.cli.extras import ExtraArguments, extra_lines
from veneer.cli.parser import Parser
from veneer.cli.render import size_text

__all__ = ["COMMAND"]


class Arguments(ExtraArguments):
    """What ``veneer convert`` takes."""

    source: str
    destination: str


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("SOURCE")
    parser.add_word("DESTINATION")
    Arguments.add_extra(parser)


def run(invocation: Invocation, args: Arguments) -> int:
    """Make a lazily loadable copy of the image SOURCE and push it as DESTINATION.

    The copy is an ordinary OCI image with the same config and diffIDs. All platforms are converted unless
    --platform names one. An interrupted conversion goes on where it was when it is run again.

    Unless there is a profile of the default workload, a pack is added of what the start of the image's command
    will read, as far as its files tell; nothing of it is run.
    """
    from veneer.convert.convert import convert

    settings = invocation.settings
    chosen = args.platform or os.environ.get("VENEER_PLATFORM")
    profiles, static = args.profiles(), args.static()
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
        lines += extra_lines(image.packs, image.dropped)
    lines.append(result.destination)
    invocation.output.result(result.to_json(), "\n".join(lines))
    return 0


COMMAND = Command(run, Arguments, add_arguments)
