"""``veneer ls``: files of an image, from its index alone."""

import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.render import path_json, table

if TYPE_CHECKING:
    from veneer.image.files import FileEntry

__all__ = ["ls"]

_SECOND = 1_000_000_000


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("image")
@click.argument("path", default="/")
@click.option("-l", "--long", is_flag=True, help="Mode, links, owner, size and time as well.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below as well.")
def ls(invocation: Invocation, image: str, path: str, *, long: bool, recursive: bool) -> None:
    """List PATH of IMAGE without pulling it: only the index is fetched."""
    from veneer.image import open_image
    from veneer.image.files import FileEntry, list_path

    async def run() -> list[FileEntry]:
        with invocation.output.reporting() as report:
            async with open_image(image, invocation.settings, report=report) as opened:
                entries = list_path(opened.index, os.fsencode(path), opened.name, recursive=recursive)
                return list(entries)

    entries = invocation.run(run)
    text = table([_row(entry) for entry in entries]) if long else "\n".join(_name(entry) for entry in entries)
    invocation.output.result([_json(entry) for entry in entries], text)


def _name(entry: "FileEntry") -> str:
    """The path from the root, with what would confuse a terminal escaped."""
    path = (b"/" + entry.path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _row(entry: "FileEntry") -> tuple[str, ...]:
    target = f" -> {entry.target.decode(errors='backslashreplace')}" if entry.target else ""
    size = (
        ",".join(map(str, entry.rdev)) if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode) else entry.size
    )
    return (
        stat.filemode(entry.mode),
        str(entry.nlink),
        f"{entry.uid}:{entry.gid}",
        str(size),
        _time(entry.mtime_ns),
        _name(entry) + target,
    )


def _time(mtime_ns: int) -> str:
    """UTC, or seconds since the epoch where the calendar ends."""
    seconds = mtime_ns // _SECOND
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"


def _json(entry: "FileEntry") -> dict[str, object]:
    out: dict[str, object] = {
        **path_json(b"/" + entry.path),
        "type": entry.type,
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "nlink": entry.nlink,
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
    }
    if entry.target:
        out["target"] = entry.target.decode(errors="backslashreplace")
    if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
        out["rdev"] = list(entry.rdev)
    if entry.xattrs:
        out["xattrs"] = [name.decode(errors="backslashreplace") for name in entry.xattrs]
    return out
