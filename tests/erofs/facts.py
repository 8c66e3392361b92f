"""What an image says, as the facts that the test kit compares."""

import stat
from collections.abc import Sequence

from tests.erofs.mounts import tail_bytes
from veneer.erofs.writer import ErofsImage
from veneer.index.model import Extent
from veneer.testing.erofs_reader import ErofsInode, read_erofs
from veneer.testing.trees import Fact, content_digest


def facts_in(image: ErofsImage, devices: Sequence[bytes]) -> dict[bytes, Fact]:
    """The facts of an image; ``devices`` are the bytes of all but the tail."""
    tree = read_erofs(image.data)
    paths = list(tree.walk())
    groups: dict[int, bytes] = {}
    for path, nid in paths:
        groups[nid] = min(path, groups.get(nid, path))
    tail = list(tail_bytes(image, devices))

    def pieces(extent: Extent) -> list[tuple[int, bytes]]:
        if extent.device != image.tail:
            return [(extent.file_offset, devices[extent.device][extent.offset : extent.offset + extent.length])]
        found = []
        for offset, data in tail:
            low, high = max(offset, extent.offset), min(offset + len(data), extent.offset + extent.length)
            if low < high:
                found.append((extent.file_offset + low - extent.offset, data[low - offset : high - offset]))
        return found

    def fact(inode: ErofsInode, group: bytes) -> Fact:
        content = ""
        if stat.S_ISREG(inode.mode):
            content = content_digest(inode.size, (piece for e in inode.extents for piece in pieces(e)))
        directory = stat.S_ISDIR(inode.mode)
        return Fact(
            kind=stat.S_IFMT(inode.mode),
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            mtime_ns=inode.mtime_ns,
            size=0 if directory else inode.size,
            nlink=0 if directory else inode.nlink,
            group=group,
            rdev=inode.rdev,
            xattrs=inode.xattrs,
            target=inode.target,
            content=content,
        )

    return {path: fact(tree.inodes[nid], groups[nid]) for path, nid in sorted(paths)}
