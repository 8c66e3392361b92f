"""``veneer index``: make an image lazily loadable without changing it."""

from veneer.cli.command import Command, Invocation
from veneer.cli.extras import ExtraArguments, extra_lines
from veneer.cli.parser import Parser
from veneer.cli.render import size_text

__all__ = ["COMMAND"]


class Arguments(ExtraArguments):
    """What ``veneer index`` takes."""

    image: str
    push: bool


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_argument(
        "--push",
        action="store_true",
        help="Put the index into the image's repository, for everybody; else it is kept for this host.",
    )
    Arguments.add_extra(parser)


def run(invocation: Invocation, args: Arguments) -> int:
    """Make an index of IMAGE as it is, so that it is mounted lazily without being converted.

    With --push the index becomes an artifact that refers to the image, with packs if there are any, and hosts
    that mount the image find it there; nothing of the image changes. Without, it is kept in the cache
    directory.

    Layers are fetched whole once. Gzip layers can be entered about every MiB, zstd layers between the frames
    that they have; to make a layer of a single frame lazy, use veneer convert. To see what an index says, use
    veneer inspect --index.
    """
    from veneer.convert.sidecar import make_sidecar

    profiles, static = args.profiles(), args.static()
    with invocation.output.reporting() as report:
        made = invocation.run(
            lambda: make_sidecar(
                args.image,
                invocation.settings,
                push=args.push,
                devices=args.devices,
                profiles=profiles,
                static=static,
                report=report,
            )
        )
    spans = sum(layer[2] for layer in made.layers)
    where = f"refers to it: {made.artifact}" if made.artifact else "kept for this host"
    sizes = f"{size_text(made.stored_size)} in {spans} spans, index {size_text(made.size)}"
    lines = [f"{len(made.layers)} layers, {sizes}"]
    lines += extra_lines(made.packs, made.dropped)
    lines.append(f"{made.image}, {where}")
    invocation.output.result(made.to_json(), "\n".join(lines))
    return 0


COMMAND = Command(run, Arguments, add_arguments)
