"""``veneer index``: what the index of an image says, in full."""

import json

from veneer.cli.command import Command, CommonArguments, Invocation, group_of
from veneer.cli.parser import Parser

__all__ = ["COMMAND"]


class ShowArguments(CommonArguments):
    """What ``veneer index show`` takes."""

    image: str
    layers: bool


def add_show_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_argument(
        "--layers", action="store_true", help="Each layer as the index has it, not merged into one tree."
    )


def show(invocation: Invocation, args: ShowArguments) -> int:
    """Print the index of IMAGE as JSON: every file with its extents, every span with its digest."""
    from veneer.image import open_image
    from veneer.index.dump import dump_image, dump_layer, dump_policy
    from veneer.oci.canonical import Json

    async def read() -> dict[str, Json]:
        with invocation.output.reporting() as report:
            async with open_image(args.image, invocation.settings, report=report) as opened:
                about: dict[str, Json] = {
                    "image": opened.name,
                    "index": opened.index_descriptor.to_json() if opened.index_descriptor else None,
                    "origin": opened.index_origin,
                }
                if not args.layers:
                    return about | dump_image(await opened.load())
                dumps: list[Json] = [dump_layer(layer) for layer in await opened.layer_indexes()]
                return about | {"policy": dump_policy(opened.policy), "layers": dumps}

    document = invocation.run(read)
    text = "" if invocation.output.json else json.dumps(document, indent=2, ensure_ascii=False)
    invocation.output.result(document, text)
    return 0


COMMAND = group_of(
    "Look into the index of an image.", {"show": Command(show, ShowArguments, add_show_arguments)}
)
