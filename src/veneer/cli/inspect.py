"""``veneer inspect``: what an image is and how it would be loaded."""

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.cli.render import size_text, table

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer inspect`` takes."""

    image: str


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")


def run(invocation: Invocation, args: Arguments) -> int:
    """Show the layers, sizes and index of IMAGE, and how it would be loaded and why."""
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


COMMAND = Command(run, Arguments, add_arguments)
