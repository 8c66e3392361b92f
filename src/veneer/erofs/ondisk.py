"""The structures of EROFS that veneer's profile uses, as the kernel's ``fs/erofs/erofs_fs.h`` has them.

Everything is little-endian. docs/reference/erofs-profile.md says which values the profile allows.
"""

import stat
import struct
from typing import Final, NamedTuple

__all__ = [
    "BLOCK",
    "BLOCK_BITS",
    "CHUNK_INDEXES",
    "CHUNK_LAYOUT",
    "COMPAT",
    "DEVICE_SLOT",
    "DIRENT_SIZE",
    "ENTRY",
    "FILE_TYPES",
    "HEAD_SIZE",
    "HOLE",
    "INCOMPAT",
    "INLINE_LAYOUT",
    "INODE",
    "INODE_SIZE",
    "MAGIC",
    "MAX_BLOCKS",
    "MAX_CHUNK_BITS",
    "MAX_DEVICES",
    "NAME_MAX",
    "NANOSECONDS",
    "NO_BLOCK",
    "PATH_MAX",
    "PLAIN_LAYOUT",
    "SLOT",
    "SLOTS_AT",
    "SLOT_SIZE",
    "SUPERBLOCK",
    "SUPERBLOCK_AT",
    "TAG_SIZE",
    "DeviceSlot",
    "align",
    "decode_rdev",
    "encode_rdev",
    "seal",
    "unsealed",
]

#: One tar block. Data of an uncompressed tar can be mapped where they are only with blocks of this size.
BLOCK: Final = 512
BLOCK_BITS: Final = 9
#: A node number (nid) is the offset of its inode in slots of this size.
SLOT: Final = 32
NANOSECONDS: Final = 1_000_000_000

SUPERBLOCK_AT: Final = 1024
#: What is before the superblock, and its block, which the checksum covers. Every image has so much.
HEAD_SIZE: Final = SUPERBLOCK_AT + BLOCK
#: magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, epoch, fixed_nsec, blocks,
#: meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs, extra_devices,
#: devt_slotoff, and fields that belong to features that the profile does not have.
SUPERBLOCK: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHH38s")
MAGIC: Final = 0xE0F5E1E2
#: SB_CHKSUM and MTIME.
COMPAT: Final = 0x1 | 0x2
#: CHUNKED_FILE and DEVICE_TABLE.
INCOMPAT: Final = 0x4 | 0x8
_CHECKSUM_AT: Final = SUPERBLOCK_AT + 4
_UUID_AT: Final = SUPERBLOCK_AT + 0x30
_UUID_SIZE: Final = 16

#: tag, blocks, uniaddr: the device has no place in a unified address space, chunks name it instead.
DEVICE_SLOT: Final = struct.Struct("<64sII56x")
SLOT_SIZE: Final = DEVICE_SLOT.size
SLOTS_AT: Final = SUPERBLOCK_AT + SUPERBLOCK.size
TAG_SIZE: Final = 64
#: The root's nid has 16 bits and its inode follows the slots. Four times what a manifest may have layers.
MAX_DEVICES: Final = 4096
#: Block addresses have 32 bits and one value means a hole.
MAX_BLOCKS: Final = 0xFFFFFFFE

#: format, xattr_icount, mode, reserved, size, union, ino, uid, gid, mtime, mtime_nsec, nlink; 64 bytes.
INODE: Final = struct.Struct("<HHHHQIIIIqII16x")
INODE_SIZE: Final = INODE.size
#: Values of ``format``: an extended inode, and where its data are.
_EXTENDED: Final = 1
PLAIN_LAYOUT: Final = _EXTENDED | 0 << 1
INLINE_LAYOUT: Final = _EXTENDED | 2 << 1
CHUNK_LAYOUT: Final = _EXTENDED | 4 << 1
#: Start block of data that are in the inode.
NO_BLOCK: Final = 0xFFFFFFFF

#: Bit of a chunk format: entries are chunk indexes of eight bytes, which name a device.
CHUNK_INDEXES: Final = 0x20
#: Chunks have at most 512 << 31 bytes, 1 TiB.
MAX_CHUNK_BITS: Final = 31
#: A chunk index: high half of the block address (always 0 here), device (from 1), block.
ENTRY: Final = struct.Struct("<HHI")
HOLE: Final = ENTRY.pack(0, 0, NO_BLOCK)

DIRENT_SIZE: Final = 12
NAME_MAX: Final = 255
#: The longest target that Linux follows, which is PATH_MAX less its NUL.
PATH_MAX: Final = 4095
#: Type of a dirent by type bits of a mode.
FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}


class DeviceSlot(NamedTuple):
    """One device of a mount, in the order of its ``device=`` options.

    Args:
        tag: names the content: at most 64 bytes, not empty, no NUL.
        size: bytes. The file behind the device must have whole blocks, so at least ``blocks * 512`` bytes.
    """

    tag: bytes
    size: int

    @property
    def blocks(self) -> int:
        """Size in blocks."""
        return (self.size + BLOCK - 1) >> BLOCK_BITS


def align(offset: int, unit: int) -> int:
    """The first multiple of ``unit``, a power of two, at or after ``offset``."""
    return (offset + unit - 1) & -unit


def encode_rdev(major: int, minor: int) -> int:
    """A device number as the kernel's ``new_encode_dev``."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_rdev(encoded: int) -> tuple[int, int]:
    """(major, minor) of a device number."""
    return encoded >> 8 & 0xFFF, encoded & 0xFF | encoded >> 12 & 0xFFF00


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C: Final = _crc32c_table()


def _checksum(block: bytes) -> int:
    """CRC-32C of the superblock's block with a checksum of zero; EROFS does not invert the result."""
    crc = 0xFFFFFFFF
    for byte in block:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def unsealed(head: bytes) -> bytes:
    """The first :data:`HEAD_SIZE` bytes of an image with UUID and checksum zero, as they are in its digest."""
    image = bytearray(head)
    image[_CHECKSUM_AT : _CHECKSUM_AT + 4] = bytes(4)
    image[_UUID_AT : _UUID_AT + _UUID_SIZE] = bytes(_UUID_SIZE)
    return bytes(image)


def seal(head: bytes, digest: bytes) -> bytes:
    """The first :data:`HEAD_SIZE` bytes of an image with UUID and checksum, which are zero in ``head``.

    The UUID is of version 8 and made of ``digest``, the SHA-256 of the image with both of them zero: the same
    content, the same UUID; and whoever keeps an image in a file can tell later that it is still the one that
    was written.
    """
    image = bytearray(head)
    uuid = bytearray(digest[:_UUID_SIZE])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    image[_UUID_AT : _UUID_AT + _UUID_SIZE] = uuid
    image[_CHECKSUM_AT : _CHECKSUM_AT + 4] = _checksum(bytes(image[SUPERBLOCK_AT:])).to_bytes(4, "little")
    return bytes(image)
