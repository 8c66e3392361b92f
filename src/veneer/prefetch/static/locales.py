"""Which files a program reads for its locale: those of one directory, or parts of the archive of all locales.

Source: glibc, ``locale/findlocale.c``, ``locale/loadarchive.c`` and ``locale/locarchive.h``.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Final

from veneer.prefetch.static.files import File, ImageFiles, Malformed

__all__ = ["locale_files", "locale_name"]

_DIRECTORY: Final = b"usr/lib/locale"
_ARCHIVE: Final = b"usr/lib/locale/locale-archive"
_CATEGORIES: Final = (
    *(b"LC_CTYPE", b"LC_NUMERIC", b"LC_TIME", b"LC_COLLATE", b"LC_MONETARY", b"LC_MESSAGES/SYS_LC_MESSAGES"),
    *(b"LC_PAPER", b"LC_NAME", b"LC_ADDRESS", b"LC_TELEPHONE", b"LC_MEASUREMENT", b"LC_IDENTIFICATION"),
)
_NAME: Final = re.compile(rb"([A-Za-z_]{1,32})(?:\.([A-Za-z0-9_-]{1,32}))?(?:@[A-Za-z0-9]{1,32})?")
_GCONV: Final = b"gconv/gconv-modules.cache"
_HEADER: Final = struct.Struct("<14I")
_MAGIC: Final = 0xDE020109
_ENTRY: Final = struct.Struct("<III")
#: Refs, and offset and length of 13 categories.
_RECORD: Final = struct.Struct("<27I")
_MOST_ENTRIES: Final = 20_000


def locale_name(environment: Mapping[bytes, bytes]) -> bytes:
    """The locale that an environment asks for; "" for the one that needs no files."""
    for variable in (b"LC_ALL", b"LC_CTYPE", b"LANG"):
        if name := environment.get(variable, b""):
            return b"" if name in (b"C", b"POSIX") else name
    return b""


def locale_files(files: ImageFiles, name: bytes, *, every: bool) -> Iterator[tuple[File, int, int]]:
    """What is read for a locale: files, with the range of each.

    Args:
        files: of the image.
        name: of the locale, such as ``C.UTF-8``.
        every: all categories, rather than that of characters alone.
    """
    if (found := _NAME.fullmatch(name)) is None:
        return
    language, codeset = found[1], (found[2] or b"").lower().replace(b"-", b"").replace(b"_", b"")
    yield from _archived(files, language + (b"." + codeset if codeset else b""), every=every)
    for candidate in (name, language + b"." + codeset, language):
        directory = _DIRECTORY + b"/" + candidate
        if files.directory(directory) is None:
            continue
        for category in _CATEGORIES if every else _CATEGORIES[:1]:
            if (file := files.file(directory + b"/" + category)) is not None:
                yield file, 0, file.size
        break
    for directory in (b"usr/lib", b"usr/lib64", *_multiarch(files)):
        if (file := files.file(directory + b"/" + _GCONV)) is not None:
            yield file, 0, file.size
            return


def _multiarch(files: ImageFiles) -> Iterator[bytes]:
    for name in files.names(b"usr/lib"):
        if b"-linux-" in name:
            yield b"usr/lib/" + name


def _archived(files: ImageFiles, name: bytes, *, every: bool) -> Iterator[tuple[File, int, int]]:
    """Where the archive has a locale; nothing if there is none."""
    file = files.file(_ARCHIVE)
    if file is None:
        return
    try:
        head = _HEADER.unpack(files.read(file, 0, _HEADER.size))
        magic, _, hashed_at, _, count = head[:5]
        if magic != _MAGIC or count > _MOST_ENTRIES:
            return
        yield file, 0, 4096
        table = files.read(file, hashed_at, count * _ENTRY.size)
        for _, name_at, record_at in _ENTRY.iter_unpack(table[: len(table) // _ENTRY.size * _ENTRY.size]):
            if record_at and files.read(file, name_at, len(name) + 1) == name + b"\0":
                record = _RECORD.unpack(files.read(file, record_at, _RECORD.size))
                yield file, hashed_at, hashed_at + len(table)
                yield file, record_at, record_at + _RECORD.size
                for category in range(13) if every else range(1):
                    start, length = record[1 + 2 * category : 3 + 2 * category]
                    yield file, start, start + length
                return
    except (Malformed, struct.error):
        return
