"""Parsers of the parts of an image, for the strict reader: each says what is in its bytes, or refuses them."""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

from veneer.erofs.chunks import MAX_CHUNKS, whole_file_bits
from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    CHUNK_LAYOUT,
    DIRENT_SIZE,
    ENTRY,
    FILE_TYPES,
    INLINE_LAYOUT,
    INODE,
    INODE_SIZE,
    MAX_CHUNK_BITS,
    NAME_MAX,
    NANOSECONDS,
    NO_BLOCK,
    PLAIN_LAYOUT,
    SLOT,
    DeviceSlot,
)
from veneer.erofs.xattrs import ACCESS_ACL, DEFAULT_ACL, PREFIXES, XATTR_ENTRY, XATTR_HEADER
from veneer.errors import IntegrityError
from veneer.index.model import Extent, Xattrs

__all__ = ["Entry", "Header", "parse_chunks", "parse_directory", "parse_inode", "parse_xattrs"]

_TYPES: Final = frozenset(FILE_TYPES.values())
_MAX_SIZE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Header:
    """An inode's 64 bytes.

    Args:
        nid: its number.
        at: its offset.
        end: offset of what follows it and its extended attributes.
        layout: plain, inline or chunks.
        mode: with type bits, of a type that exists.
        size: of its data.
        union: start block, device number or chunk format.
        ino: its place among all inodes, from 1.
        uid: owner.
        gid: group.
        mtime_ns: modification time.
        nlink: number of links.
    """

    nid: int
    at: int
    end: int
    layout: int
    mode: int
    size: int
    union: int
    ino: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int

    @property
    def no_block(self) -> bool:
        """Whether it states that it has no blocks."""
        return self.union == NO_BLOCK


class Entry(NamedTuple):
    """What a name leads to."""

    nid: int
    type: int


def parse_inode(image: bytes, nid: int) -> Header:
    """The inode ``nid``, which must lie in the image."""
    at = nid * SLOT
    raw = image[at : at + INODE_SIZE]
    fields = INODE.unpack(raw)
    layout, xattrs, mode, reserved, size, union, ino, uid, gid, seconds, nanoseconds, nlink = fields
    what = f"inode {nid}"
    if INODE.pack(*fields) != raw or reserved:
        _refuse(what, "reserved bytes are in use")
    if layout not in (PLAIN_LAYOUT, INLINE_LAYOUT, CHUNK_LAYOUT):
        _refuse(what, f"format {layout}")
    if stat.S_IFMT(mode) not in FILE_TYPES:
        _refuse(what, f"mode {mode:o}")
    mtime_ns = seconds * NANOSECONDS + nanoseconds
    if nanoseconds >= NANOSECONDS or not -_MAX_SIZE - 1 <= mtime_ns <= _MAX_SIZE:
        _refuse(what, "its time is out of range")
    if size > _MAX_SIZE:
        _refuse(what, f"{size} bytes")
    end = at + INODE_SIZE + (XATTR_HEADER.size + 4 * (xattrs - 1) if xattrs else 0)
    return Header(nid, at, end, layout, mode, size, union, ino, uid, gid, mtime_ns, nlink)


def parse_directory(content: bytes, what: str) -> Iterator[tuple[bytes, Entry]]:
    """Every name of a directory, ``.`` and ``..`` too, in order."""
    previous = b""
    room = 0  # left in the block before
    seen = 0
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        last = start + BLOCK >= len(content)
        for name, entry in _parse_block(block, last, what):
            if name <= previous:
                _refuse(what, "its names are out of order")
            if previous and room and DIRENT_SIZE + len(name) <= room:
                _refuse(what, "its blocks are not full")
            room = 0
            previous = name
            seen += name in (b".", b"..")
            yield name, entry
        room = BLOCK - len(block.rstrip(b"\0")) if not last else 0
    if seen != 2:
        _refuse(what, "it has no . or no ..")


def _parse_block(block: bytes, last: bool, what: str) -> list[tuple[bytes, Entry]]:
    first = int.from_bytes(block[8:10], "little")
    if not DIRENT_SIZE <= first < len(block) or first % DIRENT_SIZE:
        _refuse(what, "a block has no entries")
    table = [
        (
            int.from_bytes(block[at : at + 8], "little"),
            int.from_bytes(block[at + 8 : at + 10], "little"),
            block[at + 10],
            block[at + 11],
        )
        for at in range(0, first, DIRENT_SIZE)
    ]
    starts = [start for _, start, _, _ in table]
    end = len(block) if last else len(block.rstrip(b"\0"))
    found = []
    for (nid, start, kind, reserved), stop in zip(table, [*starts[1:], end], strict=True):
        name = block[start:stop]
        if not (0 < stop - start <= NAME_MAX and stop <= end) or b"/" in name or b"\0" in name:
            _refuse(what, f"the name {name[: NAME_MAX + 1]!r}")
        if kind not in _TYPES or reserved:
            _refuse(what, f"{name!r} is of type {kind}")
        found.append((name, Entry(nid, kind)))
    return found


def parse_chunks(
    image: bytes, start: int, size: int, chunk_format: int, devices: Sequence[DeviceSlot], what: str
) -> tuple[tuple[Extent, ...], int]:
    """Extents of a file whose chunk indexes start at ``start``, and the number of bytes that those take."""
    bits = chunk_format & ~CHUNK_INDEXES
    if not chunk_format & CHUNK_INDEXES or bits > min(MAX_CHUNK_BITS, whole_file_bits(size)):
        _refuse(what, f"chunk format {chunk_format}")
    shift = bits + BLOCK_BITS
    count = (size - 1 >> shift) + 1
    if count > MAX_CHUNKS or start + count * ENTRY.size > len(image):
        _refuse(what, f"{count} chunks")
    extents: list[Extent] = []
    for chunk, (high, device, block) in enumerate(ENTRY.iter_unpack(image[start : start + count * ENTRY.size])):
        if block == NO_BLOCK:
            if high or device:
                _refuse(what, f"chunk {chunk} is a hole of a device")
            continue
        offset = chunk << shift
        length = min(1 << shift, size - offset)
        if high or not 0 < device <= len(devices) or (block << BLOCK_BITS) + length > devices[device - 1].size:
            _refuse(what, f"chunk {chunk} is outside its device")
        extent = Extent(offset, device - 1, block << BLOCK_BITS, length)
        last = extents[-1] if extents else Extent(-1, -1, 0, 0)
        if (last.file_offset + last.length, last.device, last.offset + last.length) == extent[:3]:
            extents[-1] = last._replace(length=last.length + length)
        else:
            extents.append(extent)
    return tuple(extents), count * ENTRY.size


def parse_xattrs(raw: bytes, what: str) -> Xattrs:
    """Extended attributes from what follows an inode."""
    if raw[: XATTR_HEADER.size] != XATTR_HEADER.pack(0, 0) or len(raw) == XATTR_HEADER.size:
        _refuse(what, "the header of its extended attributes")
    found: list[tuple[bytes, bytes]] = []
    position = XATTR_HEADER.size
    while position < len(raw):
        length, prefix, size = XATTR_ENTRY.unpack_from(raw, position)
        position += XATTR_ENTRY.size
        end = position + length + size
        name = PREFIXES.get(prefix, b"") + raw[position : position + length]
        padding = raw[end : end + -end % 4]
        if end > len(raw) or any(padding) or prefix not in PREFIXES or b"\0" in name:
            _refuse(what, f"the extended attribute {name!r}")
        if (length == 0) != (PREFIXES[prefix] in (ACCESS_ACL, DEFAULT_ACL)):
            _refuse(what, f"the extended attribute {name!r}")
        if found and name <= found[-1][0]:
            _refuse(what, "its extended attributes are out of order")
        found.append((name, raw[position + length : end]))
        position = end + len(padding)
    return tuple(found)


def _refuse(what: str, why: str) -> NoReturn:
    raise IntegrityError(f"EROFS image: {what}: {why}")
