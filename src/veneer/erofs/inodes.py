"""Inodes as bytes: one by one from a plan, and in bulk for the files that are most of an image."""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import add, gt
from typing import Final

from veneer.erofs.chunks import whole_file_bits
from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    CHUNK_LAYOUT,
    COMPAT,
    ENTRY,
    INCOMPAT,
    INODE,
    INODE_SIZE,
    MAGIC,
    NANOSECONDS,
    NO_BLOCK,
    SLOT,
    SLOT_SIZE,
    SLOTS_AT,
    SUPERBLOCK,
    DeviceSlot,
    align,
)
from veneer.erofs.xattrs import xattr_count
from veneer.errors import IntegrityError
from veneer.index.model import ImageIndex

__all__ = ["FILE_SIZE", "PlannedInode", "fits_inline", "pack_files", "pack_inodes", "superblock"]

#: A regular file with data in one chunk and without extended attributes: its inode, its chunk index, and what
#: is left of the last slot.
_FILE: Final = struct.Struct("<H2xH2xQIIIIqII16x2xHI24x")
#: Chunk format of a file in one chunk, by the number of bits of its size less one.
_FORMATS: Final = [CHUNK_INDEXES | whole_file_bits(1 << bits) for bits in range(64)]
FILE_SIZE: Final = _FILE.size


@dataclass(slots=True)
class PlannedInode:
    """One inode that is not made in bulk.

    Args:
        node: what it is of.
        layout: where its data are.
        size: of its data.
        union: device number, chunk format, or the first of its own blocks.
        xattrs: what follows it.
        body: what follows that; of a directory, empty until the nids are known.
        body_length: of the body, when it will be there.
        content: what is in blocks of its own; of a directory, as ``body``.
        blocks: the number of those blocks.
    """

    node: int
    layout: int
    size: int
    union: int = NO_BLOCK
    xattrs: bytes = b""
    body: bytes = b""
    body_length: int = 0
    content: bytes = b""
    blocks: int = 0

    @property
    def body_at(self) -> int:
        """Offset of the body from the inode."""
        end = INODE_SIZE + len(self.xattrs)
        return align(end, ENTRY.size) if self.layout == CHUNK_LAYOUT else end


def fits_inline(xattrs: bytes, length: int) -> bool:
    """Whether a body fits in one block with its inode."""
    return INODE_SIZE + len(xattrs) + length <= BLOCK


def pack_inodes(
    image: bytearray, index: ImageIndex, nids: Sequence[int], items: Iterable[PlannedInode], ino: int
) -> None:
    """Put inodes that are numbered from ``ino``, and their data, where ``nids`` and their unions say."""
    for number, item in enumerate(items, ino):
        node = item.node
        at = nids[node] * SLOT
        seconds, nanoseconds = divmod(index.mtime_ns[node], NANOSECONDS)
        INODE.pack_into(
            image,
            at,
            item.layout,
            xattr_count(item.xattrs),
            index.mode[node],
            0,
            item.size,
            item.union,
            number,
            index.uid[node],
            index.gid[node],
            seconds,
            nanoseconds,
            index.nlink[node],
        )
        if item.xattrs:
            image[at + INODE_SIZE : at + INODE_SIZE + len(item.xattrs)] = item.xattrs
        if item.body:
            start = at + item.body_at
            image[start : start + item.body_length] = item.body
        if item.content:
            start = item.union << BLOCK_BITS
            image[start : start + len(item.content)] = item.content


def pack_files(index: ImageIndex, devices: Sequence[DeviceSlot], nodes: Sequence[int], ino: int) -> bytes:
    """The records of files in one chunk, numbered from ``ino``: column by column, with no Python a file."""
    sizes = list(map(index.size.__getitem__, nodes))
    places = list(map(index.data.__getitem__, nodes))
    times = list(map(index.mtime_ns.__getitem__, nodes))
    device_ids = list(map(partial(bisect_right, index.bases), nodes))  # numbers of chunk indexes begin with 1
    limits = [0, *(slot.size for slot in devices)]
    if any(map(gt, map(add, places, sizes), map(limits.__getitem__, device_ids))):
        raise IntegrityError("the data of a file lie outside its device")
    return b"".join(
        map(
            _FILE.pack,
            repeat(CHUNK_LAYOUT),
            map(index.mode.__getitem__, nodes),
            sizes,
            [_FORMATS[(size - 1).bit_length()] for size in sizes],
            range(ino, ino + len(nodes)),
            map(index.uid.__getitem__, nodes),
            map(index.gid.__getitem__, nodes),
            [time // NANOSECONDS for time in times],
            [time % NANOSECONDS for time in times],
            map(index.nlink.__getitem__, nodes),
            device_ids,
            [place >> BLOCK_BITS for place in places],
        )
    )


def superblock(root: int, inodes: int, blocks: int, devices: int) -> bytes:
    """The superblock, not yet sealed; ``root`` is a nid."""
    return SUPERBLOCK.pack(
        MAGIC,
        0,
        COMPAT,
        BLOCK_BITS,
        0,
        root,
        inodes,
        0,
        0,
        blocks,
        0,
        0,
        bytes(16),
        bytes(16),
        INCOMPAT,
        0,
        devices,
        SLOTS_AT // SLOT_SIZE,
        bytes(38),
    )
