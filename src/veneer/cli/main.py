"""The ``veneer`` command.

Subcommands are imported when they are called, never before, and import what is heavy when they run.
"""

import importlib
import os
import sys
from typing import NoReturn

from veneer import __version__
from veneer.cli.command import AnyCommand, Command, Group, execute

__all__ = ["COMMANDS", "VENEER", "main"]

#: Subcommand, which is a module here as well -> what ``veneer --help`` says of it. In the order of a first day.
COMMANDS = {
    "doctor": "Say what works on this machine and how to mend what does not.",
    "convert": "Make an image lazily loadable; it stays an ordinary OCI image.",
    "index": "Make an image lazily loadable without changing it.",
    "inspect": "Show an image's layers, sizes and index, and how it would be loaded.",
    "ls": "List files of an image without pulling it.",
    "cat": "Print one file of an image without pulling it.",
    "mount": "Mount an image's root file system.",
    "umount": "Unmount what veneer mounted.",
    "status": "Show what is mounted and what has been fetched.",
    "daemon": "Start, stop or restart what serves mounts.",
    "run": "Run a command in a container on a lazily mounted image.",
    "profile": "Learn what a start reads, so that it can be there before it is asked for.",
    "bundle": "Write the OCI runtime bundle of an image.",
    "trace": "Show when what happened in a start, draw it, replay what it read.",
    "pack": "Make a pack of an image for this host: what a start reads, in one piece.",
    "verify": "Check every byte of an image against its index, digests and diffIDs.",
    "cache": "Look after the local cache.",
    "registry": "Serve a directory of OCI image layouts as a registry.",
    "lab": "Measure what starts of containers cost, and compare with other systems.",
}


def _find(name: str) -> AnyCommand | Group:
    """Import one subcommand: ``COMMAND`` of the module that is named like it."""
    found = importlib.import_module(f"veneer.cli.{name}").COMMAND
    if not isinstance(found, Command | Group):
        raise TypeError(f"veneer.cli.{name}.COMMAND is no command")
    return found


VENEER = Group(
    """Mount container images in the time it takes to fetch their index.

    An IMAGE is a registry reference such as localhost:5000/team/app:1.0, or an OCI layout on disk, written
    oci:DIR, oci:DIR:TAG or oci:DIR@sha256:DIGEST.
    """,
    COMMANDS,
    _find,
    epilog="Data goes to standard output, everything else to standard error.",
    version=f"veneer, version {__version__}",
)


def main() -> NoReturn:
    """Entry point of the console script."""
    code = execute(VENEER, "veneer", sys.argv[1:])
    # All is done and written: taking the interpreter apart would be a sixth of the time of ``veneer status``.
    os._exit(code)
