"""PAX extended headers: records to facts about one entry.

Known records are path, linkpath, size, uid, gid, mtime, the extended attributes of star (``SCHILY.xattr.NAME``)
and libarchive (``LIBARCHIVE.xattr.NAME``), star's device numbers and GNU's sparse files; all others change
nothing. Values are taken as bytes, so ``hdrcharset`` says nothing that matters here. Pure functions of bounded
input.
"""

import binascii
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

from veneer.index.tar_header import MalformedTar

__all__ = ["PaxRecords", "decimal", "global_records", "parse_records", "time_ns", "xattrs_of"]

#: XATTR_NAME_MAX, XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 1 << 16
MAX_XATTR_LIST: Final = 1 << 16

#: Records that can mean something for all entries of an archive; other facts belong to one entry.
_GLOBAL_KEYS: Final = frozenset({b"uid", b"gid", b"mtime"})
_SINGLE_KEYS: Final = frozenset({b"path", b"linkpath", b"size"})
#: Records whose value is a path or a number, which cannot hold a NUL; Go's reader refuses them too.
_TEXT_KEYS: Final = _GLOBAL_KEYS | _SINGLE_KEYS | {b"GNU.sparse.name"}

_SCHILY: Final = b"SCHILY.xattr."
_LIBARCHIVE: Final = b"LIBARCHIVE.xattr."
_SPARSE: Final = b"GNU.sparse."
#: Format 0.0 repeats these two for each segment; every other record counts once, and the last one wins.
_REPEATED: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")

_RECORD: Final = re.compile(rb"([1-9][0-9]{0,7}) ([^=\0]+)=")
_DECIMAL: Final = re.compile(rb"[0-9]{1,20}")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class PaxRecords(dict[bytes, bytes]):
    """The records of one extended header, last one wins.

    Attributes:
        sparse: whether any of them is about a sparse file.
        xattrs: whether any of them is an extended attribute.
        pairs: values of the repeated records of sparse format 0.0, in order: offset, length, offset, length.
    """

    __slots__ = ("pairs", "sparse", "xattrs")

    def __init__(self) -> None:
        self.sparse = self.xattrs = False
        self.pairs: list[bytes] = []


def parse_records(body: bytes) -> PaxRecords:
    """The records of a header of type x or g: ``LENGTH KEY=VALUE NEWLINE`` each."""
    records = PaxRecords()
    at, end = 0, len(body)
    while at < end:
        match = _RECORD.match(body, at)
        if match is None:
            raise MalformedTar(f"the extended header has no record at its byte {at}")
        length, key = match.groups()
        stop = at + int(length)
        start = match.end()
        if stop > end or stop <= start or body[stop - 1] != 0x0A:
            raise MalformedTar(f"the extended header's record {key[:64]!r} has a wrong length")
        value = body[start : stop - 1]
        if key in _TEXT_KEYS and b"\0" in value:
            raise MalformedTar(f"the extended header's {key.decode()} has a NUL")
        if key.startswith(_SPARSE):
            records.sparse = True
            if key in _REPEATED:
                if key != _REPEATED[len(records.pairs) % 2]:
                    raise MalformedTar("the sparse map is out of order")
                records.pairs.append(value)
        elif key.startswith((_SCHILY, _LIBARCHIVE)):
            records.xattrs = True
        records[key] = value
        at = stop
    return records


def global_records(records: PaxRecords) -> dict[bytes, bytes]:
    """What a global header says about the entries that follow it."""
    if records.sparse or records.xattrs or not _SINGLE_KEYS.isdisjoint(records):
        raise MalformedTar("a global header says what can only be true of one entry")
    return {key: records[key] for key in _GLOBAL_KEYS & records.keys()}


def decimal(value: bytes, what: str) -> int:
    """A number that is not negative, in decimal."""
    if not _DECIMAL.fullmatch(value):
        raise MalformedTar(f"{what} {value[:64]!r} is not a number")
    return int(value)


def time_ns(value: bytes) -> int:
    """Seconds with a fraction as exact nanoseconds; digits beyond the ninth are cut off."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise MalformedTar(f"mtime {value[:64]!r} is not a time")
    sign, seconds, fraction = match.groups()
    total = int(seconds) * 1_000_000_000
    if fraction:
        total += int(fraction[:9].ljust(9, b"0"))
    return -total if sign else total


def xattrs_of(records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The extended attributes among ``records``.

    bsdtar writes each attribute in both spellings. Star's wins, its name taken literally, because that is what
    containerd reads; libarchive's, percent-encoded, counts where it is alone.
    """
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            encoded = key[len(_LIBARCHIVE) :]
            name = unquote_to_bytes(encoded)
            if _SCHILY + name not in records and _SCHILY + encoded not in records:
                found[name] = _base64(value)
    for name, value in found.items():
        if not 0 < len(name) <= MAX_XATTR_NAME or b"\0" in name:
            raise MalformedTar(f"the extended attribute name {name[:64]!r} is not possible")
        if len(value) > MAX_XATTR_VALUE:
            raise MalformedTar(f"the extended attribute {name!r} has {len(value)} bytes")
    if found and sum(map(len, found)) + len(found) > MAX_XATTR_LIST:
        raise MalformedTar("the extended attributes have too many names")
    return found


def _base64(value: bytes) -> bytes:
    bare = value.rstrip(b"=")  # libarchive leaves the padding away
    try:
        return binascii.a2b_base64(bare + b"=" * (-len(bare) % 4), strict_mode=True)
    except binascii.Error as error:
        raise MalformedTar("an extended attribute is not base64") from error
