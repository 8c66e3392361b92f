"""One zstd frame to exactly the bytes that were promised: the compression of index sections and of spans.

A frame must state its content size, so the result is allocated once and never larger than the caller expects;
it needs no dictionary, and nothing follows it. Safe to call from any thread.
"""

import threading
from typing import Final

import zstandard

from veneer.errors import IntegrityError

__all__ = ["decode_zstd"]

#: RFC 8878 (3.1.1.1.2) asks decoders for at least 8 MiB; more is for frames whose content is larger.
MAX_WINDOW: Final = 8 << 20


class _Contexts(threading.local):
    """One zstd context a thread: making one costs more than decoding a small frame, sharing one is not safe."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def decode_zstd(stored: bytes | memoryview, length: int, what: str) -> bytes:
    """The ``length`` bytes, at least 1, of the one zstd frame in ``stored``; ``what`` names them in errors."""
    # The magic number is compared here because a skippable frame also has parameters, but no content.
    if length < 1 or stored[:4] != zstandard.FRAME_HEADER:
        raise IntegrityError(f"{what}: not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != length:
            raise IntegrityError(f"{what}: zstd frame does not state the expected size of {length} bytes")
        if frame.dict_id:
            raise IntegrityError(f"{what}: zstd frame needs the dictionary {frame.dict_id}")
        if frame.window_size > max(MAX_WINDOW, length):
            raise IntegrityError(f"{what}: zstd frame asks for a window of {frame.window_size} bytes")
        plain = _contexts.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: invalid zstd frame: {error}") from error
    if len(plain) != length:
        raise IntegrityError(f"{what}: expected {length} bytes, got {len(plain)}")
    return plain
