"""Print docs/reference/cli.md: the help of every command, made from the commands themselves."""

import sys
from collections.abc import Iterator

from veneer.cli.command import AnyCommand, Group
from veneer.cli.main import VENEER

HEAD = """# Command reference

Made by `scripts/docs` from the commands' own help; a test fails when it is out of date.
"""


def pages(prog: str, entry: AnyCommand | Group) -> Iterator[str]:
    """A section for the command, then one for each of its subcommands."""
    yield f"## {prog}\n\n```text\n{entry.parser(prog).format_help().rstrip()}\n```\n"
    if isinstance(entry, Group):
        for name in entry.summaries:
            yield from pages(f"{prog} {name}", entry.find(name))


if __name__ == "__main__":
    sys.stdout.write("\n".join([HEAD, *pages("veneer", VENEER)]))
