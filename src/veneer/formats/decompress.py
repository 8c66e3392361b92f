"""Compressed layers as a bounded stream of plain bytes.

Invariant: a piece is at most :data:`PIECE_SIZE` bytes, and nothing but one piece and one window is held,
whatever the input claims; a stream that stops half-way, or goes on after its last member, is refused. How
much comes out in all is bounded too, since whoever pays for the disk did not write the layer.

Several gzip members and zstd frames in a row count as one stream, as they do for every other tool: eStargz,
zstd:chunked and parallel compressors write them.

The CRC of gzip is not checked: whoever asks for the bytes compares them with SHA-256 digests, stored and plain.
"""

import struct
from collections.abc import Callable, Generator, Iterator
from typing import IO, NamedTuple, cast

import zstandard
from isal import isal_zlib

from veneer.codec.boundaries import BoundaryFinder
from veneer.codec.deflate import Checkpoint, Inflater, inflater_at
from veneer.errors import IntegrityError, UnsupportedFormat

__all__ = ["MAX_PLAIN_SIZE", "PIECE_SIZE", "frame_boundaries", "gunzip", "plain_pieces"]

Read = Callable[[int], bytes]

#: Large enough that a piece is worth a thread's attention, small enough to hold several.
PIECE_SIZE = 1 << 20
#: No layer is larger: ten times the largest model images of 2026.
MAX_PLAIN_SIZE = 1 << 42
#: Stored bytes that are decompressed at a time. What follows the end of a member is copied each time, so that
#: behind another member less is tried first: some layers have a member for every file.
_GZIP_INPUT, _SHORT_INPUT = 128 << 10, 4 << 10
#: Magic, method, flags, and six bytes that are of no use; CRC-32 and length of a member.
_GZIP_HEADER, _GZIP_TRAILER = struct.Struct("<2sBB6x"), struct.Struct("<II")
#: Of a name or a comment.
_MAX_HEADER_TEXT = 64 << 10
_ZSTD_INPUT = 128 << 10
#: The window that the zstd tool accepts unless told otherwise.
_ZSTD_MAX_WINDOW = 128 << 20
#: Its stubs call the class an instance.
_IsalError = cast("type[Exception]", isal_zlib.error)
_SKIPPABLE_MAGIC = 0x184D2A50


def plain_pieces(
    read: Read,
    compression: str,
    what: str,
    *,
    finder: BoundaryFinder | None = None,
) -> Iterator[bytes]:
    """The plain bytes of a stream, in non-empty pieces.

    Args:
        read: gives up to so many stored bytes, ``b""`` at the end.
        compression: ``none``, ``gzip`` or ``zstd``.
        what: names the stream in errors.
        finder: notes checkpoints of gzip.

    Raises:
        IntegrityError: not one or more whole members or frames, or too many bytes.
    """
    match compression:
        case "none":
            pieces = iter(lambda: read(PIECE_SIZE), b"")
        case "gzip":
            pieces = _gathered(gunzip(read, what, finder=finder))
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


def gunzip(
    read: Read, what: str, *, finder: BoundaryFinder | None = None, start: Checkpoint | None = None
) -> Iterator[bytes]:
    """The plain bytes of a gzip stream, from a checkpoint on if there is one, as soon as they are known.

    Args:
        read: gives up to so many stored bytes from there on, ``b""`` at the end.
        what: names the stream in errors.
        finder: notes checkpoints.
        start: where to begin.

    Raises:
        IntegrityError: not whole members.
    """
    source = _Pending(read, 0 if start is None else start.stored_offset)
    entered = start if start is not None and start.window else None
    first = True
    while source.more(_GZIP_INPUT):
        # A member at a time, without its wrapper: isal's own reader of headers stumbles over pieces of them.
        if entered is not None:
            member = inflater_at(entered.carry, entered.window)
        else:
            if finder is not None:
                finder.member(source.place)
            _skip_header(source, what)
            member = cast("Inflater", isal_zlib.decompressobj(-15))
        size = yield from _inflate(member, source, what, finder, short=not first)
        trailer = source.exactly(_GZIP_TRAILER.size, what)
        if entered is None and _GZIP_TRAILER.unpack(trailer)[1] != size % (1 << 32):
            raise IntegrityError(f"{what}: malformed gzip stream: a member is not as long as it says")
        first, entered = False, None
    if first:
        raise IntegrityError(f"{what}: gzip stream ends early")


def _inflate(
    member: Inflater, source: "_Pending", what: str, finder: BoundaryFinder | None, *, short: bool
) -> Generator[bytes, None, int]:
    """What a member holds from here on, and how much that was."""
    size, pending = 0, b""
    ended = False
    while not ended:
        pending = pending or source.take(_SHORT_INPUT if short else _GZIP_INPUT)
        short, before = False, pending
        try:
            if finder is not None:
                place = source.place - len(pending)
                plain, pending = finder.inflate(member, pending, place, PIECE_SIZE)
            else:
                plain = member.decompress(pending, PIECE_SIZE)
                pending = member.unused_data if member.eof else member.unconsumed_tail
        except _IsalError as error:
            raise IntegrityError(f"{what}: malformed gzip stream: {error}") from error
        ended = member.eof
        if not plain and not before and not ended:
            raise IntegrityError(f"{what}: gzip stream ends early")
        size += len(plain)
        if plain:
            yield plain
    source.give_back(len(pending))
    return size


def _skip_header(source: "_Pending", what: str) -> None:
    """Read the header of a member (RFC 1952, section 2.3); what it says is of no use here."""
    magic, method, flags = _GZIP_HEADER.unpack(source.exactly(_GZIP_HEADER.size, what))
    if magic != b"\x1f\x8b" or method != 8 or flags & 0xE0:
        raise IntegrityError(f"{what}: malformed gzip stream: no header of a member")
    if flags & 4:
        source.exactly(int.from_bytes(source.exactly(2, what), "little"), what)
    for text in (8, 16):
        if flags & text:
            source.past_zero(what)
    if flags & 2:
        source.exactly(2, what)


class _Pending:
    """Stored bytes that can be put back.

    Attributes:
        place: of the next one in the stream.
    """

    def __init__(self, read: Read, place: int) -> None:
        self.place = place
        self._read = read
        #: The latest piece that was read, and what of it was taken.
        self._piece = b""
        self._at = 0

    def more(self, size: int) -> bool:
        """Whether there is another byte."""
        if self._at == len(self._piece):
            self._piece, self._at = self._read(size), 0
        return bool(self._piece)

    def take(self, size: int) -> bytes:
        """Some bytes of one piece; ``b""`` at the end."""
        self.more(size)
        taken = self._piece[self._at : self._at + size]
        self._at += len(taken)
        self.place += len(taken)
        return taken

    def give_back(self, count: int) -> None:
        """Have the last bytes that :meth:`take` gave, at most all of them, come next."""
        self._at -= count
        self.place -= count

    def exactly(self, size: int, what: str) -> bytes:
        """So many bytes. Raises IntegrityError."""
        taken = b""
        while len(taken) < size:
            part = self.take(size - len(taken))
            if not part:
                raise IntegrityError(f"{what}: gzip stream ends early")
            taken += part
        return taken

    def past_zero(self, what: str) -> None:
        """Skip a text and the zero at its end. Raises IntegrityError."""
        left = _MAX_HEADER_TEXT
        while left:
            part = self.take(left)
            if not part:
                raise IntegrityError(f"{what}: gzip stream ends early")
            if (end := part.find(b"\0")) >= 0:
                self.give_back(len(part) - end - 1)
                return
            left -= len(part)
        raise IntegrityError(f"{what}: malformed gzip stream: a header of more than {_MAX_HEADER_TEXT} bytes")


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


def frame_boundaries(stored: IO[bytes], size: int, what: str) -> Iterator[int]:
    """Where the zstd frames of a file of ``size`` bytes begin, skippable ones too, and where the last one ends.

    Reads headers only, so what is between them is anything. Raises IntegrityError when the file ends elsewhere.
    """
    walk = _walk_frames()
    want, at = next(walk), 0
    while at + want.skip <= size:
        at += want.skip
        if want.between:
            yield at
            if at == size and size:
                return
        stored.seek(at)
        header = stored.read(want.length)
        if len(header) < want.length:
            break
        at += want.length
        want = walk.send(header)
    raise IntegrityError(f"{what}: zstd stream ends early, or goes on after its last frame")


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
