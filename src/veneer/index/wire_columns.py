"""Columns of integers as bytes, and sections as msgpack arrays of columns: the alphabet of the index format.

A value has exactly one encoding, and the decoders here accept no other. An integer column is stored as byte
planes (all lowest bytes, then all second bytes, and so on) because equal high bytes then lie next to each
other, which compresses better than variable-length integers and takes no Python code per item.

Decoders take the number of items from the caller, who has bounded it, and allocate nothing before they have
compared it with the bytes at hand. Non-goals: knowing what any column means.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from operator import add
from typing import Final

import msgpack

from veneer.errors import IntegrityError
from veneer.index.columns import picked

__all__ = [
    "Fields",
    "ascending",
    "ascending_column",
    "join",
    "pack",
    "signed",
    "signed_column",
    "split",
    "spread",
    "unsigned",
    "unsigned_column",
]

#: Longest msgpack array in a section: the fields of a section, the codecs of a span table. msgpack makes room
#: for as many items as an array announces before it has seen them, so this bounds that room.
MAX_ITEMS: Final = 64
#: Bytes of the widest integer.
_WIDEST: Final = 8
#: Top byte of a two's complement number -> the byte that all planes above it hold.
_SIGN: Final = bytes(128) + b"\xff" * 128


class Fields:
    """The fields of one section, taken in order and by type; anything unexpected is an IntegrityError."""

    def __init__(self, data: bytes, count: int, what: str) -> None:
        self.what = what
        self._fields = iter(_unpack(data, count, what))

    def blob(self) -> bytes:
        """The next field, a byte string."""
        value = next(self._fields)
        if not isinstance(value, bytes):
            raise IntegrityError(f"{self.what}: a field is not a byte string")
        return value

    def text(self) -> str:
        """The next field, a text string."""
        value = next(self._fields)
        if not isinstance(value, str):
            raise IntegrityError(f"{self.what}: a field is not a text string")
        return value

    def number(self, limit: int) -> int:
        """The next field, an integer from 0 to ``limit``."""
        value = next(self._fields)
        if type(value) is not int or not 0 <= value <= limit:
            raise IntegrityError(f"{self.what}: a field is not an integer from 0 to {limit}")
        return value

    def unsigned(self, count: int) -> "array[int]":
        """The next field, a column of ``count`` integers from 0."""
        return unsigned(self.blob(), count, self.what)

    def signed(self, count: int) -> "array[int]":
        """The next field, a column of ``count`` integers."""
        return signed(self.blob(), count, self.what)

    def ascending(self, limit: int) -> list[int]:
        """The next two fields, a count and a column of as many ascending integers below ``limit``."""
        count = self.number(limit)
        return ascending(self.blob(), count, limit, self.what)

    def strings(self, count: int) -> list[bytes]:
        """The next field, ``count`` non-empty strings without NUL."""
        return split(self.blob(), count, self.what)

    def items(self) -> list[object]:
        """The next field, an array of other fields."""
        value = next(self._fields)
        if not isinstance(value, list):
            raise IntegrityError(f"{self.what}: a field is not an array")
        return value


def pack(fields: Sequence[object]) -> bytes:
    """The section with these fields."""
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def _unpack(data: bytes, count: int, what: str) -> list[object]:
    try:
        fields = msgpack.unpackb(data, max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0)
    except ValueError as error:
        raise IntegrityError(f"{what}: invalid msgpack: {error}") from error
    if not isinstance(fields, list) or len(fields) != count:
        raise IntegrityError(f"{what}: not an array of {count} fields")
    # The fields are few and large, so this compares at the speed of memory: no other spelling gets past it.
    if pack(fields) != data:
        raise IntegrityError(f"{what}: msgpack is not in its shortest form")
    return fields


def _planes(values: Iterable[int]) -> list[bytes]:
    raw = _raw(array("q", values))
    return [raw[plane::_WIDEST] for plane in range(_WIDEST)]


def _raw(column: "array[int]") -> bytes:
    """The numbers of an array of type ``q`` as little-endian bytes."""
    if sys.byteorder == "big":
        column = array("q", column)
        column.byteswap()
    return column.tobytes()


def _from_raw(raw: bytearray) -> "array[int]":
    column = array("q")
    column.frombytes(raw)
    if sys.byteorder == "big":
        column.byteswap()
    return column


def unsigned_column(values: Iterable[int]) -> bytes:
    """The column of integers from 0 to 2^63 - 1: as many planes as the largest needs, none if all are 0."""
    planes = _planes(values)
    if max(planes[-1], default=0) > 0x7F:
        raise ValueError("a negative number in an unsigned column")
    while planes and not any(planes[-1]):
        planes.pop()
    return b"".join(planes)


def signed_column(values: Iterable[int]) -> bytes:
    """The column of 64-bit integers in two's complement: as few planes as hold all, none if all are 0."""
    planes = _planes(values)
    while len(planes) > 1 and planes[-1] == planes[-2].translate(_SIGN):
        planes.pop()
    return b"".join(planes) if any(map(any, planes)) else b""


def unsigned(data: bytes, count: int, what: str) -> "array[int]":
    """The ``count`` integers of an unsigned column, as an array of type ``q``."""
    width = _width(data, count, what)
    if width:
        top = data[-count:]
        if top.count(0) == count:
            raise IntegrityError(f"{what}: a column is wider than its numbers")
        if width == _WIDEST and max(top) > 0x7F:
            raise IntegrityError(f"{what}: a number in a column exceeds 63 bits")
    return _column(data, count, width, b"")


def signed(data: bytes, count: int, what: str) -> "array[int]":
    """The ``count`` integers of a signed column, as an array of type ``q``."""
    width = _width(data, count, what)
    if not width:
        return _column(data, count, width, b"")
    top = data[-count:]
    implied = data[-2 * count : -count].translate(_SIGN) if width > 1 else bytes(count)
    if top == implied:
        raise IntegrityError(f"{what}: a column is wider than its numbers")
    return _column(data, count, width, top.translate(_SIGN))


def _width(data: bytes, count: int, what: str) -> int:
    """Planes of a column of ``count`` numbers."""
    if not data:
        return 0
    width, rest = divmod(len(data), count) if count else (0, 1)
    if rest or width > _WIDEST:
        raise IntegrityError(f"{what}: a column of {len(data)} bytes cannot hold {count} numbers")
    return width


def _column(data: bytes, count: int, width: int, filling: bytes) -> "array[int]":
    """Planes side by side again; ``filling`` is every plane above ``width`` (empty for zeros)."""
    raw = bytearray(_WIDEST * count)
    for plane in range(width):
        raw[plane::_WIDEST] = data[plane * count : (plane + 1) * count]
    if filling.strip(b"\0"):
        for plane in range(width, _WIDEST):
            raw[plane::_WIDEST] = filling
    return _from_raw(raw)


def spread(table: "array[int]", numbers: "array[int]") -> "array[int]":
    """``table[number]`` for each of ``numbers``, all of which are in the table."""
    if len(table) > 256:
        return array("q", picked(table.tolist(), numbers))
    # Few distinct values is the usual case; then every plane of the result is a translation of bytes.
    low = _raw(numbers)[::_WIDEST]
    table_planes = _planes(table)
    raw = bytearray(_WIDEST * len(numbers))
    for plane, values in enumerate(table_planes):
        if any(values):
            raw[plane::_WIDEST] = low.translate(values.ljust(256, b"\0"))
    return _from_raw(raw)


def ascending_column(values: Sequence[int]) -> tuple[int, bytes]:
    """The number of strictly ascending integers from 0, and the column of how many are skipped before each."""
    return len(values), unsigned_column(b - a - 1 for a, b in zip((-1, *values), values, strict=False))


def ascending(data: bytes, count: int, limit: int, what: str) -> list[int]:
    """The ``count`` strictly ascending integers below ``limit``."""
    values = list(accumulate(map(add, unsigned(data, count, what), repeat(1)), initial=-1))[1:]
    if values and values[-1] >= limit:
        raise IntegrityError(f"{what}: {values[-1]} is not below {limit}")
    return values


def join(items: Iterable[bytes]) -> bytes:
    """Non-empty strings without NUL as one string."""
    return b"\0".join(items)


def split(data: bytes, count: int, what: str) -> list[bytes]:
    """The ``count`` strings that :func:`join` put together."""
    items = data.split(b"\0") if data else []
    if len(items) != count or b"" in items:
        raise IntegrityError(f"{what}: expected {count} strings, none of them empty")
    return items
