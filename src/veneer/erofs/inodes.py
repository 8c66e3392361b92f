"""Inodes as bytes: one by one from a plan, and in bulk for the files that are most of an image."""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from operator import add, ne, sub
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
FILE_SIZE: Final = INODE_SIZE + SLOT
#: The same as words of 32 bits, and which of them hold what; times and sizes have two.
_WORDS: Final = FILE_SIZE // 4
_FORMAT, _MODE, _SIZE, _UNION, _INO, _UID, _GID, _TIME, _FRACTION, _NLINK = 0, 1, 2, 4, 5, 6, 7, 8, 10, 11
_DEVICE, _BLOCKS = 16, 17
#: Where the lower half of a number of 64 bits is.
_LOW: Final = 0 if sys.byteorder == "little" else 1
#: Chunk format of a file in one chunk, by the number of bits of its size less one.
_FORMATS: Final = [CHUNK_INDEXES | whole_file_bits(1 << bits) for bits in range(64)]


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
    """The records of files in one chunk, numbered from ``ino``.

    Columns of the index become columns of records for all nodes there are, hidden ones too, and then those of
    ``nodes`` are taken, which mostly follow each other: next to no Python a file.
    """
    runs = _runs(nodes)
    for first, end in runs:
        limit = devices[index.device_of(first)].size
        if max(map(add, index.data[first:end], index.size[first:end])) > limit:
            raise IntegrityError("the data of a file lie outside its device")
    records = memoryview(_records(index)).cast("B")
    chosen = array("I", b"".join([records[FILE_SIZE * first : FILE_SIZE * end] for first, end in runs]))
    chosen[_INO::_WORDS] = array("I", range(ino, ino + len(nodes)))
    if sys.byteorder == "big":
        chosen.byteswap()
    return chosen.tobytes()


def _runs(nodes: Sequence[int]) -> list[tuple[int, int]]:
    """The nodes as ranges (first, end). None reaches into another layer, as those begin with a directory."""
    if not nodes:
        return []
    shifts = list(map(sub, nodes, range(len(nodes))))
    cuts = [0, *compress(range(1, len(nodes)), map(ne, shifts, shifts[1:])), len(nodes)]
    return [(nodes[first], nodes[end - 1] + 1) for first, end in pairwise(cuts)]


def _records(index: ImageIndex) -> "array[int]":
    """A record for each node as words in the machine's byte order, without inode numbers."""
    count = len(index.mode)
    records = array("I", [0]) * (_WORDS * count)
    sizes = _halves(index.size)
    times = _halves(array("q", [time // NANOSECONDS for time in index.mtime_ns]))
    ends = (*index.bases[1:], count)
    records[_FORMAT::_WORDS] = array("I", [CHUNK_LAYOUT]) * count
    records[_MODE::_WORDS] = _low(index.mode)
    records[_SIZE::_WORDS], records[_SIZE + 1 :: _WORDS] = sizes[_LOW::2], sizes[1 - _LOW :: 2]
    records[_UNION::_WORDS] = array("I", [_FORMATS[(size - 1).bit_length()] for size in index.size])
    records[_UID::_WORDS] = _low(index.uid)
    records[_GID::_WORDS] = _low(index.gid)
    records[_TIME::_WORDS], records[_TIME + 1 :: _WORDS] = times[_LOW::2], times[1 - _LOW :: 2]
    records[_FRACTION::_WORDS] = array("I", [time % NANOSECONDS for time in index.mtime_ns])
    records[_NLINK::_WORDS] = _low(index.nlink)
    for number, (base, end) in enumerate(zip(index.bases, ends, strict=True), 1):
        # The upper half of a word, and devices of chunk indexes are numbered from 1.
        records[_DEVICE + _WORDS * base : _WORDS * end : _WORDS] = array("I", [number << 16]) * (end - base)
    records[_BLOCKS::_WORDS] = _low(array("q", [place >> BLOCK_BITS for place in index.data]))
    return records


def _halves(column: "array[int]") -> "array[int]":
    return array("I", column.tobytes())


def _low(column: "array[int]") -> "array[int]":
    """The lower 32 bits of each number."""
    return _halves(column)[_LOW::2]


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
