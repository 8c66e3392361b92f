"""Extended attributes as EROFS keeps them behind an inode.

All of an inode's attributes are its own: shared ones, a feature of EROFS, would save a few bytes in images that
label every file and cost every reader a second block.
"""

import stat
import struct
from collections import Counter
from typing import Final

from veneer.errors import UnsupportedFormat
from veneer.index.model import Xattrs

__all__ = [
    "ACCESS_ACL",
    "DEFAULT_ACL",
    "MAX_XATTR_VALUE",
    "PREFIXES",
    "XATTR_ENTRY",
    "XATTR_HEADER",
    "pack_xattrs",
    "xattr_count",
]

#: name filter (not used), number of shared attributes (none).
XATTR_HEADER: Final = struct.Struct("<IB7x")
#: length of the name without its prefix, prefix, size of the value; both follow, padded to four bytes.
XATTR_ENTRY: Final = struct.Struct("<BBH")
#: The size of a value has 16 bits; Linux takes one byte more.
MAX_XATTR_VALUE: Final = 0xFFFF
#: The size behind an inode is counted in units of four bytes, in 16 bits.
_MAX_SIZE: Final = XATTR_HEADER.size + 4 * (0xFFFF - 1)

ACCESS_ACL: Final = b"system.posix_acl_access"
DEFAULT_ACL: Final = b"system.posix_acl_default"
#: Prefix number -> what the name starts with; of ACLs it is the whole name.
PREFIXES: Final = {1: b"user.", 2: ACCESS_ACL, 3: DEFAULT_ACL, 4: b"trusted.", 6: b"security."}


def pack_xattrs(xattrs: Xattrs, mode: int, dropped: Counter[str]) -> bytes:
    """What follows an inode of this mode: header and entries, or nothing.

    Attributes that Linux does not show on such an inode whatever a file system says (``system.`` other than
    ACLs, ACLs of symlinks) are left out and counted in ``dropped``. Raises UnsupportedFormat for those that do
    not fit.
    """
    entries = bytearray()
    for name, value in xattrs:
        found = _split(name, mode)
        if found is None:
            dropped["system xattr"] += 1
            continue
        number, rest = found
        if len(value) > MAX_XATTR_VALUE:
            raise _too_large(f"the extended attribute {name!r} has {len(value)} bytes")
        entries += XATTR_ENTRY.pack(len(rest), number, len(value)) + rest + value
        entries += bytes(-len(entries) % 4)
    if len(entries) + XATTR_HEADER.size > _MAX_SIZE:
        raise _too_large(f"the extended attributes of one inode have {len(entries)} bytes")
    return XATTR_HEADER.pack(0, 0) + entries if entries else b""


def xattr_count(packed: bytes) -> int:
    """What an inode states of the size of its packed attributes."""
    return (len(packed) - XATTR_HEADER.size) // 4 + 1 if packed else 0


def _split(name: bytes, mode: int) -> tuple[int, bytes] | None:
    """Prefix number and the rest of a name; None if there is no such attribute on the inode."""
    if name in (ACCESS_ACL, DEFAULT_ACL):
        return None if stat.S_ISLNK(mode) else (2 if name == ACCESS_ACL else 3, b"")
    for number in (1, 4, 6):
        if name.startswith(PREFIXES[number]):
            return number, name[len(PREFIXES[number]) :]
    return None


def _too_large(what: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{what}, more than EROFS can hold", hint="mount the image with --backend fuse")
