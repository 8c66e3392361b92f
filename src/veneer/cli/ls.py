"""``veneer ls``: files of an image, from its index alone."""

import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.cli.render import path_json, printable, table

if TYPE_CHECKING:
    from veneer.image.files import FileEntry

__all__ = ["COMMAND"]

_SECOND = 1_000_000_000


class Arguments(CommonArguments):
    """What ``veneer ls`` takes."""

    image: str
    path: str
    long: bool
    recursive: bool


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("PATH", default="/")
    add = parser.add_argument
    add("-l", "--long", action="store_true", help="Mode, links, owner, size and time as well.")
    add("-R", "--recursive", action="store_true", help="Everything below as well.")


def run(invocation: Invocation, args: Arguments) -> int:
    """List PATH of IMAGE without pulling it: only the index is fetched.

    An image without an index is downloaded into the cache, once.
    """
    from veneer.image import open_image
    from veneer.image.files import FileEntry, list_path
    from veneer.store.spanstore import open_store

    entries: list[FileEntry] = []

    async def work() -> None:
        with invocation.output.reporting() as report:
            async with (
                open_store(invocation.settings) as store,
                open_image(args.image, invocation.settings, keeper=store, report=report) as opened,
            ):
                path, merged = os.fsencode(args.path), await opened.load()
                entries.extend(list_path(merged, path, opened.name, recursive=args.recursive))

    invocation.run(work)
    text = (
        table([_row(entry) for entry in entries]) if args.long else "\n".join(_name(entry) for entry in entries)
    )
    invocation.output.result([_json(entry) for entry in entries], text)
    return 0


def _name(entry: "FileEntry") -> str:
    """The path from the root."""
    return printable((b"/" + entry.path).decode(errors="backslashreplace"))


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


COMMAND = Command(run, Arguments, add_arguments)
