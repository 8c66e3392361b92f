"""Inodes as bytes: one by one from a plan, and in bulk for the files that are most of an image."""

import stat
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, count, pairwise, repeat
from operator import add, ne, sub
from typing import Final

from veneer.erofs.chunks import whole_file_bits
from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    CHUNK_LAYOUT,
    COMPAT,
    FILE_TYPES,
    INCOMPAT,
    INLINE_LAYOUT,
    INODE,
    INODE_SIZE,
    MAGIC,
    MAX_CHUNK_BITS,
    NANOSECONDS,
    SLOT,
    SLOT_SIZE,
    SLOTS_AT,
    SUPERBLOCK,
    DeviceSlot,
    align,
)
from veneer.errors import IntegrityError
from veneer.index.columns import column, exceeds, filled, lanes, picked, plane, repeated, signed_lanes
from veneer.index.model import ImageIndex

__all__ = [
    "FILE_SIZE",
    "PlannedInode",
    "fits_inline",
    "in_bulk",
    "pack_files",
    "pack_inodes",
    "place_inodes",
    "superblock",
]

#: A regular file with data in one chunk and without extended attributes: its inode, its chunk index, and what
#: is left of the last slot.
FILE_SIZE: Final = INODE_SIZE + SLOT
#: The same as words of 32 bits, and which of them hold what; times and sizes have two.
_WORDS: Final = FILE_SIZE // 4
_FORMAT, _MODE, _SIZE, _UNION, _INO, _UID, _GID, _TIME, _FRACTION, _NLINK = 0, 1, 2, 4, 5, 6, 7, 8, 10, 11
_DEVICE, _BLOCKS = 16, 17
#: Where the lower half of a number of 64 bits is.
_LOW: Final = 0 if sys.byteorder == "little" else 1
#: The largest file in one chunk.
_MAX_WHOLE: Final = BLOCK << MAX_CHUNK_BITS
_IS_REGULAR: Final = bytes(0xFF * (kind == FILE_TYPES[stat.S_IFREG]) for kind in range(256))
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
        xattrs: size of its attributes, as it is stated.
        body: what follows it, attributes first; of a directory, only those until the nids are known.
        length: of the body, when it will be there.
        content: what is in blocks of its own; of a directory, as ``body``.
        blocks: the number of those blocks.
    """

    node: int
    layout: int
    size: int
    union: int
    xattrs: int
    body: bytes
    length: int
    content: bytes = b""
    blocks: int = 0


def fits_inline(xattrs: bytes, length: int) -> bool:
    """Whether a body fits in one block with its inode."""
    return INODE_SIZE + len(xattrs) + length <= BLOCK


def place_inodes(items: Iterable[PlannedInode], position: int, nids: list[int]) -> list[int]:
    """Where a region of inodes starts, where each of them begins, where the region ends; notes their nids."""
    places = [position]
    for item in items:
        length = INODE_SIZE + item.length
        # The kernel wants an inline body in one block, and that of a symlink in its inode's block.
        if item.layout == INLINE_LAYOUT and position % BLOCK + length > BLOCK:
            position = align(position, BLOCK)
        places.append(position)
        nids[item.node] = position // SLOT
        position = align(position + length, SLOT)
    return [*places, position]


def pack_inodes(index: ImageIndex, items: Sequence[PlannedInode], places: Sequence[int], ino: int) -> bytes:
    """The region of inodes that are numbered from ``ino``; ``places`` are those of :func:`place_inodes`."""
    nodes = [item.node for item in items]
    times = picked(index.mtime_ns, nodes)
    heads = map(
        INODE.pack,
        [item.layout for item in items],
        [item.xattrs for item in items],
        picked(index.mode, nodes),
        repeat(0),
        [item.size for item in items],
        [item.union for item in items],
        count(ino),
        picked(index.uid, nodes),
        picked(index.gid, nodes),
        [time // NANOSECONDS for time in times],
        [time % NANOSECONDS for time in times],
        picked(index.nlink, nodes),
    )
    rooms = map(sub, places[2:], places[1:])
    inodes = map(bytes.ljust, map(add, heads, [item.body for item in items]), rooms, repeat(b"\0"))
    return b"".join((bytes(places[1] - places[0]), *inodes))


def in_bulk(index: ImageIndex, devices: Sequence[DeviceSlot], types: bytes, special: Iterable[int]) -> bytes:
    """Which nodes are files with data in one chunk: a byte of 0xFF for each of them, 0 for others.

    Args:
        index: the image.
        devices: those of its layers first.
        types: dirent types by node.
        special: nodes that have something which records of such files have no place for.

    Raises IntegrityError if the data of one are outside their device.
    """
    rows = len(types)
    column_of_sizes = index.size[:]
    for node in special:
        column_of_sizes[node] = 0
    if max(column_of_sizes) > _MAX_WHOLE:
        column_of_sizes = array("q", [size if size <= _MAX_WHOLE else 0 for size in column_of_sizes])
    sizes, places = lanes(column_of_sizes), lanes(index.data)
    chosen = filled(sizes, rows) & ~filled(places & repeated(BLOCK - 1, rows), rows)
    limits = _device_sizes(index, devices, rows)
    if exceeds(places & chosen, limits, rows) or exceeds((places & chosen) + (sizes & chosen), limits, rows):
        raise IntegrityError("the data of a file lie outside its device")
    flags = int.from_bytes(plane(column(chosen, rows), 0)) & int.from_bytes(types.translate(_IS_REGULAR))
    return flags.to_bytes(rows)


def _device_sizes(index: ImageIndex, devices: Sequence[DeviceSlot], rows: int) -> int:
    """For each node the size of its layer's device, as lanes."""
    ends = (*index.bases[1:], rows)
    parts = [
        array("q", [device.size]) * (end - base)
        for base, end, device in zip(index.bases, ends, devices, strict=False)
    ]
    return lanes(array("q", b"".join(parts)))


def pack_files(index: ImageIndex, nodes: Sequence[int], ino: int) -> bytes:
    """The records of files in one chunk, numbered from ``ino``.

    Columns of the index become columns of records for all nodes there are, hidden ones too, and then those of
    ``nodes`` are taken, which mostly follow each other: next to no Python a file.
    """
    records = memoryview(_records(index)).cast("B")
    runs = _runs(nodes)
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
    rows = len(index.mode)
    records = array("I", [0]) * (_WORDS * rows)
    sizes = _halves(index.size)
    seconds = array("q", [time // NANOSECONDS for time in index.mtime_ns])
    times = _halves(seconds)
    ends = (*index.bases[1:], rows)
    records[_FORMAT::_WORDS] = array("I", [CHUNK_LAYOUT]) * rows
    records[_MODE::_WORDS] = _low(index.mode)
    records[_SIZE::_WORDS], records[_SIZE + 1 :: _WORDS] = sizes[_LOW::2], sizes[1 - _LOW :: 2]
    records[_UNION::_WORDS] = array("I", [_FORMATS[(size - 1).bit_length()] for size in index.size])
    records[_UID::_WORDS] = _low(index.uid)
    records[_GID::_WORDS] = _low(index.gid)
    records[_TIME::_WORDS], records[_TIME + 1 :: _WORDS] = times[_LOW::2], times[1 - _LOW :: 2]
    records[_FRACTION::_WORDS] = _low(
        column(signed_lanes(index.mtime_ns) - signed_lanes(seconds) * NANOSECONDS, rows)
    )
    records[_NLINK::_WORDS] = _low(index.nlink)
    for number, (base, end) in enumerate(zip(index.bases, ends, strict=True), 1):
        # The upper half of a word, and devices of chunk indexes are numbered from 1.
        records[_DEVICE + _WORDS * base : _WORDS * end : _WORDS] = array("I", [number << 16]) * (end - base)
    # Bits of other lanes get into upper halves only.
    records[_BLOCKS::_WORDS] = _low(column(lanes(index.data) >> BLOCK_BITS, rows))
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
