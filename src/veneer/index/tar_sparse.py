"""Sparse files in tars: GNU's old format (type ``S``) and its three PAX formats (0.0, 0.1 and 1.0).

All of them list the segments that hold data, which the archive stores back to back; everything else is a hole.
Source: the GNU tar manual, "Storing Sparse Files".
"""

from collections.abc import Iterable
from typing import Final

from veneer.index.tar_header import BLOCK, MalformedTar, number
from veneer.index.tar_pax import PaxRecords, decimal

__all__ = [
    "MAX_SEGMENTS",
    "SparseMapReader",
    "checked_segments",
    "map_in_data",
    "old_real_size",
    "old_segments",
    "real_size",
    "recorded_segments",
]

Segments = tuple[tuple[int, int], ...]

#: Far more than real files have, and two megabytes of memory at most.
MAX_SEGMENTS: Final = 100_000
#: A decimal number of the map of format 1.0: 19 digits and the newline.
_MAX_MAP_LINE: Final = 20

#: Where the old format's segments are: in the first header (four) and in each header that continues it (21).
_FIRST: Final = (386, 4, 482)
_CONTINUED: Final = (0, 21, 504)
_REAL_SIZE: Final = slice(483, 495)


def checked_segments(pairs: Iterable[tuple[int, int]], size: int, stored: int) -> Segments | None:
    """The map in its one canonical form: ascending, none empty, none touching; None without holes."""
    out: list[tuple[int, int]] = []
    end = total = 0
    for offset, length in pairs:
        if offset < end or length < 0 or offset + length > size:
            raise MalformedTar(f"the sparse map has {length} bytes at {offset} in a file of {size} bytes")
        if length:
            if out and offset == end:
                out[-1] = (out[-1][0], out[-1][1] + length)
            else:
                out.append((offset, length))
        end = offset + length
        total += length
    if total != stored:
        raise MalformedTar(f"the sparse map has {total} bytes of data, but {stored} are stored")
    return None if total == size else tuple(out)


def real_size(records: PaxRecords) -> int:
    """Size of the whole file that the records of a sparse file give."""
    sizes = {
        decimal(records[key], "sparse size")
        for key in (b"GNU.sparse.size", b"GNU.sparse.realsize")
        if records.get(key)
    }
    if len(sizes) != 1:
        raise MalformedTar("a sparse file has no size, or two")
    return sizes.pop()


def map_in_data(records: PaxRecords) -> bool:
    """Whether the map comes before the data (format 1.0) or is in the records (0.0 and 0.1)."""
    version = records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"")
    if version[0] == b"0" and version[1] in (b"", b"0", b"1"):
        return False
    if version == (b"1", b"0"):
        return True
    raise MalformedTar("a sparse file has an unknown format version")


def recorded_segments(records: PaxRecords) -> list[tuple[int, int]]:
    """The map of formats 0.0 and 0.1."""
    text = records.get(b"GNU.sparse.map")
    if text is not None and records.pairs:
        raise MalformedTar("a sparse file has two maps")
    values = (text.split(b",", 2 * MAX_SEGMENTS + 1) if text else []) if text is not None else records.pairs
    if len(values) % 2 or len(values) > 2 * MAX_SEGMENTS:
        raise MalformedTar("the sparse map has an odd number of values, or too many")
    numbers = [decimal(value, "sparse map value") for value in values]
    count = records.get(b"GNU.sparse.numblocks")
    if count and decimal(count, "number of sparse segments") * 2 != len(numbers):
        raise MalformedTar("the sparse map has another number of segments than it says")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class SparseMapReader:
    """Reads the map of format 1.0, block by block: the number of segments, then offset and length of each."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []
        self._text = bytearray()
        self._lines: int | None = None
        self._newlines = 0

    def feed(self, block: bytes) -> bool:
        """Take one block; whether it was the last one. Then ``pairs`` is complete."""
        self._text += block
        self._newlines += block.count(b"\n")
        if self._lines is None:
            first, newline, _rest = self._text.partition(b"\n")
            count = decimal(bytes(first), "number of sparse segments") if newline else MAX_SEGMENTS + 1
            if count > MAX_SEGMENTS:
                raise MalformedTar("the sparse map has no count, or too many segments")
            self._lines = 1 + 2 * count
        if self._newlines < self._lines:
            if len(self._text) > _MAX_MAP_LINE * self._lines + BLOCK:
                raise MalformedTar("the sparse map does not end")
            return False
        numbers = [
            decimal(line, "sparse map value") for line in bytes(self._text).split(b"\n", self._lines)[1:-1]
        ]
        self.pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        return True


def old_segments(block: bytes, *, first: bool) -> tuple[list[tuple[int, int]], bool]:
    """Segments in one header of the old format, and whether another header continues them."""
    at, count, flag = _FIRST if first else _CONTINUED
    pairs = []
    for start in range(at, at + 24 * count, 24):
        # An unused slot is empty; a file that ends in a hole has a used one of length 0.
        if block[start] == 0:
            break
        pairs.append((number(block[start : start + 12]), number(block[start + 12 : start + 24])))
    return pairs, block[flag] != 0


def old_real_size(block: bytes) -> int:
    """Size of the whole file in the first header of the old format."""
    return number(block[_REAL_SIZE])
