"""What a tree of files looks like to its users, as comparable facts: of a directory, or of an image's index.

Non-goals: times of access and change, inode numbers, block counts, sizes of directories. An image has none.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from veneer.index.model import ImageIndex

__all__ = ["Fact", "content_digest", "difference", "facts_of", "node_at", "scan"]

#: Content is compared in blocks of this size; those of nothing but zeros are the same as a hole.
_BLOCK: Final = 1 << 16
_ZEROS: Final = bytes(_BLOCK)
#: Labels that the host gives to any file.
_HOST_XATTRS: Final = frozenset({"security.selinux"})
#: As many differences as anybody reads.
_MAX_DIFFERENCES: Final = 50


@dataclass(frozen=True, slots=True)
class Fact:
    """One name.

    Args:
        kind: type bits of ``st_mode``.
        mode: the other bits.
        uid: owner.
        gid: group.
        mtime_ns: modification time.
        size: of a regular file or a symlink's target; 0 for others.
        nlink: names of the inode; 0 for directories, where file systems count differently.
        group: the first path (sorted) of the names that share the inode.
        rdev: (major, minor) of a device, (0, 0) of others.
        xattrs: sorted.
        target: of a symlink.
        content: :func:`content_digest` of a regular file, "" of others.
    """

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    nlink: int
    group: bytes
    rdev: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    target: bytes
    content: str


def content_digest(size: int, pieces: Iterable[tuple[int, bytes]]) -> str:
    """Digest of a file's content, the same however it is cut and wherever zeros are holes.

    ``pieces`` are (offset, bytes), ascending; the rest is zeros.
    """
    digest = hashlib.sha256(size.to_bytes(8, "big"))
    number, block = 0, bytearray(_BLOCK)
    for offset, data in pieces:
        view = memoryview(data)
        while view:
            wanted, start = divmod(offset, _BLOCK)
            if wanted != number:
                if block != _ZEROS:
                    digest.update(number.to_bytes(8, "big") + block)
                number, block = wanted, bytearray(_BLOCK)
            taken = min(len(view), _BLOCK - start)
            block[start : start + taken] = view[:taken]
            offset, view = offset + taken, view[taken:]
    if block != _ZEROS:
        digest.update(number.to_bytes(8, "big") + block)
    return digest.hexdigest()


def scan(path: Path) -> dict[bytes, Fact]:
    """Facts of everything below ``path``, and of itself (``b""``), by path relative to it."""
    found: dict[bytes, tuple[bytes, os.stat_result]] = {}
    groups: dict[tuple[int, int], bytes] = {}
    base = os.fsencode(path)
    pending = [b""]
    while pending:
        relative = pending.pop()
        full = base + b"/" + relative if relative else base
        status = os.lstat(full)
        found[relative] = full, status
        inode = status.st_dev, status.st_ino
        groups[inode] = min(relative, groups.get(inode, relative))
        if stat.S_ISDIR(status.st_mode):
            pending += [relative + b"/" + name if relative else name for name in os.listdir(full)]
    return {
        relative: _fact_of(full, status, groups[status.st_dev, status.st_ino])
        for relative, (full, status) in sorted(found.items())
    }


def _fact_of(path: bytes, status: os.stat_result, group: bytes) -> Fact:
    kind = stat.S_IFMT(status.st_mode)
    sized = kind in (stat.S_IFREG, stat.S_IFLNK)
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    names = set(os.listxattr(path, follow_symlinks=False)) - _HOST_XATTRS
    return Fact(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if sized else 0,
        nlink=0 if kind == stat.S_IFDIR else status.st_nlink,
        group=group,
        rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0),
        xattrs=tuple(sorted((os.fsencode(n), os.getxattr(path, n, follow_symlinks=False)) for n in names)),
        target=os.readlink(path) if kind == stat.S_IFLNK else b"",
        content=content_digest(status.st_size, _data_of(path)) if kind == stat.S_IFREG else "",
    )


def _data_of(path: bytes) -> Iterator[tuple[int, bytes]]:
    """What a file has that is not known to be a hole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while True:
            try:
                offset = os.lseek(descriptor, offset, os.SEEK_DATA)
            except OSError:  # no data after this offset
                return
            end = os.lseek(descriptor, offset, os.SEEK_HOLE)
            while offset < end:
                data = os.pread(descriptor, min(_BLOCK, end - offset), offset)
                if not data:
                    return
                yield offset, data
                offset += len(data)
    finally:
        os.close(descriptor)


def node_at(index: ImageIndex, path: bytes) -> int | None:
    """The node of a name, if there is one; symlinks are not followed."""
    return next((node for found, node in index.walk() if found == path), None)


def facts_of(index: ImageIndex, devices: Sequence[bytes]) -> dict[bytes, Fact]:
    """Facts that a mount of the image must show; ``devices`` are the bytes of each."""
    paths = list(index.walk())
    groups: dict[int, bytes] = {}
    for path, node in paths:
        groups[node] = min(path, groups.get(node, path))
    return {path: _fact_at(index, node, groups[node], devices) for path, node in sorted(paths)}


def _fact_at(index: ImageIndex, node: int, group: bytes, devices: Sequence[bytes]) -> Fact:
    mode = index.mode[node]
    target = index.targets.get(node, b"")
    content = ""
    if stat.S_ISREG(mode):
        pieces = [
            (e.file_offset, devices[e.device][e.offset : e.offset + e.length]) for e in index.extents(node)
        ]
        content = content_digest(index.size[node], pieces)
    return Fact(
        kind=stat.S_IFMT(mode),
        mode=stat.S_IMODE(mode),
        uid=index.uid[node],
        gid=index.gid[node],
        mtime_ns=index.mtime_ns[node],
        size=len(target) if stat.S_ISLNK(mode) else index.size[node],
        nlink=0 if stat.S_ISDIR(mode) else index.nlink[node],
        group=group,
        rdev=index.rdevs.get(node, (0, 0)),
        xattrs=index.xattrs.get(node, ()),
        target=target,
        content=content,
    )


def difference(expected: Mapping[bytes, Fact], actual: Mapping[bytes, Fact]) -> list[str]:
    """What is different, a line each; empty when nothing is."""
    lines = []
    for path in sorted(expected.keys() | actual.keys()):
        shown = "/" + path.decode("utf-8", "backslashreplace")
        if path not in actual:
            lines.append(f"{shown}: missing")
        elif path not in expected:
            lines.append(f"{shown}: should not be there")
        elif expected[path] != actual[path]:
            for field in fields(Fact):
                wanted, got = getattr(expected[path], field.name), getattr(actual[path], field.name)
                if wanted != got:
                    form = "o" if field.name in ("kind", "mode") else ""
                    lines.append(f"{shown}: {field.name} is {_shown(got, form)}, not {_shown(wanted, form)}")
    return (
        [*lines[:_MAX_DIFFERENCES], f"... and {len(lines) - _MAX_DIFFERENCES} more"]
        if (len(lines) > _MAX_DIFFERENCES)
        else lines
    )


def _shown(value: object, form: str) -> str:
    return format(value, form) if form else repr(value)
