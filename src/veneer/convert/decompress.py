"""Compressed layers as a bounded stream of plain bytes.

Invariant: a piece is at most :data:`PIECE_SIZE` bytes, and nothing but one piece and one window is held,
whatever the input claims; a stream that stops half-way, or goes on after its last member, is refused. How
much comes out in all is bounded too, since whoever pays for the disk did not write the layer.

Several gzip members and zstd frames in a row count as one stream, as they do for every other tool: eStargz,
zstd:chunked and parallel compressors write them.
"""

import zlib
from collections.abc import Callable, Generator, Iterator
from typing import IO, NamedTuple, cast

import zstandard

from veneer.errors import IntegrityError, UnsupportedFormat

__all__ = ["MAX_PLAIN_SIZE", "PIECE_SIZE", "plain_pieces"]

Read = Callable[[int], bytes]

#: Large enough that a piece is worth a thread's attention, small enough to hold several.
PIECE_SIZE = 1 << 20
#: No layer is larger: ten times the largest model images of 2026.
MAX_PLAIN_SIZE = 1 << 42
#: zlib copies what follows a member each time one ends; short inputs keep many short members cheap.
_GZIP_INPUT = 16 << 10
_ZSTD_INPUT = 128 << 10
#: The window that the zstd tool accepts unless told otherwise.
_ZSTD_MAX_WINDOW = 128 << 20
_SKIPPABLE_MAGIC = 0x184D2A50


def plain_pieces(read: Read, compression: str, what: str) -> Iterator[bytes]:
    """The plain bytes of a stream, in non-empty pieces.

    Args:
        read: gives up to so many stored bytes, ``b""`` at the end.
        compression: ``none``, ``gzip`` or ``zstd``.
        what: names the stream in errors.

    Raises:
        IntegrityError: not one or more whole members or frames, or too many bytes.
    """
    match compression:
        case "none":
            pieces = iter(lambda: read(PIECE_SIZE), b"")
        case "gzip":
            pieces = _gathered(_gunzip(read, what))
        case "zstd":
            pieces = _unzstd(read, what)
        case _:
            raise UnsupportedFormat(f"{what}: unknown compression {compression!r}")
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_PLAIN_SIZE:
            raise IntegrityError(f"{what}: expands to more than {MAX_PLAIN_SIZE} bytes")
        yield piece


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer pieces."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        if held and size + len(piece) > PIECE_SIZE:
            yield b"".join(held)
            held, size = [], 0
        held.append(piece)
        size += len(piece)
    if held:
        yield b"".join(held)


def _gunzip(read: Read, what: str) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    pending = b""
    while pending or (pending := read(_GZIP_INPUT)):
        if member.eof:
            member = zlib.decompressobj(wbits=31)
        try:
            plain = member.decompress(pending, PIECE_SIZE)
        except zlib.error as error:
            raise IntegrityError(f"{what}: malformed gzip stream: {error}") from error
        pending = member.unused_data if member.eof else member.unconsumed_tail
        if plain:
            yield plain
    if not member.eof:
        raise IntegrityError(f"{what}: gzip stream ends early")


def _unzstd(read: Read, what: str) -> Iterator[bytes]:
    checked = _FrameBoundary(read)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    source = cast("IO[bytes]", checked)  # its read() is all that the decoder calls
    reader = decompressor.stream_reader(source, read_size=_ZSTD_INPUT, read_across_frames=True)
    try:
        while piece := reader.read(PIECE_SIZE):
            yield piece
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: malformed zstd stream: {error}") from error
    if not checked.at_boundary or checked.read(1):
        raise IntegrityError(f"{what}: zstd stream ends early, or goes on after its last frame")


class _Want(NamedTuple):
    """What the walk needs next: ``length`` bytes after ``skip`` others; ``between`` frames it may also end."""

    skip: int
    length: int
    between: bool = False


class _FrameBoundary:
    """Passes zstd bytes on and knows whether they have ended where a frame ends.

    The decoder itself does not tell: it takes a stream that stops inside a frame for a whole one.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._walk = _walk_frames()
        self._want = next(self._walk)
        self._skip = 0
        self._held = b""
        self._started = False

    def read(self, size: int) -> bytes:
        """Bytes for the decoder."""
        data = self._read(size)
        self._started = self._started or bool(data)
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._want.length - len(self._held), len(data) - at)
                self._held += data[at : at + step]
                if len(self._held) == self._want.length:
                    self._want = self._walk.send(self._held)
                    self._skip, self._held = self._want.skip, b""
            at += step
        return data

    @property
    def at_boundary(self) -> bool:
        """Whether at least one byte came, and the last one ended a frame."""
        return self._started and self._want.between and not self._skip and not self._held


def _walk_frames() -> Generator[_Want, bytes, None]:
    """Follow the headers of frames and blocks (RFC 8878, section 3.1); the decoder judges the rest."""
    skip = 0
    while True:
        magic = int.from_bytes((yield _Want(skip, 4, between=True)), "little")
        if magic & ~0xF == _SKIPPABLE_MAGIC:
            skip = int.from_bytes((yield _Want(0, 4)), "little")
            continue
        flags = (yield _Want(0, 1))[0]
        single_segment = bool(flags & 0x20)
        content_size = (int(single_segment), 2, 4, 8)[flags >> 6]
        skip = int(not single_segment) + (0, 1, 2, 4)[flags & 3] + content_size
        last = False
        while not last:
            block = int.from_bytes((yield _Want(skip, 3)), "little")
            last, run_length = bool(block & 1), block >> 1 & 3 == 1
            skip = 1 if run_length else block >> 3
        skip += 4 if flags & 4 else 0
