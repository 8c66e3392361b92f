"""Where a streamed gzip layer can be entered again, and the file in which that is kept.

While a layer is streamed its checkpoints are noted, one in some 4 MiB. What the cache loses of it later is then
decompressed from the one before it, instead of from the layer's beginning.

One file a layer, ``layers/checkpoints/ALGORITHM-HEX``: SHA-256 of the rest, columns, compressed windows.
Invariant: what is loaded is what was saved. Losing it costs time and never a byte: whoever reads has digests
of all spans.

Not for: indexes that somebody publishes, whose checkpoints are windows of spans (:mod:`veneer.index.wire`).
"""

import hashlib
import logging
from bisect import bisect_left, bisect_right
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final, Self

import zstandard

from veneer.codec.deflate import Checkpoint
from veneer.errors import IntegrityError
from veneer.formats.local import read_file, replace_file
from veneer.index.model import WINDOW_SIZE
from veneer.index.wire_columns import Fields, ascending_column, pack, unsigned_column
from veneer.index.wire_frame import decode_zstd
from veneer.oci.descriptor import Descriptor

__all__ = ["CheckpointFiles", "CheckpointTable", "spacing_of"]

_log = logging.getLogger(__name__)

#: Plain bytes between checkpoints: docs/decisions/0013-images-without-an-index.md has what they cost.
_SPACING: Final = 4 << 20
#: Of a large layer they are further apart, for there are so many at most, of which each has some 10 KB.
_MOST: Final = 2048
#: Stored bytes a checkpoint at least, which keeps most layers below that number.
_STORED_SPACING_SHARE: Final = _MOST // 4
_VERSION: Final = 1
_FIELDS: Final = 8
_DIGEST_SIZE: Final = 32
#: A window that does not compress, and what zstd adds to it.
_MOST_WINDOW: Final = WINDOW_SIZE + 1024
_MAX_FILE: Final = _MOST * (_MOST_WINDOW + 32) + 4096
_MAX_OFFSET: Final = 1 << 50
#: zstd level of windows: somebody waits for the stream.
_LEVEL: Final = 1


def spacing_of(stored_size: int) -> int:
    """Plain bytes between checkpoints of a layer."""
    return max(_SPACING, stored_size // _STORED_SPACING_SHARE)


class CheckpointTable:
    """The checkpoints of one layer, ascending. For one thread at a time."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._stored: list[int] = []
        self._carries = bytearray()
        self._windows: list[bytes] = []
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, checkpoint: Checkpoint) -> None:
        """Add one that lies behind all others; others, and too many, are left out."""
        if len(self) == _MOST or (self._offsets and checkpoint.offset <= self._offsets[-1]):
            return
        self._offsets.append(checkpoint.offset)
        self._stored.append(checkpoint.stored_offset)
        self._carries.append(checkpoint.carry)
        self._windows.append(self._compressor.compress(checkpoint.window) if checkpoint.window else b"")

    def before(self, offset: int) -> Checkpoint | None:
        """The last one that is not behind a plain byte."""
        number = bisect_right(self._offsets, offset) - 1
        if number < 0:
            return None
        stored = self._windows[number]
        window = decode_zstd(stored, WINDOW_SIZE, "window of a checkpoint") if stored else b""
        return Checkpoint(self._stored[number], self._offsets[number], self._carries[number], window)

    def stored_end(self, offset: int, otherwise: int | None) -> int | None:
        """Where the stored bytes end that hold all plain ones up to ``offset``, if a checkpoint tells."""
        number = bisect_left(self._offsets, offset)
        return self._stored[number] if number < len(self) else otherwise

    def encode(self) -> bytes:
        """As a file holds it."""
        places = [*ascending_column(self._offsets), *ascending_column(self._stored), bytes(self._carries)]
        lengths = unsigned_column(map(len, self._windows))
        body = pack([_VERSION, *places, lengths, b"".join(self._windows)])
        return hashlib.sha256(body).digest() + body

    @classmethod
    def decode(cls, data: bytes, what: str) -> Self:
        """Read what :meth:`encode` made. Raises IntegrityError."""
        body = data[_DIGEST_SIZE:]
        if hashlib.sha256(body).digest() != data[:_DIGEST_SIZE]:
            raise IntegrityError(f"{what}: it is damaged")
        fields = Fields(body, _FIELDS, what)
        if fields.number(_VERSION) != _VERSION:
            raise IntegrityError(f"{what}: from another version")
        table = cls()
        table._offsets, table._stored = fields.ascending(_MAX_OFFSET), fields.ascending(_MAX_OFFSET)
        table._carries = bytearray(fields.blob())
        lengths, windows = fields.unsigned(len(table)), fields.blob()
        ends = list(accumulate(lengths, initial=0))
        table._windows = [windows[start:end] for start, end in pairwise(ends)]
        if not len(table) == len(table._stored) == len(table._carries) <= _MOST or ends[-1] != len(windows):
            raise IntegrityError(f"{what}: columns of another length")
        return table


class CheckpointFiles:
    """The checkpoints of the layers of one cache directory. Everything blocks; any thread, any process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "checkpoints"

    def load(self, layer: Descriptor) -> CheckpointTable:
        """Those of a layer; none if they are not here."""
        path = self._path(layer)
        if (data := read_file(path, _MAX_FILE)) is None:
            return CheckpointTable()
        try:
            return CheckpointTable.decode(data, str(path))
        except IntegrityError as error:
            _log.warning("dropped %s", error)
            with suppress(OSError):
                path.unlink()
        return CheckpointTable()

    def save(self, layer: Descriptor, table: CheckpointTable) -> None:
        """Keep those of a layer; a disk that does not take them costs only them."""
        path = self._path(layer)
        try:
            replace_file(path, table.encode())
        except OSError as error:
            _log.warning("cannot keep %s: %s", path, error)

    def _path(self, layer: Descriptor) -> Path:
        return self._directory / f"{layer.digest.algorithm}-{layer.digest.hex}"
