"""From an image's tree to the EROFS metadata image that the kernel mounts over the image's devices.

The image holds names and attributes only. Every file that has data says, chunk by chunk, on which blocks of
which device they are, so a layer's uncompressed tar is mounted as it is. Pure and deterministic: the same tree
over the same devices gives the same bytes. docs/reference/erofs-profile.md describes them.

Inodes are in three regions, each in breadth-first order: directories; files with data in one chunk, which are
most of an image, all of one size, and made in bulk; everything else. Then come whole blocks: of directories,
and of symlinks that do not fit behind their inode.
"""

import hashlib
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import Final

from veneer.erofs.chunks import ChunkMapper, Copy
from veneer.erofs.directories import Directories, Directory
from veneer.erofs.inodes import FILE_SIZE, PlannedInode, fits_inline, pack_files, pack_inodes, superblock
from veneer.erofs.ondisk import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_LAYOUT,
    DEVICE_SLOT,
    FILE_TYPES,
    INLINE_LAYOUT,
    INODE_SIZE,
    MAX_BLOCKS,
    MAX_CHUNK_BITS,
    MAX_DEVICES,
    PATH_MAX,
    PLAIN_LAYOUT,
    SLOT,
    SLOT_SIZE,
    SLOTS_AT,
    SUPERBLOCK_AT,
    TAG_SIZE,
    DeviceSlot,
    align,
    encode_rdev,
    seal,
)
from veneer.erofs.xattrs import pack_xattrs
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import Extent, ImageIndex

__all__ = ["WRITER_VERSION", "ErofsImage", "write_erofs"]

#: Rises with every change after which the same tree gives other bytes; images that were kept are then stale.
WRITER_VERSION: Final = 1

_MAX_WHOLE: Final = BLOCK << MAX_CHUNK_BITS
#: Dirent types by type bits of a mode, where :meth:`Directories.pack` wants them.
_TYPES: Final = [FILE_TYPES.get(kind << 12, 0) << 16 for kind in range(16)]
_REGULAR: Final = _TYPES[stat.S_IFREG >> 12]
_DIRECTORY: Final = _TYPES[stat.S_IFDIR >> 12]


@dataclass(frozen=True, slots=True, eq=False)
class ErofsImage:
    """What to mount, and over what.

    Args:
        data: the metadata image, for a file of its own; its length is a multiple of 512.
        devices: what ``device=`` options must name, in this order: the image's devices, then the packs, then
            the tail if there is one. A mount gives exactly that many.
        copies: all that the last device, the tail, holds; without copies there is no tail.
        dropped: extended attributes that were left out -> how many.
        inodes: number of inodes.
    """

    data: bytes
    devices: tuple[DeviceSlot, ...]
    copies: tuple[Copy, ...]
    dropped: Mapping[str, int]
    inodes: int

    @property
    def tail(self) -> int | None:
        """Number of the device that is made of :attr:`copies`, if there is one."""
        return len(self.devices) - 1 if self.copies else None

    @property
    def unaligned(self) -> list[int]:
        """Nodes of the files that have data on the tail."""
        return list(dict.fromkeys(copy.node for copy in self.copies))


def write_erofs(
    index: ImageIndex,
    *,
    packs: Sequence[DeviceSlot] = (),
    placements: Mapping[int, Sequence[Extent]] | None = None,
) -> ErofsImage:
    """The metadata image of ``index``.

    Args:
        index: the tree. Its nodes' own extents say where files are, unless ``placements`` does.
        packs: devices beside those of the index; extents know them as ``len(index.devices)`` and on.
        placements: regular file -> where its bytes are instead: extents in the order of the file that together
            hold the same bytes as ``index.extents(node)``; what none covers is a hole. They cost least when the
            places where one device ends and another begins are multiples of a large power of two.

    Raises UnsupportedFormat for what EROFS, or this profile of it, cannot hold, and IntegrityError for data
    outside their device.
    """
    return _Writer(index, packs, placements or {}).write()


class _Writer:
    def __init__(
        self, index: ImageIndex, packs: Sequence[DeviceSlot], placements: Mapping[int, Sequence[Extent]]
    ) -> None:
        self._index = index
        # All of a sha256 and half of a sha512 in hexadecimal.
        layers = (DeviceSlot(d.diff_id.hex[:TAG_SIZE].encode(), d.spans.size) for d in index.devices)
        self._devices = [*layers, *packs]
        self._placements = placements
        self._mapper = ChunkMapper(self._devices)
        self._dropped: Counter[str] = Counter()
        self._names = Directories()
        self._nids = [0] * len(index.mode)
        self._types = [_TYPES[mode >> 12] for mode in index.mode]

    def write(self) -> ErofsImage:
        """Plan, place, then pack."""
        directories = self._directories()
        files, others = self._classes(directories)
        folders = [self._folder(directory) for directory in directories]
        rest = [self._inode(node) for node in others]
        devices = self._all_devices()  # files in several chunks decide whether there is a tail

        files_at = self._place(folders, SLOTS_AT + SLOT_SIZE * len(devices))
        rest_at = files_at + FILE_SIZE * len(files)
        for node, nid in zip(files, count(files_at // SLOT, FILE_SIZE // SLOT), strict=False):
            self._nids[node] = nid
        end = self._place(rest, rest_at)
        blocks = align(end, BLOCK) >> BLOCK_BITS
        for item in chain(folders, rest):
            if item.blocks:
                item.union = blocks
                blocks += item.blocks

        self._fill(folders)
        inodes = len(folders) + len(files) + len(rest)
        image = bytearray(blocks << BLOCK_BITS)
        image[SUPERBLOCK_AT:SLOTS_AT] = superblock(self._nids[self._index.root], inodes, blocks, len(devices))
        for number, slot in enumerate(devices):
            DEVICE_SLOT.pack_into(image, SLOTS_AT + SLOT_SIZE * number, slot.tag, slot.blocks, 0)
        pack_inodes(image, self._index, self._nids, folders, 1)
        image[files_at:rest_at] = pack_files(self._index, self._devices, files, len(folders) + 1)
        pack_inodes(image, self._index, self._nids, rest, len(folders) + len(files) + 1)
        seal(image)
        return ErofsImage(bytes(image), devices, tuple(self._mapper.copies), dict(self._dropped), inodes)

    def _directories(self) -> list[Directory]:
        """Every directory, breadth first."""
        types, children = self._types, self._index.children
        found = [self._index.root]
        parents = [self._index.root]
        directories = []
        for node, parent in zip(found, parents, strict=True):  # both grow as they are read
            kids = children.get(node, {})
            directories.append(self._names.add(node, parent, kids))
            inner = [kid for kid in kids.values() if types[kid] == _DIRECTORY]
            found += inner
            parents += repeat(node, len(inner))
            if len(found) > len(types):
                raise IntegrityError("a directory of the tree is in several places")
        return directories

    def _classes(self, directories: Iterable[Directory]) -> tuple[list[int], list[int]]:
        """All nodes but directories, breadth first, once each: files that are made in bulk, and others."""
        index = self._index
        types, size, data = self._types, index.size, index.data
        special = index.xattrs.keys() | index.segments.keys() | self._placements.keys()
        files, others = [], []
        empty: dict[bytes, int] = {}
        values = (index.children.get(directory.node, empty).values() for directory in directories)
        for node in dict.fromkeys(chain.from_iterable(values)):
            kind = types[node]
            if (
                kind == _REGULAR
                and node not in special
                and 0 < size[node] <= _MAX_WHOLE
                and data[node] % BLOCK == 0
            ):
                files.append(node)
            elif kind != _DIRECTORY:
                others.append(node)
        return files, others

    def _folder(self, directory: Directory) -> PlannedInode:
        xattrs = self._xattrs(directory.node)
        item = PlannedInode(directory.node, PLAIN_LAYOUT, directory.size, xattrs=xattrs)
        if fits_inline(xattrs, directory.tail):
            item.layout, item.body_length = INLINE_LAYOUT, directory.tail
        item.blocks = align(directory.size - item.body_length, BLOCK) >> BLOCK_BITS
        return item

    def _inode(self, node: int) -> PlannedInode:
        """Anything but a directory."""
        index = self._index
        mode, size = index.mode[node], index.size[node]
        item = PlannedInode(node, PLAIN_LAYOUT, 0, xattrs=self._xattrs(node))
        if stat.S_ISLNK(mode):
            target = index.targets[node]
            item.size = len(target)
            if not 0 < item.size <= PATH_MAX:
                raise UnsupportedFormat(
                    f"the target of a symlink has {item.size} bytes, which Linux does not allow"
                )
            if fits_inline(item.xattrs, item.size):
                item.layout, item.body, item.body_length = INLINE_LAYOUT, target, item.size
            else:
                item.content, item.blocks = target, align(item.size, BLOCK) >> BLOCK_BITS
        elif stat.S_ISREG(mode):
            item.size = size
            if size:
                extents = self._placements.get(node)
                item.layout = CHUNK_LAYOUT
                item.union, item.body = self._mapper.map(
                    node, size, index.extents(node) if extents is None else extents
                )
                item.body_length = len(item.body)
        elif stat.S_IFMT(mode) in FILE_TYPES:
            item.union = encode_rdev(*index.rdevs.get(node, (0, 0)))
        else:
            raise IntegrityError(f"a name leads to something of mode {mode:o}")
        return item

    def _xattrs(self, node: int) -> bytes:
        xattrs = self._index.xattrs.get(node)
        return pack_xattrs(xattrs, self._index.mode[node], self._dropped) if xattrs else b""

    def _all_devices(self) -> tuple[DeviceSlot, ...]:
        """The devices with the tail, checked to be what slots can say."""
        devices = self._devices
        if self._mapper.copies:
            devices = [*devices, self._tail()]
        if len(devices) > MAX_DEVICES:
            raise UnsupportedFormat(f"{len(devices)} devices, more than {MAX_DEVICES}")
        for slot in devices:
            if not 0 < len(slot.tag) <= TAG_SIZE or b"\0" in slot.tag:
                raise ValueError(f"the device tag {slot.tag!r} is empty, too long or has a NUL")
            if slot.blocks > MAX_BLOCKS:
                raise UnsupportedFormat(
                    f"the device {slot.tag.decode('ascii', 'replace')} has {slot.size} bytes, EROFS takes 2 TiB"
                )
        return tuple(devices)

    def _tail(self) -> DeviceSlot:
        """The tail's slot; its tag is made of what it is a copy of."""
        digest = hashlib.sha256(b"".join(slot.tag.ljust(TAG_SIZE, b"\0") for slot in self._devices))
        for copy in self._mapper.copies:
            digest.update(struct.pack("<4Q", copy.offset, copy.length, copy.device, copy.source))
        return DeviceSlot(digest.hexdigest().encode(), self._mapper.tail_blocks << BLOCK_BITS)

    def _place(self, items: Iterable[PlannedInode], position: int) -> int:
        """Give items their nids from ``position`` on; returns where the next region starts."""
        for item in items:
            if item.layout == INLINE_LAYOUT:
                # The kernel wants an inline body in one block, and that of a symlink in its inode's block.
                length = item.body_at + item.body_length
                if position % BLOCK + length > BLOCK:
                    position = align(position, BLOCK)
            elif item.layout == CHUNK_LAYOUT:
                length = item.body_at + item.body_length
            else:
                length = INODE_SIZE + len(item.xattrs)
            self._nids[item.node] = position // SLOT
            position = align(position + length, SLOT)
        return position

    def _fill(self, folders: Sequence[PlannedInode]) -> None:
        """Give directories their content, now that all nids are known."""
        for folder, content in zip(folders, self._names.pack(self._nids, self._types), strict=True):
            cut = folder.size - folder.body_length
            folder.content, folder.body = content[:cut], content[cut:]
