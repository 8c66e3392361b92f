"""Files of an image without mounting it: listing directories, reading content.

Paths are those that a process in a container would use (:mod:`veneer.index.paths`).
"""

import stat
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from veneer.errors import UsageError
from veneer.image.image import Image
from veneer.index.model import ImageIndex
from veneer.index.paths import find
from veneer.mount.packed import Packed
from veneer.store.spanstore import SpanStore

__all__ = ["FileEntry", "list_path", "read_file"]

#: A file is read in pieces of this size, with this much asked for ahead.
_PIECE, _AHEAD = 1 << 20, 8 << 20

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name, as ``ls -l`` shows it.

    Args:
        path: from the root of the image, without a slash in front; ``b""`` is the root.
        mode: ``st_mode``.
        target: of a symlink.
        rdev: (major, minor) of a device.
        xattrs: names of the extended attributes.
    """

    path: bytes
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes
    rdev: tuple[int, int]
    xattrs: tuple[bytes, ...]

    @property
    def type(self) -> str:
        """In words."""
        return _TYPES[stat.S_IFMT(self.mode)]


def list_path(index: ImageIndex, path: bytes, what: str, *, recursive: bool = False) -> Iterator[FileEntry]:
    """What is in the directory at ``path``, or the one entry that ``path`` names.

    A symlink at the end is listed itself, unless a slash follows it.
    """
    node = find(index, path, what, follow=path.endswith(b"/"))
    clean = b"/".join(name for name in path.split(b"/") if name not in (b"", b"."))
    if not stat.S_ISDIR(index.mode[node]):
        yield _entry(index, clean, node)
        return
    pending = [(clean, node)]
    while pending:
        directory, node = pending.pop()
        prefix = directory + b"/" if directory else b""
        below = []
        for name, child in index.children.get(node, {}).items():
            yield _entry(index, prefix + name, child)
            if recursive and stat.S_ISDIR(index.mode[child]):
                below.append((prefix + name, child))
        pending += reversed(below)


async def read_file(
    image: Image, store: SpanStore, path: bytes, packed: Packed | None = None
) -> AsyncGenerator[bytes, None]:
    """The content of the regular file at ``path``, in pieces; holes are zeros.

    What ``packed`` has of it is read there.

    Raises:
        NotFound: there is no such file.
        UsageError: it is not a regular file.
        VeneerError: what reading its spans reported.
    """
    index = await image.load()
    node = find(index, path, image.name)
    if not stat.S_ISREG(index.mode[node]):
        kind = _TYPES[stat.S_IFMT(index.mode[node])]
        raise UsageError(f"{image.name}: {path.decode(errors='backslashreplace')} is a {kind}, not a file")
    position = 0
    for extent in index.extents(node):
        for zeros in _zeros(extent.file_offset - position):
            yield zeros
        device, start = image.devices[extent.device], extent.offset
        at = None if packed is None else packed.index.find(device.diff_id, start, extent.length)
        if packed is not None and at is not None:
            attached, start = packed.attached, at
        else:
            attached = store.attach(device, image.sources[extent.device])
        end = start + extent.length
        for offset in range(start, end, _PIECE):
            length = min(_PIECE, end - offset)
            window = (offset, min(end, offset + _AHEAD))
            yield await store.read(attached, offset, length, window=window)
        position = extent.file_offset + extent.length
    for zeros in _zeros(index.size[node] - position):
        yield zeros


def _zeros(length: int) -> Iterator[bytes]:
    while length > 0:
        yield bytes(min(length, _PIECE))
        length -= _PIECE


def _entry(index: ImageIndex, path: bytes, node: int) -> FileEntry:
    target = index.targets.get(node, b"")
    return FileEntry(
        path=path,
        mode=index.mode[node],
        nlink=index.nlink[node],
        uid=index.uid[node],
        gid=index.gid[node],
        size=len(target) or index.size[node],
        mtime_ns=index.mtime_ns[node],
        target=target,
        rdev=index.rdevs.get(node, (0, 0)),
        xattrs=tuple(name for name, _ in index.xattrs.get(node, ())),
    )
