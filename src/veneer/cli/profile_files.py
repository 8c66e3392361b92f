"""What the commands of ``veneer profile`` share: options, and profiles in files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.backend import DEFAULT_WORKLOAD
from veneer.cli.command import Invocation
from veneer.cli.parser import Parser, not_directory
from veneer.cli.render import size_text
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.prefetch.profile import Profile

__all__ = ["add_output", "add_workload", "amount_text", "put_out", "read_given", "write_profile"]


def add_workload(parser: Parser, default: str | None = DEFAULT_WORKLOAD) -> None:
    """Declare ``--workload``."""
    shown = f" [default: {default}]" if default else ""
    parser.add_argument(
        "--workload", default=default, metavar="NAME", help=f"Which workload of the image.{shown}"
    )


def add_output(parser: Parser, about: str) -> None:
    """Declare ``--output``, with what it is about."""
    parser.add_argument("-o", "--output", type=not_directory, metavar="FILE", help=about)


def read_given(path: Path) -> "Profile":
    """The profile in a file that the user named. Raises UsageError when there is none."""
    from veneer.image.profiles import read_profile

    try:
        return read_profile(path)
    except OSError as error:
        raise UsageError(f"cannot read the profile {path}: {error.strerror}") from error


def write_profile(path: Path, profile: "Profile") -> None:
    """Write a profile where the user said. Raises UsageError."""
    try:
        path.write_bytes(profile.to_json() + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write the profile {path}: {error.strerror}") from error


def put_out(invocation: Invocation, profile: "Profile", path: Path | None) -> None:
    """Write a profile to a file, or print it."""
    if path is not None:
        write_profile(path, profile)
        return
    text = profile.to_json().decode()
    invocation.output.result(json.loads(text), text)


def amount_text(profile: "Profile") -> str:
    """How much a profile is about, for the middle of a sentence."""
    ranges, layers = len(profile.uses), len(profile.layers)
    return f"{ranges} ranges of {layers} layers, {size_text(profile.size)},"
