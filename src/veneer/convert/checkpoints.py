"""Where a gzip stream can be entered: block boundaries about a span apart, and the plain bytes before each.

rapidgzip notes them while it decompresses, and writes them as an index of the indexed_gzip format
(https://github.com/pauldmccarthy/indexed_gzip, "zran_export_index"), which is read here. It sets those bytes of
a window to zero that nothing refers to, so that windows compress to some 2 KB.

Nothing here is believed later on: whoever makes an index of the checkpoints decodes every span once
(:mod:`veneer.convert.stretches`). Not for: anything but gzip.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import rapidgzip

from veneer.codec.deflate import Checkpoint
from veneer.errors import IntegrityError
from veneer.index.model import WINDOW_SIZE, pack_carry

__all__ = ["SPACING", "Checkpoints", "IndexingGunzip"]

#: Plain bytes between checkpoints, chosen by measurement: docs/decisions/0012-gzip-layers-as-they-are.md.
SPACING: Final = 1 << 20

#: magic, version, flags, sizes of the stream as stored and plain, spacing, window size, points
_HEADER: Final = struct.Struct("<5sBBQQIII")
#: offset as stored and plain, bits of the byte before, whether there is a window
_POINT: Final = struct.Struct("<QQBB")
_PIECE: Final = 1 << 20
_NO_WINDOW: Final = bytes(WINDOW_SIZE)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one stream.

    Args:
        stored_size: of the stream.
        size: plain.
        spacing: plain bytes from one to the next, about.
        file: the exported index; windows are read from it when they are asked for.
    """

    stored_size: int
    size: int
    spacing: int
    file: IO[bytes]

    def walk(self, stored: IO[bytes]) -> Iterator[Checkpoint]:
        """Those to use, ascending; each at least half of the spacing after the one before.

        ``stored`` is the stream, from which the bits before a checkpoint are taken.
        """
        self.file.seek(0)
        *_, count = _HEADER.unpack(self.file.read(_HEADER.size))
        points = list(_POINT.iter_unpack(self.file.read(_POINT.size * count)))
        place, last = _HEADER.size + _POINT.size * count, -self.spacing
        for stored_offset, offset, bits, has_window in points:
            if 2 * (offset - last) >= self.spacing and offset < self.size:
                window = _NO_WINDOW
                if has_window:
                    self.file.seek(place)
                    window = self.file.read(WINDOW_SIZE)
                carry = 0
                if bits:
                    stored.seek(stored_offset - 1)
                    carry = pack_carry(bits, stored.read(1)[0] >> 8 - bits)
                yield Checkpoint(stored_offset, offset, carry, window)
                last = offset
            place += WINDOW_SIZE * has_window


class IndexingGunzip:
    """Decompresses a gzip stream and notes checkpoints. Use as a context manager; for one thread.

    Args:
        stored: the path of the stream, or a file object of it that can be read and sought (and may block in
            ``read``): it is asked for its size first, then read from front to end, with threads ahead of that.
        what: names the stream in errors.
        threads: that decompress. With one, nothing is done twice; with two, it takes about half of the time and
            nearly twice the work.
        spacing: plain bytes between checkpoints, at least 32 KiB.
    """

    def __init__(
        self, stored: Path | IO[bytes], what: str, *, threads: int = 1, spacing: int = SPACING
    ) -> None:
        self._what = what
        self._spacing = spacing
        source = os.fspath(stored) if isinstance(stored, Path) else stored
        try:
            self._file = rapidgzip.RapidgzipFile(source, threads, chunk_size=spacing)
        except (ValueError, RuntimeError) as error:
            raise self._malformed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """The next plain bytes, and how many they are; 0 at the end. Raises IntegrityError."""
        try:
            return int(self._file.readinto(buffer))
        except (ValueError, RuntimeError) as error:
            raise self._malformed(error) from error

    def pieces(self) -> Iterator[bytes]:
        """All plain bytes that are left."""
        buffer = bytearray(_PIECE)
        while count := self.readinto(buffer):
            yield bytes(memoryview(buffer)[:count])

    def export(self, file: IO[bytes]) -> Checkpoints:
        """The checkpoints, once everything has been read; ``file`` is where they are kept (33 KiB for each)."""
        file.seek(0)
        try:
            self._file.export_index(file)
        except (ValueError, RuntimeError) as error:
            raise self._malformed(error) from error
        file.seek(0)
        magic, _version, _flags, stored_size, size, _spacing, window_size, _count = _HEADER.unpack(
            file.read(_HEADER.size)
        )
        if magic != b"GZIDX" or window_size != WINDOW_SIZE:
            raise IntegrityError(f"{self._what}: rapidgzip made an index of another format")
        return Checkpoints(stored_size, size, self._spacing, file)

    def _malformed(self, error: Exception) -> IntegrityError:
        return IntegrityError(f"{self._what}: malformed gzip stream: {error}")
