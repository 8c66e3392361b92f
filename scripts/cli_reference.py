"""Print docs/reference/cli.md: the help of every command, made from the commands themselves."""

import sys
from collections.abc import Iterator

import click

from veneer.cli.main import cli

HEAD = """# Command reference

Made by `scripts/docs` from the commands' own help; a test fails when it is out of date.
"""


def pages(command: click.Command, context: click.Context) -> Iterator[str]:
    """A section for the command, then one for each of its subcommands."""
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if child := command.get_command(context, name):
                yield from pages(
                    child, click.Context(child, info_name=name, parent=context, max_content_width=100)
                )


def text() -> str:
    """The whole page."""
    context = click.Context(cli, info_name="veneer", max_content_width=100, terminal_width=100)
    return "\n".join([HEAD, *pages(cli, context)])


if __name__ == "__main__":
    sys.stdout.write(text())
