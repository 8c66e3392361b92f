"""What the two commands share that make an image lazily loadable: ``veneer convert`` and ``veneer index``."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from veneer.cli.command import CommonArguments
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.prefetch.profile import Profile

__all__ = ["ExtraArguments", "extra_lines"]


class ExtraArguments(CommonArguments):
    """What goes into an index, and which packs come with it."""

    devices: str
    profile: Sequence[Path]
    no_static: bool
    workload_command: str | None

    @staticmethod
    def add_extra(parser: Parser) -> None:
        """Declare them."""
        parser.add_argument(
            "--devices",
            choices=("drop", "keep"),
            default="drop",
            help="What becomes of device nodes when the image is mounted. [default: %(default)s]",
        )
        parser.add_argument(
            "--profile",
            type=existing_file,
            action="append",
            default=[],
            metavar="FILE",
            help="Add a pack of what this profile says that a start reads; may be repeated.",
        )
        parser.add_argument(
            "--workload-command",
            metavar="COMMAND",
            help="What the image will be started with, in place of its Cmd, for the pack that is made "
            "without a profile.",
        )
        parser.add_argument(
            "--no-static",
            action="store_true",
            help="Add no pack of what the image's files tell that a start will read.",
        )

    def profiles(self) -> "list[Profile]":
        """The profiles that were given. Raises VeneerError."""
        from veneer.image.profiles import read_profile

        try:
            return [read_profile(path) for path in self.profile]
        except OSError as error:
            raise UsageError(f"cannot read the profile {error.filename}: {error.strerror}") from error

    def static(self) -> tuple[str, ...] | None:
        """The command that a pack is made for without a profile; none at all for that of the image.

        None if there is to be no such pack. Raises UsageError.
        """
        if self.no_static:
            return None
        text = self.workload_command or ""
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"--workload-command {text!r}: {error}") from error


class MadePack(Protocol):
    """A pack, as far as it is shown."""

    @property
    def workload(self) -> str:
        """What it is for."""

    @property
    def static(self) -> bool:
        """Whether nothing was run for it."""

    @property
    def size(self) -> int:
        """Plain bytes."""

    @property
    def stored_size(self) -> int:
        """Bytes to be fetched."""


def extra_lines(packs: Iterable[MadePack], dropped: Mapping[str, int]) -> list[str]:
    """What is said of packs that were made, and of what the index does not hold."""
    return [
        *(
            f"  {'static ' if pack.static else ''}pack of {pack.workload}: "
            f"{size_text(pack.size)} in {size_text(pack.stored_size)}"
            for pack in packs
        ),
        *(f"  left out of the index: {count} x {what}" for what, count in dropped.items()),
    ]
