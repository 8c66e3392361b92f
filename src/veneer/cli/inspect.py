"""``veneer inspect``: what an image is and how it would be loaded."""

import json

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.cli.render import size_text, table

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer inspect`` takes."""

    image: str
    index: str | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_argument(
        "--index",
        choices=("image", "layers"),
        help="Print what the index says, as JSON: every file with its extents, every span with its digest; of "
        "the image as one tree, or of each layer as the index has it.",
    )


def run(invocation: Invocation, args: Arguments) -> int:
    """Show the layers, sizes and index of IMAGE, and how it would be loaded and why."""
    if args.index is not None:
        return _dump(invocation, args)
    from veneer.image.inspect import inspect_image

    with invocation.output.reporting() as report:
        summary = invocation.run(lambda: inspect_image(args.image, invocation.settings, report=report))
    layers = [("LAYER", "STORED", "SIZE", "SPANS", "LAZY")]
    for layer in summary.layers:
        size = "?" if layer.size is None else size_text(layer.size)
        lazy = f"{'yes' if layer.lazy else 'no'}, because {layer.reason}"
        layers.append((layer.blob.digest.hex[:12], size_text(layer.blob.size), size, str(layer.spans), lazy))
    size = "" if summary.size is None else f", {size_text(summary.size)} unpacked"
    facts = [
        ("image", summary.name),
        ("platform", str(summary.config.platform)),
        ("size", f"{size_text(summary.stored_size)} stored{size}"),
        ("lazy", f"{'yes' if summary.lazy else 'no'}, because {summary.reason}"),
    ]
    if summary.index:
        files = ", ".join(f"{count} {kind}" for kind, count in summary.files.items())
        facts.append(("index", f"{summary.index.digest} ({size_text(summary.index.size)}; {files})"))
    if argv := [*summary.config.entrypoint, *summary.config.cmd]:
        facts.append(("command", " ".join(argv)))
    text = f"{table(facts)}\n\n{table(layers)}"
    invocation.output.result(summary.to_json(), text)
    return 0


def _dump(invocation: Invocation, args: Arguments) -> int:
    """Print the index in full."""
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
                if args.index == "image":
                    return about | dump_image(await opened.load())
                dumps: list[Json] = [dump_layer(layer) for layer in await opened.layer_indexes()]
                return about | {"policy": dump_policy(opened.policy), "layers": dumps}

    document = invocation.run(read)
    text = "" if invocation.output.json else json.dumps(document, indent=2, ensure_ascii=False)
    invocation.output.result(document, text)
    return 0


COMMAND = Command(run, Arguments, add_arguments)
