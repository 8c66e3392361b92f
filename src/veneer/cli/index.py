"""``veneer index``: what the index of an image says, in full."""

import json

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command

__all__ = ["index"]


@click.group()
def index() -> None:
    """Look into the index of an image."""


@index.command(epilog=EXIT_STATUS)
@command
@click.argument("image")
@click.option("--layers", is_flag=True, help="Each layer as the index has it, not merged into one tree.")
def show(invocation: Invocation, image: str, *, layers: bool) -> None:
    """Print the index of IMAGE as JSON: every file with its extents, every span with its digest."""
    from veneer.image import open_image
    from veneer.index.dump import dump_image, dump_layer, dump_policy
    from veneer.oci.canonical import Json

    async def read() -> dict[str, Json]:
        with invocation.output.reporting() as report:
            async with open_image(image, invocation.settings, report=report) as opened:
                about: dict[str, Json] = {
                    "image": opened.name,
                    "index": opened.index_descriptor.to_json(),
                    "origin": opened.index_origin,
                }
                if not layers:
                    return about | dump_image(opened.index)
                dumps: list[Json] = [dump_layer(layer) for layer in opened.layer_indexes]
                return about | {"policy": dump_policy(opened.index.policy), "layers": dumps}

    document = invocation.run(read)
    text = "" if invocation.output.json else json.dumps(document, indent=2, ensure_ascii=False)
    invocation.output.result(document, text)
