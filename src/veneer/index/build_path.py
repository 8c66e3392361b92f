"""Paths of tar entries: what they may look like, and their components."""

from typing import Final

from veneer.index.tar_header import MalformedTar

__all__ = ["MAX_DEPTH", "MAX_NAME", "WHITEOUT_PREFIX", "check_name", "components"]

#: NAME_MAX of Linux.
MAX_NAME: Final = 255
#: Deeper than anything real, and what a row per level of one short entry may cost.
MAX_DEPTH: Final = 1024
WHITEOUT_PREFIX: Final = b".wh."


def check_name(name: bytes) -> None:
    """Raise unless a directory can have an entry of this name; a whiteout's name is what it hides."""
    if len(name) - (len(WHITEOUT_PREFIX) if name.startswith(WHITEOUT_PREFIX) else 0) > MAX_NAME:
        raise MalformedTar(f"a name of more than {MAX_NAME} bytes")
    if b"\0" in name:
        raise MalformedTar("a name with a NUL")


def components(path: bytes) -> list[bytes]:
    """The names along ``path``. All start at the root: ``/a``, ``./a``, ``a//.`` and ``a`` are the same."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if len(parts) > MAX_DEPTH:
        raise MalformedTar(f"a path of more than {MAX_DEPTH} levels")
    for part in parts:
        check_name(part)
        if part == b"..":
            raise MalformedTar("a path with '..'")
    return parts
