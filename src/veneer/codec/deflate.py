"""A stretch of a gzip stream to plain bytes: raw deflate from any bit on, members that end and begin inside.

Inflaters begin at byte boundaries, and shifting the data would misalign stored blocks, which are aligned to
bytes themselves. So the missing low bits of the first byte are filled with empty deflate blocks: they give no
output, and every later byte keeps its place. An empty fixed block has 10 bits; one empty dynamic block, which
has 93, makes the odd lengths.

Not here: what the stretch is supposed to be, which the caller has checked against its digest, and the checksums
at the ends of members, which are about bytes that came before the stretch.
"""

import struct
from typing import Final, NamedTuple, Protocol, cast

from isal import isal_zlib

from veneer.errors import IntegrityError
from veneer.index.model import WINDOW_SIZE

__all__ = ["Checkpoint", "Inflater", "decode_stretch", "inflater_at"]

#: Raw deflate with the largest window.
_RAW_WBITS: Final = -15
#: Magic, method, flags, and six bytes that are of no use.
_HEADER: Final = struct.Struct("<2sBB6x")
#: Its stubs call the class an instance.
_IsalError = cast("type[Exception]", isal_zlib.error)
#: CRC-32 and length at the end of a member (RFC 1952).
_TRAILER: Final = 8
#: An inflater copies what follows a member when it ends: short inputs, and a shorter first one, keep many short
#: members cheap.
_INPUT, _SHORT_INPUT = 64 << 10, 4 << 10
#: The fixed Huffman code, and nothing but its end-of-block symbol.
_EMPTY_FIXED: Final = (3, 1 << 1), (7, 0)


class Checkpoint(NamedTuple):
    """Where a gzip stream can be entered: at a block boundary, or where a member begins.

    Args:
        stored_offset: of the first whole byte.
        offset: of the next plain byte.
        carry: the bits of the byte before (:func:`veneer.index.model.pack_carry`).
        window: the :data:`WINDOW_SIZE` plain bytes before; empty where a member begins, with its header.
    """

    stored_offset: int
    offset: int
    carry: int
    window: bytes


class Inflater(Protocol):
    """What isal offers, and zlib does."""

    eof: bool
    unused_data: bytes
    unconsumed_tail: bytes

    def decompress(self, data: bytes | memoryview, max_length: int = 0, /) -> bytes:
        """Plain bytes, at most so many unless that is 0."""


def _fillers() -> tuple[tuple[int, int], ...]:
    """Bit strings of empty blocks, the first bit lowest, and their lengths; the k-th one's is k modulo 8."""

    def joined(*fields: tuple[int, int]) -> tuple[int, int]:
        bits = length = 0
        for size, value in fields:
            bits |= value << length
            length += size
        return bits, length

    # A dynamic block (RFC 1951, 3.2.7): 257 literal codes, 1 distance code, 18 code length codes.
    header = ((1, 0), (2, 2), (5, 0), (5, 0), (4, 14))
    # In the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1: the codes of 18 and 0 have 2 bits, that of 1 has
    # one.
    code_lengths = tuple((3, {2: 2, 3: 2, 17: 1}.get(place, 0)) for place in range(18))
    many, zero, one = (2, 0b11), (2, 0b01), (1, 0)
    # 256 literals without a code, the end-of-block symbol with one of 1 bit, the distance without; and that
    # symbol.
    lengths = (many, (7, 138 - 11), many, (7, 118 - 11), one, zero)
    dynamic = (*header, *code_lengths, *lengths, (1, 0))
    found = []
    for remainder in range(8):
        blocks = dynamic if remainder % 2 else ()
        while sum(size for size, _ in blocks) % 8 != remainder:
            blocks = (*blocks, *_EMPTY_FIXED)
        found.append(joined(*blocks))
    return tuple(found)


_FILLERS: Final = _fillers()


def decode_stretch(stored: bytes | memoryview, length: int, carry: int, window: bytes, what: str) -> bytes:
    """The ``length`` plain bytes of a stretch.

    Args:
        stored: from the first whole byte to before the next stretch or the end of the stream.
        length: plain length in bytes, at least 1; bounds the memory that this takes.
        carry: the bits of the stretch that are in the byte before (:func:`veneer.index.model.pack_carry`).
        window: the :data:`WINDOW_SIZE` plain bytes before; what is not referred to may be anything.
        what: names the bytes in errors.

    Raises:
        IntegrityError: the bytes are corrupt, or hold more or less than ``length`` bytes.
    """
    if len(window) != WINDOW_SIZE:
        raise IntegrityError(f"{what}: its window has {len(window)} bytes")
    try:
        plain = _inflate(stored, length, carry, window)
    except _IsalError as error:
        raise IntegrityError(f"{what}: invalid gzip stream: {error}") from error
    if len(plain) != length:
        raise IntegrityError(f"{what}: a stretch of a gzip stream does not hold exactly {length} bytes")
    return plain


def _inflate(stored: bytes | memoryview, length: int, carry: int, window: bytes) -> bytes:
    """What the stretch holds, at most one byte more than ``length``."""
    stream = inflater_at(carry, window)
    # One byte more than expected: enough to see that there is more.
    first = stream.decompress(stored, length + 1)
    if not stream.eof or not (rest := memoryview(stored)[len(stored) - len(stream.unused_data) + _TRAILER :]):
        return first
    return b"".join((first, *_members(rest, length + 1 - len(first))))


def inflater_at(carry: int, window: bytes) -> Inflater:
    """An inflater that goes on at a block boundary: the first whole byte of the stream is to come next."""
    stream = cast("Inflater", isal_zlib.decompressobj(wbits=_RAW_WBITS, zdict=window))
    if carry:
        stream.decompress(_aligned(carry))
    return stream


def _aligned(carry: int) -> bytes:
    """Whole bytes that end with the bits of a carry, and mean nothing but those."""
    count = carry.bit_length() - 1
    bits, length = _FILLERS[8 - count]
    bits |= (carry & ~(1 << count)) << length
    return bits.to_bytes((length + count) // 8, "little")


def _members(stored: memoryview, most: int) -> list[bytes]:
    """Plain bytes, at most ``most``, of members of which the last one may have no end."""
    pieces: list[bytes] = []
    at = 0
    while most and at < len(stored):
        # Without its wrapper: isal's own reader of headers stumbles over pieces of them.
        at = _after_header(stored, at)
        member = isal_zlib.decompressobj(wbits=_RAW_WBITS)
        step = _SHORT_INPUT
        while most and at < len(stored) and not member.eof:
            given = stored[at : at + step]
            plain = member.decompress(given, most)
            at += len(given) - len(member.unused_data) - len(member.unconsumed_tail)
            most -= len(plain)
            pieces.append(plain)
            step = _INPUT
        at += _TRAILER
    return pieces


def _after_header(stored: memoryview, at: int) -> int:
    """Where the data of the member at ``at`` begin (RFC 1952, 2.3); the end if that comes first."""
    end = len(stored)
    if end - at < _HEADER.size:
        return end
    magic, method, flags = _HEADER.unpack_from(stored, at)
    if magic != b"\x1f\x8b" or method != 8 or flags & 0xE0:
        raise _IsalError("no header of a member")
    at += _HEADER.size
    if flags & 4:
        at += 2 + int.from_bytes(stored[at : at + 2], "little")
    for text in (8, 16):
        while flags & text:
            found = bytes(stored[at : at + _SHORT_INPUT]).find(b"\0")
            at = at + found + 1 if found >= 0 else min(at + _SHORT_INPUT, end)
            if found >= 0 or at == end:
                break
    return min(at + (2 if flags & 2 else 0), end)
