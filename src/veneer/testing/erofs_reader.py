"""A strict reader of the writer's own images, for checks: it accepts what the writer writes, and nothing else.

Every byte is accounted for: inodes follow each other by the writer's rule, blocks follow them without gaps,
what is between is zeros, and the UUID is that of the content. So nothing is read twice, and an image of n bytes
costs time and memory in proportion to n. Anything that is not as it must be is an IntegrityError.

It shares the structures with the writer but none of its code. It is not a reader of EROFS at large.
"""

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_LAYOUT,
    COMPAT,
    DEVICE_SLOT,
    FILE_TYPES,
    HEAD_SIZE,
    INCOMPAT,
    INLINE_LAYOUT,
    INODE_SIZE,
    MAGIC,
    MAX_BLOCKS,
    MAX_DEVICES,
    PATH_MAX,
    PLAIN_LAYOUT,
    SLOT,
    SLOT_SIZE,
    SLOTS_AT,
    SUPERBLOCK,
    SUPERBLOCK_AT,
    TAG_SIZE,
    DeviceSlot,
    align,
    decode_rdev,
    seal,
    unsealed,
)
from veneer.errors import IntegrityError
from veneer.index.model import Extent, Xattrs
from veneer.testing.erofs_reader_parts import (
    Entry,
    Header,
    parse_chunks,
    parse_directory,
    parse_inode,
    parse_xattrs,
)

__all__ = ["ErofsInode", "ErofsTree", "read_erofs"]


@dataclass(frozen=True, slots=True)
class ErofsInode:
    """One inode as the kernel will see it.

    Args:
        mode: with type bits.
        uid: owner.
        gid: group.
        mtime_ns: modification time.
        size: of a regular file, a symlink's target or a directory's entries.
        nlink: as stored, and checked against the names.
        rdev: (major, minor) of a device, (0, 0) of others.
        xattrs: sorted by name.
        target: of a symlink.
        extents: of a regular file; what none covers is a hole.
    """

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    nlink: int
    rdev: tuple[int, int] = (0, 0)
    xattrs: Xattrs = ()
    target: bytes = b""
    extents: tuple[Extent, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ErofsTree:
    """What an image says.

    Args:
        devices: sizes are whole blocks.
        root: nid of the root.
        inodes: by nid.
        children: nid of a directory -> name -> nid, without ``.`` and ``..``, in order of names.
    """

    devices: tuple[DeviceSlot, ...]
    root: int
    inodes: dict[int, ErofsInode]
    children: dict[int, dict[bytes, int]]

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Every (path, nid), parents first; the root is ``b""``."""
        pending = [(b"", self.root)]
        for path, nid in pending:
            yield path, nid
            prefix = path + b"/" if path else b""
            pending += [(prefix + name, child) for name, child in self.children.get(nid, {}).items()]


def read_erofs(image: bytes) -> ErofsTree:
    """Check the whole image and return what it says."""
    return _Reader(image).read()


class _Reader:
    """Reads in the order of the image, with one cursor for inodes and one for blocks."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._devices: tuple[DeviceSlot, ...] = ()
        self._position = 0
        self._ino = 0
        #: Block that the next content must start at; None before there is any.
        self._block: int | None = None
        self._first_block: int | None = None
        self._inodes: dict[int, ErofsInode] = {}
        self._children: dict[int, dict[bytes, int]] = {}
        #: Inodes that are no directories, in the order of their first names: nid -> (dirent type, names).
        self._others: dict[int, tuple[int, int]] = {}

    def read(self) -> ErofsTree:
        root, inodes = self._superblock()
        self._directories(root)
        bulk = self._other_inodes()
        self._check_order(bulk)
        end = align(self._position, BLOCK) >> BLOCK_BITS
        if self._first_block not in (None, end):
            _refuse("blocks do not follow the inodes")
        if (self._block or end) << BLOCK_BITS != len(self._image):
            _refuse("it has more blocks than are used")
        self._zeros(self._position, end << BLOCK_BITS)
        if len(self._inodes) != inodes:
            _refuse(f"{len(self._inodes)} inodes, not {inodes}")
        return ErofsTree(self._devices, root, self._inodes, self._children)

    def _superblock(self) -> tuple[int, int]:
        """Check superblock and device slots; nid of the root and number of inodes."""
        image = self._image
        if len(image) < SUPERBLOCK_AT + BLOCK or len(image) % BLOCK:
            _refuse(f"{len(image)} bytes are not whole blocks, or too few")
        raw = image[SUPERBLOCK_AT:SLOTS_AT]
        fields = SUPERBLOCK.unpack(raw)
        checksum, root, inodes, uuid, devices = fields[1], fields[5], fields[6], fields[12], fields[16]
        expected = SUPERBLOCK.pack(
            *(MAGIC, checksum, COMPAT, BLOCK_BITS, 0, root, inodes, 0, 0, len(image) >> BLOCK_BITS, 0, 0),
            *(uuid, bytes(16), INCOMPAT, 0, devices, SLOTS_AT // SLOT_SIZE, bytes(38)),
        )
        if raw != expected:
            _refuse("its superblock is of another profile")
        head = unsealed(image[:HEAD_SIZE])
        digest = hashlib.sha256(head + image[HEAD_SIZE:]).digest()
        if seal(head, digest) != image[:HEAD_SIZE]:
            _refuse("its checksum or UUID is not that of its content")
        self._position = SLOTS_AT + SLOT_SIZE * devices
        if devices > MAX_DEVICES or self._position > len(image):
            _refuse(f"{devices} devices are too many")
        self._zeros(0, SUPERBLOCK_AT)
        self._devices = tuple(self._slot(SLOTS_AT + SLOT_SIZE * number) for number in range(devices))
        return root, inodes

    def _slot(self, at: int) -> DeviceSlot:
        raw = self._image[at : at + SLOT_SIZE]
        tag, blocks, _address = DEVICE_SLOT.unpack(raw)
        tag = tag.rstrip(b"\0")
        if raw != DEVICE_SLOT.pack(tag, blocks, 0) or not tag or b"\0" in tag or len(tag) > TAG_SIZE:
            _refuse(f"the device slot at {at} is malformed")
        if blocks > MAX_BLOCKS:
            _refuse(f"the device slot at {at} has too many blocks")
        return DeviceSlot(tag, blocks << BLOCK_BITS)

    def _directories(self, root: int) -> None:
        pending = [(root, root)]
        for nid, parent in pending:  # grows as it is read
            header = self._header(nid)
            if not stat.S_ISDIR(header.mode):
                _refuse(f"inode {nid} is not a directory")
            xattrs = self._xattrs(header)
            content = self._content(header, header.size % BLOCK or BLOCK)
            inner = 0
            kids: dict[bytes, int] = {}
            for name, entry in parse_directory(content, f"directory {nid}"):
                if name in (b".", b".."):
                    if entry != Entry(nid if name == b"." else parent, FILE_TYPES[stat.S_IFDIR]):
                        _refuse(f"directory {nid}: {name!r} leads elsewhere")
                    continue
                kids[name] = entry.nid
                if entry.type == FILE_TYPES[stat.S_IFDIR]:
                    pending.append((entry.nid, nid))
                    inner += 1
                else:
                    kind, names = self._others.get(entry.nid, (entry.type, 0))
                    if kind != entry.type:
                        _refuse(f"inode {entry.nid} is of two types")
                    self._others[entry.nid] = kind, names + 1
            if header.nlink != 2 + inner:
                _refuse(f"directory {nid}: {header.nlink} links")
            self._children[nid] = kids
            self._inodes[nid] = _inode(header, xattrs)

    def _other_inodes(self) -> set[int]:
        """Read all other inodes, in the order of the image; returns those that may have been made in bulk."""
        bulk = set()
        for nid in sorted(self._others):
            header = self._header(nid)
            kind, names = self._others[nid]
            if FILE_TYPES.get(stat.S_IFMT(header.mode)) != kind or stat.S_ISDIR(header.mode):
                _refuse(f"inode {nid} is not of the type that its name says")
            if header.nlink != names:
                _refuse(f"inode {nid}: {header.nlink} links, {names} names")
            xattrs = self._xattrs(header)
            if stat.S_ISREG(header.mode) and header.size:
                extents, whole = self._chunks(header)
                self._inodes[nid] = _inode(header, xattrs, extents=extents)
                if whole and not xattrs:
                    bulk.add(nid)
            elif stat.S_ISLNK(header.mode):
                if not 0 < header.size <= PATH_MAX:
                    _refuse(f"symlink {nid}: {header.size} bytes")
                target = self._content(header, header.size)
                if b"\0" in target:
                    _refuse(f"symlink {nid}: its target has a NUL")
                self._inodes[nid] = _inode(header, xattrs, target=target)
            else:
                self._inodes[nid] = _inode(header, xattrs, rdev=_rdev(header))
        return bulk

    def _check_order(self, bulk: set[int]) -> None:
        """Inodes made in bulk come first, then the others; each of them breadth first."""
        ranks = {nid: rank for rank, nid in enumerate(self._others)}
        in_order = sorted(self._others)
        drops = [place for place, (one, other) in enumerate(pairwise(in_order), 1) if ranks[one] > ranks[other]]
        if len(drops) > 1 or (drops and not bulk.issuperset(in_order[: drops[0]])):
            _refuse("its inodes are in another order")

    def _header(self, nid: int) -> Header:
        """The inode at ``nid``, which must be the next one; the cursor moves to its end."""
        if nid * SLOT + INODE_SIZE > len(self._image):
            _refuse(f"inode {nid} is outside the image")
        header = parse_inode(self._image, nid)
        position = align(self._position, SLOT)
        if header.layout == INLINE_LAYOUT:
            tail = header.size % BLOCK
            if header.end - header.at + tail > BLOCK:
                _refuse(f"inode {nid}: its data do not fit in its block")
            if position % BLOCK + header.end - header.at + tail > BLOCK:
                position = align(position, BLOCK)
        if header.at != position:
            _refuse(f"inode {nid} is not where it should be")
        self._ino += 1
        if header.ino != self._ino:
            _refuse(f"inode {nid} has the number {header.ino}, not {self._ino}")
        self._zeros(self._position, position)
        self._position = header.end
        return header

    def _xattrs(self, header: Header) -> Xattrs:
        raw = self._image[header.at + INODE_SIZE : header.end]
        if len(raw) != header.end - header.at - INODE_SIZE:
            _refuse(f"inode {header.nid}: its extended attributes are outside the image")
        return parse_xattrs(raw, f"inode {header.nid}") if raw else ()

    def _content(self, header: Header, tail: int) -> bytes:
        """Data that are in the image; ``tail`` bytes are behind the inode if they fit there."""
        if header.size == 0:
            _refuse(f"inode {header.nid} has no data")
        inline = header.end - header.at + tail <= BLOCK
        if header.layout != (INLINE_LAYOUT if inline else PLAIN_LAYOUT):
            _refuse(f"inode {header.nid} has its data elsewhere than it should")
        length = header.size - tail if inline else header.size
        content = self._blocks(header, length)
        if inline:
            content += self._image[self._position : self._position + tail]
            self._position += tail
        if len(content) != header.size:
            _refuse(f"inode {header.nid}: its data are outside the image")
        return content

    def _blocks(self, header: Header, length: int) -> bytes:
        if length == 0:
            if not header.no_block:
                _refuse(f"inode {header.nid} has a block that it does not need")
            return b""
        if self._block is None:
            self._block = self._first_block = header.union
        if header.union != self._block:
            _refuse(f"inode {header.nid}: its blocks are not where they should be")
        start = self._block << BLOCK_BITS
        end = start + align(length, BLOCK)
        if end > len(self._image):
            _refuse(f"inode {header.nid}: its blocks are outside the image")
        self._zeros(start + length, end)
        self._block = end >> BLOCK_BITS
        return self._image[start : start + length]

    def _chunks(self, header: Header) -> tuple[tuple[Extent, ...], bool]:
        """Extents of a file, and whether they are one chunk of the whole file."""
        if header.layout != CHUNK_LAYOUT:
            _refuse(f"file {header.nid} is not made of chunks")
        start = align(header.end, 8)
        self._zeros(header.end, start)
        extents, length = parse_chunks(
            self._image, start, header.size, header.union, self._devices, f"file {header.nid}"
        )
        self._position = start + length
        return extents, length == 8 and len(extents) == 1

    def _zeros(self, start: int, end: int) -> None:
        if any(self._image[start:end]):
            _refuse(f"there is something between {start} and {end}")


def _rdev(header: Header) -> tuple[int, int]:
    """The device number of an inode without data."""
    device = stat.S_ISCHR(header.mode) or stat.S_ISBLK(header.mode)
    regular = stat.S_ISREG(header.mode)
    if header.layout != PLAIN_LAYOUT or header.size or (regular and not header.no_block):
        _refuse(f"inode {header.nid} has data")
    if not device and not regular and header.union:
        _refuse(f"inode {header.nid} has a device number")
    return decode_rdev(header.union) if device else (0, 0)


def _inode(
    header: Header,
    xattrs: Xattrs,
    *,
    rdev: tuple[int, int] = (0, 0),
    target: bytes = b"",
    extents: tuple[Extent, ...] = (),
) -> ErofsInode:
    return ErofsInode(
        header.mode,
        header.uid,
        header.gid,
        header.mtime_ns,
        header.size,
        header.nlink,
        rdev,
        xattrs,
        target,
        extents,
    )


def _refuse(why: str) -> NoReturn:
    raise IntegrityError(f"EROFS image: {why}")
