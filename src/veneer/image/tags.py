"""What tags named when they were last asked for: for whoever is content with an image that is here.

One small file a tag. Whatever the disk does wrong costs the note and nothing else. All functions block.

Not for: belief. The bytes that a digest names are checked against it, wherever they come from.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from veneer.errors import UsageError
from veneer.oci.digest import Digest

__all__ = ["known_tag", "note_tag"]

_MOST_BYTES = 256


def known_tag(directory: Path, repository: str, tag: str) -> Digest | None:
    """The digest that :func:`note_tag` was told last; None if nothing is known."""
    try:
        with _path(directory, repository, tag).open("rb") as file:
            return Digest.parse(file.read(_MOST_BYTES).decode("ascii", "replace").strip())
    except (OSError, UsageError):
        return None


def note_tag(directory: Path, repository: str, tag: str, digest: Digest) -> None:
    """Remember what a tag of a repository names."""
    if known_tag(directory, repository, tag) == digest:
        return
    temporary = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=directory)
        with open(handle, "w", encoding="ascii") as file:
            file.write(f"{digest}\n")
        os.replace(temporary, _path(directory, repository, tag))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _path(directory: Path, repository: str, tag: str) -> Path:
    # Neither has a space.
    return directory / hashlib.sha256(f"{repository} {tag}".encode()).hexdigest()
