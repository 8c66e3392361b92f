"""Options that ``veneer run`` and ``veneer bundle`` share."""

import shlex
from collections.abc import Callable
from typing import ParamSpec, TypedDict, TypeVar

import click

from veneer.container.options import NETWORKS, ContainerOptions, parse_environment, parse_volume

__all__ = ["ContainerArguments", "container_options", "options_of"]

P = ParamSpec("P")
T = TypeVar("T")

_OPTIONS = (
    click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set or pass on a variable."),
    click.option("-v", "--volume", multiple=True, metavar="SRC:DST[:ro]", help="Show a path of the host."),
    click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as; looked up in the image."),
    click.option("-w", "--workdir", default="", metavar="DIR", help="Working directory."),
    click.option("--entrypoint", metavar="COMMAND", help="In place of the image's entrypoint and command."),
    click.option("--hostname", default="", metavar="NAME", help="Host name in the container."),
    click.option(
        "--network",
        type=click.Choice(NETWORKS),
        default="host",
        show_default=True,
        help="The host's network, or nothing but loopback.",
    ),
    click.option("--read-only", is_flag=True, help="A root that cannot be written to."),
    click.option("-i", "--interactive", is_flag=True, help="Connect standard input."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.argument("arguments", nargs=-1, type=click.UNPROCESSED),
)


def container_options(function: Callable[P, T]) -> Callable[P, T]:
    """Add the shared options, and the command's words, to a click command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


class ContainerArguments(TypedDict):
    """What click passes for the shared options."""

    env: tuple[str, ...]
    volume: tuple[str, ...]
    user: str
    workdir: str
    entrypoint: str | None
    hostname: str
    network: str
    read_only: bool
    interactive: bool
    tty: bool
    arguments: tuple[str, ...]


def options_of(given: ContainerArguments) -> ContainerOptions:
    """What the shared options say. Raises UsageError."""
    entrypoint = given["entrypoint"]
    return ContainerOptions(
        arguments=given["arguments"],
        entrypoint=None if entrypoint is None else tuple(shlex.split(entrypoint)),
        environment=parse_environment(given["env"]),
        volumes=tuple(map(parse_volume, given["volume"])),
        hostname=given["hostname"],
        user=given["user"],
        working_dir=given["workdir"],
        network=given["network"],
        terminal=given["tty"],
        interactive=given["interactive"],
        read_only=given["read_only"],
    )
