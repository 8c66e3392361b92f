"""Stored bytes of one span to plain bytes, or an error: never fewer, never more, never others.

A span is decoded alone and in one call, so nothing here keeps state between spans. The invariant is that the
result has exactly the promised length and that the stored bytes hold what their codec says and nothing
after it. Memory is bounded by that length, which the span table has bounded before.

A stretch of a gzip stream (``deflate``) is the only one that is decoded with something besides: its window,
which whoever calls has verified, and bits of the byte before it (:mod:`veneer.codec.deflate`).

Not here: finding spans, and opening seals (authenticated ciphers around a codec), which are refused by name.
"""

import hashlib
import zlib
from collections.abc import Callable
from typing import Final

from veneer.codec.deflate import decode_stretch
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import DEFLATE, Codec, Span
from veneer.index.wire_frame import decode_zstd, decode_zstd_frames

__all__ = ["check_and_decode", "decode"]

#: zlib's code for "a gzip header and trailer are required", with the largest window.
_GZIP_WBITS: Final = 16 + zlib.MAX_WBITS


def check_and_decode(span: Span, stored: bytes | memoryview, what: str, window: bytes = b"") -> bytes:
    """The plain bytes of ``span``; its stored bytes are hashed before any decoder sees them.

    ``window`` is the verified one of a span that has one.
    """
    if len(stored) != span.stored_length:
        raise IntegrityError(f"{what}: expected {span.stored_length} stored bytes, got {len(stored)}")
    if (actual := hashlib.sha256(stored)).digest() != span.digest:
        raise IntegrityError(f"{what}: expected sha256:{span.digest.hex()}, got sha256:{actual.hexdigest()}")
    if span.codec.name == DEFLATE and not span.codec.seal:
        return decode_stretch(stored, span.length, span.carry, window, what)
    return decode(span.codec, stored, span.length, what)


def decode(codec: Codec, stored: bytes | memoryview, length: int, what: str) -> bytes:
    """The ``length`` plain bytes that ``stored`` holds, of any codec that needs nothing else.

    Args:
        codec: how they are stored.
        stored: the stored bytes, all of them; whoever fetched them has checked their digest.
        length: plain length in bytes, at least 1; bounds the memory that this takes.
        what: names the bytes in errors.

    Raises:
        IntegrityError: the bytes are corrupt, or hold more or less than ``length`` bytes.
        UnsupportedFormat: nothing here knows the codec or its seal.
    """
    if codec.seal:
        raise UnsupportedFormat(f"{what}: sealed with {codec.seal!r}, which this version cannot open")
    decoder = _DECODERS.get(codec.name)
    if decoder is None:
        raise UnsupportedFormat(f"{what}: unknown codec {codec.name!r}")
    return decoder(stored, length, what)


def _decode_raw(stored: bytes | memoryview, length: int, what: str) -> bytes:
    if len(stored) != length:
        raise IntegrityError(f"{what}: expected {length} bytes, got {len(stored)}")
    return bytes(stored)


def _decode_gzip(stored: bytes | memoryview, length: int, what: str) -> bytes:
    member = zlib.decompressobj(_GZIP_WBITS)
    try:
        # One byte more than expected: enough to see that there is more, and to let zlib read the trailer.
        plain = member.decompress(stored, length + 1)
    except zlib.error as error:
        raise IntegrityError(f"{what}: invalid gzip member: {error}") from error
    if len(plain) != length or not member.eof:
        raise IntegrityError(f"{what}: gzip member does not hold exactly {length} bytes")
    if member.unused_data:
        raise IntegrityError(f"{what}: {len(member.unused_data)} bytes follow the gzip member")
    return plain


_DECODERS: Final[dict[str, Callable[[bytes | memoryview, int, str], bytes]]] = {
    "raw": _decode_raw,
    "zstd": decode_zstd,
    "zstd-frames": decode_zstd_frames,
    "gzip": _decode_gzip,
}
