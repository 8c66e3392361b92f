"""One entry of a tar: what its header block and the extended headers before it say together."""

from dataclasses import dataclass
from typing import Final

from veneer.index.tar_header import BLOCK, MalformedTar, c_string, number
from veneer.index.tar_pax import PaxRecords, decimal, time_ns, xattrs_of

__all__ = ["MAX_PATH", "MAX_SIZE", "Extensions", "TarEntry", "display", "read_entry"]

#: PATH_MAX of Linux without the NUL; longer paths and link targets cannot be used.
MAX_PATH: Final = 4095
#: Sizes and offsets are signed 64-bit numbers everywhere else.
MAX_SIZE: Final = (1 << 63) - 1
#: chown takes 2**32 - 1 as "leave it".
_MAX_ID: Final = (1 << 32) - 2
#: dev_t of Linux has 12 bits of major and 20 bits of minor number.
_MAX_MAJOR: Final = (1 << 12) - 1
_MAX_MINOR: Final = (1 << 20) - 1
#: Bytes of a path in a message.
_SHOWN_PATH: Final = 200

_KINDS: Final = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"S": "file",
    b"1": "link",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "dir",
    b"6": "fifo",
}


def display(path: bytes) -> str:
    """A path from outside for a message: quoted, escaped and not too long."""
    shown = path if len(path) <= _SHOWN_PATH else path[:_SHOWN_PATH] + b"..."
    return repr(shown.decode("utf-8", "backslashreplace"))


@dataclass(slots=True)
class TarEntry:
    """One entry, as the tar has it.

    Args:
        path: as stored, not normalised.
        kind: file, dir, symlink, link (hard link), char, block or fifo.
        mode: permission bits, ``0o7777`` at most.
        uid: owner.
        gid: group.
        mtime_ns: exact; may be beyond 64 bits.
        size: of the file that a reader sees, holes included; 0 for other kinds.
        data: stream offset of the stored data.
        stored_size: bytes of stored data; 0 for other kinds.
        link: target of a symlink or hard link, as stored.
        rdev: (major, minor) of a device.
        xattrs: extended attributes.
        segments: (file offset, length) of a sparse file's data, stored back to back from ``data``: ascending,
            not empty, not touching. None for a file without holes.
        header: stream offset of the entry's first header block, extended headers included.
    """

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    data: int
    stored_size: int
    link: bytes
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    segments: tuple[tuple[int, int], ...] | None
    header: int


@dataclass(slots=True)
class Extensions:
    """What the extended headers before an entry say about it.

    Args:
        start: stream offset of the first of them, -1 when there is none.
        name: GNU long name.
        link: GNU long link target.
        records: PAX records of this entry.
    """

    start: int = -1
    name: bytes | None = None
    link: bytes | None = None
    records: PaxRecords | None = None


def read_entry(
    block: bytes, fields: tuple[bytes, ...], offset: int, extensions: Extensions, defaults: dict[bytes, bytes]
) -> TarEntry:
    """The entry at ``offset`` without its sparse map. ``defaults`` are the records of global headers."""
    name, mode, uid, gid, size, mtime, _checksum, flag, link, magic, major, minor, prefix = fields
    kind = _KINDS.get(flag)
    if kind is None:
        raise MalformedTar(f"the unknown entry type {flag!r}")
    path = c_string(name)
    if extensions.name is not None:
        path = extensions.name
    elif prefix[0] and magic[:6] == b"ustar\0":
        # star keeps times in the last 24 bytes of the prefix.
        path = c_string(prefix[:131] if block[508:] == b"tar\0" else prefix) + b"/" + path
    target = b""
    if kind in ("link", "symlink"):
        target = c_string(link) if extensions.link is None else extensions.link
    rdev = (0, 0)
    if kind in ("char", "block") and magic[:5] == b"ustar":
        rdev = number(major), number(minor)
    entry = TarEntry(
        path,
        kind,
        number(mode) & 0o7777,
        number(uid),
        number(gid),
        number(mtime) * 1_000_000_000,
        number(size),
        offset + BLOCK,
        0,
        target,
        rdev,
        {},
        None,
        offset if extensions.start < 0 else extensions.start,
    )
    if extensions.records is not None or defaults:
        _apply(entry, extensions, defaults)
    if flag == b"\0" and entry.path.endswith(b"/"):
        entry.kind = "dir"
    _check(entry)
    return entry


def _apply(entry: TarEntry, extensions: Extensions, defaults: dict[bytes, bytes]) -> None:
    """Let PAX records overrule the header; an empty value means that the header is right after all."""
    records = extensions.records or PaxRecords()
    facts: dict[bytes, bytes] = {**defaults, **records} if defaults else records
    if path := facts.get(b"path"):
        if extensions.name is not None:
            raise MalformedTar("both GNU and PAX headers give a path")
        entry.path = path
    if records.sparse and (path := facts.get(b"GNU.sparse.name")):
        entry.path = path
    if (link := facts.get(b"linkpath")) and entry.kind in ("link", "symlink"):
        if extensions.link is not None:
            raise MalformedTar("both GNU and PAX headers give a link target")
        entry.link = link
    if value := facts.get(b"size"):
        entry.size = decimal(value, "size")
    if value := facts.get(b"uid"):
        entry.uid = decimal(value, "uid")
    if value := facts.get(b"gid"):
        entry.gid = decimal(value, "gid")
    if value := facts.get(b"mtime"):
        entry.mtime_ns = time_ns(value)
    if entry.kind in ("char", "block"):
        major, minor = facts.get(b"SCHILY.devmajor"), facts.get(b"SCHILY.devminor")
        entry.rdev = (
            decimal(major, "device number") if major else entry.rdev[0],
            decimal(minor, "device number") if minor else entry.rdev[1],
        )
    if records.xattrs:
        entry.xattrs = xattrs_of(records)


def _check(entry: TarEntry) -> None:
    if len(entry.path) > MAX_PATH or len(entry.link) > MAX_PATH:
        raise MalformedTar(f"a path or link target of more than {MAX_PATH} bytes")
    if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
        raise MalformedTar(f"the owner {entry.uid}:{entry.gid} is impossible")
    if entry.kind == "file":
        if not 0 <= entry.size <= MAX_SIZE - entry.data:
            raise MalformedTar(f"the size {entry.size} is impossible")
        entry.stored_size = entry.size
        return
    if entry.size < 0:
        raise MalformedTar(f"the size {entry.size} is impossible")
    entry.size = 0
    major, minor = entry.rdev
    if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
        raise MalformedTar(f"the device number {major}:{minor} is impossible")
