"""zstd frames to exactly the bytes that were promised: the compression of index sections and of spans.

A single frame must state its content size, so the result is allocated once and never larger than the caller
expects; it needs no dictionary, and nothing follows it. Layers of others have frames that do not. Safe to call
from any thread.
"""

import threading
from typing import Final

import zstandard

from veneer.errors import IntegrityError

__all__ = ["decode_zstd", "decode_zstd_frames"]

#: RFC 8878 (3.1.1.1.2) asks decoders for at least 8 MiB; more is for frames whose content is larger.
MAX_WINDOW: Final = 8 << 20
#: Of frames of others: the window that the zstd tool accepts unless told otherwise.
MAX_STREAM_WINDOW: Final = 128 << 20
#: Plain bytes that are taken from a decoder at a time.
_PIECE: Final = 1 << 20


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


def decode_zstd_frames(stored: bytes | memoryview, length: int, what: str) -> bytes:
    """The ``length`` bytes, at least 1, of whole frames in a row, which need not state their sizes."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_STREAM_WINDOW)
    frames = decompressor.stream_reader(stored, read_across_frames=True)
    pieces, left = [], length + 1
    try:
        while left and (piece := frames.read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: invalid zstd frames: {error}") from error
    if left != 1:
        raise IntegrityError(f"{what}: zstd frames do not hold exactly {length} bytes")
    return b"".join(pieces)
