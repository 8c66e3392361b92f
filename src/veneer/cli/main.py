"""The ``veneer`` command group.

Subcommands are imported when they are called, never before: ``veneer --help`` and ``veneer umount`` must
not pay for FUSE, HTTP and compression libraries that they do not use.
"""

import importlib

import click

from veneer import __version__

__all__ = ["COMMANDS", "cli", "main"]

#: Subcommand -> (module under veneer.cli, what ``veneer --help`` says of it). In the order of a first day.
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Say what works on this machine and how to mend what does not."),
    "convert": ("convert", "Make an image lazily loadable; it stays an ordinary OCI image."),
    "inspect": ("inspect", "Show an image's layers, sizes and index, and how it would be loaded."),
    "ls": ("ls", "List files of an image without pulling it."),
    "cat": ("cat", "Print one file of an image without pulling it."),
    "mount": ("mount", "Mount an image's root file system."),
    "umount": ("umount", "Unmount what veneer mounted."),
    "status": ("status", "Show what is mounted and what has been fetched."),
    "run": ("run", "Run a command in a container on a lazily mounted image."),
    "bundle": ("bundle", "Write the OCI runtime bundle of an image."),
    "verify": ("verify", "Check every byte of an image against its index, digests and diffIDs."),
    "index": ("index", "Look into the index of an image."),
    "cache": ("cache", "Look after the local cache."),
    "registry": ("registry", "Serve a directory of OCI image layouts as a registry."),
}


class LazyGroup(click.Group):
    """A group whose members are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All subcommands, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand: the object named like the command in its module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"veneer.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"veneer.cli.{cmd_name} does not define a command of that name")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of subcommands, from COMMANDS alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Data goes to standard output, everything else to standard error.",
)
@click.version_option(__version__, prog_name="veneer")
def cli() -> None:
    """Mount container images in the time it takes to fetch their index.

    An IMAGE is a registry reference such as localhost:5000/team/app:1.0, or an OCI layout on disk, written
    oci:DIR, oci:DIR:TAG or oci:DIR@sha256:DIGEST.
    """


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="veneer")
