"""``/etc/ld.so.cache``: which file the dynamic linker takes for the name of a library.

Source: glibc, ``sysdeps/generic/dl-cache.h`` and ``elf/dl-cache.c``: the format that is called new there,
alone or after a table of the old one, which nothing since glibc 2.32 writes. Bounds are checked before
anything is made.
"""

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

from veneer.prefetch.static.files import Malformed

__all__ = ["MAX_CACHE_SIZE", "LdCache", "parse_ldcache"]

#: A desktop with 6,000 libraries has 200 KB.
MAX_CACHE_SIZE: Final = 8 << 20
_OLD: Final = b"ld.so-1.7.0"
_OLD_HEADER: Final = struct.Struct("<12xI")
_OLD_ENTRY: Final = 12
_NEW: Final = b"glibc-ld.so.cache1.1"
_HEADER: Final = 48
_ENTRY: Final = 24
_EXTENSION: Final = 0xEAA42174
_TAG_HWCAPS: Final = 1
_MOST_NAME: Final = 4096
_MOST_ENTRIES: Final = 200_000
_MOST_HWCAPS: Final = 4096
#: In the upper half of the hwcap field: the lower half is an index into the table of subdirectories.
_IS_HWCAPS: Final = 1 << 30
#: What an entry is in the lowest byte of its flags: a library of glibc 2 or later, or of any.
_LIBC6: Final = 3


class _Entry(NamedTuple):
    path: bytes
    level: bytes


class LdCache:
    """The table of names.

    Args:
        entries: by name, in the order of the cache: the best comes first.
    """

    def __init__(self, entries: dict[bytes, list[_Entry]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def find(self, name: bytes, levels: Sequence[bytes]) -> list[bytes]:
        """The files that a library may be, the one that is tried first in front.

        Args:
            name: of the library.
            levels: subdirectories of glibc-hwcaps for which the processor is good enough, the best first.
        """
        found = self._entries.get(name, ())
        order = {level: number for number, level in enumerate(levels)}
        special = [entry for entry in found if entry.level in order]
        special.sort(key=lambda entry: order[entry.level])
        return [entry.path for entry in (*special, *(entry for entry in found if not entry.level))]


def parse_ldcache(data: bytes) -> LdCache:
    """The cache that ``data`` is. Raises Malformed."""
    if len(data) > MAX_CACHE_SIZE:
        raise Malformed("ld.so.cache is too large")
    if data.startswith(_OLD):
        if len(data) < _OLD_HEADER.size + 4:
            raise Malformed("ld.so.cache ends too early")
        (count,) = struct.unpack_from("<I", data, 12)
        end = 16 + count * _OLD_ENTRY
        data = data[-(-end // 8) * 8 :]
    if not data.startswith(_NEW) or len(data) < _HEADER:
        raise Malformed("ld.so.cache is of an unknown format")
    order = ">" if data[28] & 3 == 3 else "<"
    count, strings, extension = struct.unpack_from(order + "II4xI", data, 20)
    if count > _MOST_ENTRIES or _HEADER + count * _ENTRY + strings > len(data):
        raise Malformed(f"ld.so.cache of {len(data)} bytes cannot have {count} entries")
    levels = _levels(data, extension, order)
    entries: defaultdict[bytes, list[_Entry]] = defaultdict(list)
    for number in range(count):
        flags, key, value, _, hwcap = struct.unpack_from(order + "iIIIQ", data, _HEADER + number * _ENTRY)
        if flags & 0xFF != _LIBC6:
            continue
        level = b""
        if hwcap >> 32 & _IS_HWCAPS:
            at = hwcap & 0xFFFFFFFF
            if at >= len(levels):
                raise Malformed("ld.so.cache names a level that it does not have")
            level = levels[at]
        elif hwcap:
            # What glibc before 2.37 made of processors and platforms; distributions ship nothing there.
            continue
        entries[_string(data, key)].append(_Entry(_string(data, value), level))
    return LdCache(dict(entries))


def _levels(data: bytes, offset: int, order: str) -> list[bytes]:
    """The names of subdirectories of glibc-hwcaps."""
    if not offset:
        return []
    if offset + 8 > len(data):
        raise Malformed("ld.so.cache ends too early")
    magic, count = struct.unpack_from(order + "II", data, offset)
    if magic != _EXTENSION or count > 64 or offset + 8 + 16 * count > len(data):
        raise Malformed("ld.so.cache has an extension that it does not have")
    for number in range(count):
        tag, _, start, size = struct.unpack_from(order + "IIII", data, offset + 8 + 16 * number)
        if tag == _TAG_HWCAPS:
            if size // 4 > _MOST_HWCAPS or start + size > len(data):
                raise Malformed("ld.so.cache has too many levels")
            return [_string(data, at) for at in struct.unpack_from(f"{order}{size // 4}I", data, start)]
    return []


def _string(data: bytes, at: int) -> bytes:
    end = data.find(b"\0", at, at + _MOST_NAME)
    if at >= len(data) or end < 0:
        raise Malformed("ld.so.cache has a name without an end")
    return data[at:end]
