"""Where a file's bytes are, as EROFS can say it: chunks of one size, each a hole or whole blocks of one device.

A file of one extent needs none of this (the writer makes its one chunk in bulk). What comes here is sparse, or
lies on several devices, or is not aligned to blocks on its device, which is what tars make of odd sparse files.
Chunks that cannot be mapped to where their data are get blocks of an extra device, the *tail*, and a list of
:class:`Copy` says what it has to hold. The tail is as sparse as the files are: only copies need space.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    ENTRY,
    HOLE,
    MAX_BLOCKS,
    MAX_CHUNK_BITS,
    DeviceSlot,
)
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import Extent

__all__ = ["MAX_CHUNKS", "MAX_IMAGE_CHUNKS", "ChunkMapper", "Copy", "whole_file_bits"]

#: Chunks of one file: 2 MiB of metadata, a file of 1 GiB in chunks of 4 KiB. Larger chunks than the holes
#: of a file ask for cost copies, never wrong data.
MAX_CHUNKS: Final = 1 << 18
#: Chunks of all files that need more than one: 64 MiB of metadata, and about two seconds.
MAX_IMAGE_CHUNKS: Final = 1 << 23
#: Chunks of files that cannot be mapped as they are have at least a page: smaller ones only cost requests.
_PAGE_BITS: Final = 3


class Copy(NamedTuple):
    """``length`` bytes at ``offset`` of the tail device are those at ``source`` of device ``device``.

    They are the bytes of the file ``node`` from ``file_offset``. What no copy covers of the tail is zeros.
    Copies are in the order of ``offset`` and do not overlap.
    """

    offset: int
    length: int
    device: int
    source: int
    node: int
    file_offset: int


def whole_file_bits(size: int) -> int:
    """The smallest chunk (as log2 of blocks) that holds a file of ``size`` bytes, if one can."""
    return min(max(0, (size - 1).bit_length() - BLOCK_BITS), MAX_CHUNK_BITS)


class ChunkMapper:
    """Maps one file after the other, and gives out the blocks of the tail device.

    Args:
        devices: all devices that extents may name.

    Attributes:
        copies: what the tail holds so far.
        tail_blocks: how many blocks it has so far.
    """

    def __init__(self, devices: Sequence[DeviceSlot]) -> None:
        self.copies: list[Copy] = []
        self.tail_blocks = 0
        self._devices = devices
        self._chunks = 0

    def map(self, node: int, size: int, extents: Sequence[Extent]) -> tuple[int, bytes]:
        """The chunk format and the chunk indexes of a file that is not empty.

        Raises IntegrityError for extents that are out of order, of the file or of their device, and
        UnsupportedFormat for files that need more chunks than an image may have.
        """
        joined = _joined(extents)
        self._check(node, size, joined)
        bits = _chunk_bits(size, joined)
        count = _count(size, bits)
        if count > MAX_CHUNKS or self._chunks + count > MAX_IMAGE_CHUNKS:
            raise UnsupportedFormat(
                f"file of node {node}: {size} bytes with {len(joined)} pieces need too many chunks for EROFS",
                hint="mount the image with --backend fuse",
            )
        self._chunks += count
        return CHUNK_INDEXES | bits, self._entries(node, size, joined, bits)

    def _check(self, node: int, size: int, extents: Sequence[Extent]) -> None:
        end = 0
        for extent in extents:
            if not (
                end <= extent.file_offset
                and extent.length > 0
                and 0 <= extent.device < len(self._devices)
                and 0 <= extent.offset <= self._devices[extent.device].size - extent.length
            ):
                raise IntegrityError(f"file of node {node}: {extent} is out of order or outside its device")
            end = extent.file_offset + extent.length
        if end > size:
            raise IntegrityError(f"file of node {node}: its data end at {end}, after its end at {size}")

    def _entries(self, node: int, size: int, extents: Sequence[Extent], bits: int) -> bytes:
        shift = bits + BLOCK_BITS
        count = _count(size, bits)
        entries = bytearray(HOLE * count)
        moved: dict[int, int] = {}  # chunk -> its first block of the tail
        for extent in extents:
            start, end = extent.file_offset, extent.file_offset + extent.length
            # Whole chunks of the extent; the file's last one may be short.
            low, high = -(-start >> shift), count if end == size else end >> shift
            if low >= high or (extent.offset - start) % BLOCK:
                self._copy(node, extent, start, end, shift, entries, moved)
                continue
            first_block = (extent.offset + (low << shift) - start) >> BLOCK_BITS
            blocks = range(first_block, first_block + (high - low << bits), 1 << bits)
            entries[ENTRY.size * low : ENTRY.size * high] = _in_a_row(extent.device + 1, blocks)
            self._copy(node, extent, start, min(low << shift, end), shift, entries, moved)
            self._copy(node, extent, high << shift, end, shift, entries, moved)
        return bytes(entries)

    def _copy(
        self,
        node: int,
        extent: Extent,
        start: int,
        end: int,
        shift: int,
        entries: bytearray,
        moved: dict[int, int],
    ) -> None:
        """Move the file's bytes from ``start`` to ``end``, which are in ``extent``, to the tail device."""
        while start < end:
            chunk = start >> shift
            stop = min(end, chunk + 1 << shift)
            if chunk not in moved:
                moved[chunk] = self.tail_blocks
                ENTRY.pack_into(entries, ENTRY.size * chunk, 0, len(self._devices) + 1, self.tail_blocks)
                self.tail_blocks += 1 << shift - BLOCK_BITS
                if self.tail_blocks > MAX_BLOCKS:
                    raise UnsupportedFormat(
                        "unaligned files need more than 2 TiB", hint="mount the image with --backend fuse"
                    )
            offset = (moved[chunk] << BLOCK_BITS) + start - (chunk << shift)
            source = extent.offset + start - extent.file_offset
            copy = Copy(offset, stop - start, extent.device, source, node, start)
            if self.copies and (before := _follows(self.copies[-1], copy)):
                self.copies[-1] = before
            else:
                self.copies.append(copy)
            start = stop


def _follows(one: Copy, other: Copy) -> Copy | None:
    """Both as one, if they are one piece on both devices and in the file."""
    length = one.length
    if (one.offset + length, one.device, one.source + length, one.node, one.file_offset + length) == (
        other.offset,
        other.device,
        other.source,
        other.node,
        other.file_offset,
    ):
        return one._replace(length=length + other.length)
    return None


def _joined(extents: Sequence[Extent]) -> list[Extent]:
    """The extents with those that continue each other made one."""
    joined: list[Extent] = []
    for extent in extents:
        if joined:
            last = joined[-1]
            if (last.file_offset + last.length, last.device, last.offset + last.length) == extent[:3]:
                joined[-1] = last._replace(length=last.length + extent.length)
                continue
        joined.append(extent)
    return joined


def _in_a_row(device: int, blocks: range) -> bytes:
    """Chunk indexes of one device: the device in the upper half of a word, and a block in the next one."""
    words = array("I", [device << 16]) * (2 * len(blocks))
    words[1::2] = array("I", blocks)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _count(size: int, bits: int) -> int:
    return (size - 1 >> bits + BLOCK_BITS) + 1


def _chunk_bits(size: int, extents: Sequence[Extent]) -> int:
    """The largest chunks that need no copies; if there are none, or too many, few enough with copies."""
    whole = whole_file_bits(size)
    cuts = 0
    aligned = True
    for extent in extents:
        end = extent.file_offset + extent.length
        cuts |= extent.file_offset | (end if end != size else 0)
        aligned = aligned and (extent.offset - extent.file_offset) % BLOCK == 0
    if aligned and cuts % BLOCK == 0:
        bits = whole if cuts == 0 else min(whole, (cuts & -cuts).bit_length() - 1 - BLOCK_BITS)
        if _count(size, bits) <= MAX_CHUNKS:
            return bits
    return min(whole, max(_PAGE_BITS, (size - 1).bit_length() - BLOCK_BITS - (MAX_CHUNKS.bit_length() - 1)))
