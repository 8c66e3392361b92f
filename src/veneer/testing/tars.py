"""Writes tars that are legal but unusual, byte by byte, and the parts to make illegal ones of.

The writer shares no code with the reader and does exactly what an item asks for: a header format, a sparse
format, a spelling of the path. Content of sparse files is given by pieces, so that a file of many gigabytes
takes a few blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

__all__ = ["END", "TarItem", "header", "item_bytes", "octal", "opaque", "pax", "tar", "whiteout"]

BLOCK: Final = 512
#: What ends a tar.
END: Final = bytes(2 * BLOCK)
_POSIX: Final = b"ustar\x0000"
_GNU: Final = b"ustar  \0"
_V7: Final = bytes(8)
_TYPES: Final = {
    "file": b"0",
    "link": b"1",
    "symlink": b"2",
    "char": b"3",
    "block": b"4",
    "dir": b"5",
    "fifo": b"6",
}
_SECOND: Final = 1_000_000_000
#: Slots for segments in the first header of GNU's old sparse format, and in each that follows.
_FIRST_SLOTS: Final = 4
_MORE_SLOTS: Final = 21


@dataclass(frozen=True, slots=True)
class TarItem:
    """One entry to write.

    Args:
        path: as it shall be spelled.
        kind: file, dir, symlink, link, char, block or fifo.
        mode: permission bits.
        uid: owner.
        gid: group.
        mtime_ns: modification time; whole seconds in any form but pax.
        content: of a file that is not sparse.
        pieces: of a sparse file: (offset, bytes) of its data, ascending.
        size: of a sparse file, holes included.
        link: target of a symlink or hard link.
        rdev: (major, minor) of a device.
        xattrs: extended attributes; pax only.
        form: pax, gnu, ustar or v7. What the form cannot say is a ValueError.
        sparse: 0.0, 0.1 and 1.0 (pax) or old (gnu).
    """

    path: bytes
    kind: str = "file"
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    content: bytes = b""
    pieces: tuple[tuple[int, bytes], ...] | None = None
    size: int = 0
    link: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    form: str = "pax"
    sparse: str = "1.0"


def whiteout(path: bytes) -> TarItem:
    """The item that hides ``path``."""
    head, slash, name = path.rpartition(b"/")
    return TarItem(head + slash + b".wh." + name)


def opaque(directory: bytes) -> TarItem:
    """The item that hides everything that ``directory`` has in the layers below."""
    return TarItem(directory + b"/.wh..wh..opq" if directory else b".wh..wh..opq")


def tar(items: Iterable[TarItem]) -> bytes:
    """A whole tar."""
    return b"".join(map(item_bytes, items)) + END


def octal(value: int, width: int) -> bytes:
    """A numeric field in octal, or in GNU's base-256 if it does not fit."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    # The first bit marks the encoding; of a negative number it is set already.
    low = 8 * (width - 1)
    return bytes([value >> low & 0xFF | 0x80]) + (value & (1 << low) - 1).to_bytes(width - 1, "big")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    magic: bytes = _POSIX,
    rdev: tuple[int, int] = (0, 0),
    tail: bytes = b"",
) -> bytes:
    """One header block with a right checksum. ``tail`` is what comes from byte 345 on, the prefix first."""
    if len(name) > 100 or len(link) > 100:
        raise ValueError("a name of more than 100 bytes does not fit in a header")
    numbers = octal(mode, 8) + octal(uid, 8) + octal(gid, 8) + octal(size, 12) + octal(mtime, 12)
    device = octal(rdev[0], 8) + octal(rdev[1], 8) if magic != _V7 else bytes(16)
    front = name.ljust(100, b"\0") + numbers
    back = kind + link.ljust(100, b"\0") + magic + bytes(64) + device + tail.ljust(167, b"\0")
    checksum = sum(front) + sum(back) + 8 * 32
    return front + b"%06o\0 " % checksum + back


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(records: Iterable[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """An extended header (``x``), or a global one (``g``), with its records."""
    body = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest)
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        body += b"%d" % length + rest
    return header(b"PaxHeaders/x", kind, size=len(body)) + _padded(body)


def item_bytes(item: TarItem) -> bytes:
    """The headers and data of one item."""
    if item.form != "pax" and (item.mtime_ns % _SECOND or item.xattrs):
        raise ValueError(f"a {item.form} header has no room for fractions of seconds or extended attributes")
    return _WRITERS[item.form](item)


def _stored(item: TarItem) -> bytes:
    if item.kind != "file":
        return b""
    return item.content if item.pieces is None else b"".join(data for _, data in item.pieces)


def _map(item: TarItem) -> list[tuple[int, int]]:
    """Segments of a sparse file, with the empty one at the end that GNU tar writes for a last hole."""
    assert item.pieces is not None
    if any(
        end > start for end, start in pairwise([0, *(n for at, d in item.pieces for n in (at, at + len(d)))])
    ):
        raise ValueError("pieces overlap or are not in order")
    pairs = [(offset, len(data)) for offset, data in item.pieces]
    return pairs if pairs and sum(pairs[-1]) == item.size else [*pairs, (item.size, 0)]


def _decimal_time(ns: int) -> bytes:
    seconds, fraction = divmod(abs(ns), _SECOND)
    return b"%s%d.%09d" % (b"-" if ns < 0 else b"", seconds, fraction)


def _pax_item(item: TarItem) -> bytes:
    records: list[tuple[bytes, bytes]] = []
    stored = _stored(item)
    name, link = item.path[:100], item.link[:100]
    if not all(text.isascii() for text in (item.path, item.link)):
        records.append((b"hdrcharset", b"BINARY"))
    if item.pieces is not None:
        more, before = _pax_map(item)
        records += more
        stored = before + stored
        name = b"GNUSparseFile.0/x"
    elif len(item.path) > 100 or not item.path.isascii():
        records.append((b"path", item.path))
    if len(item.link) > 100 or not item.link.isascii():
        records.append((b"linkpath", item.link))
    numbers = {"uid": item.uid, "gid": item.gid}
    for key, value in numbers.items():
        if value >= 8**7:
            records.append((key.encode(), b"%d" % value))
            numbers[key] = 0
    if item.mtime_ns % _SECOND or not 0 <= item.mtime_ns < 8**11 * _SECOND:
        records.append((b"mtime", _decimal_time(item.mtime_ns)))
    records += [(b"SCHILY.xattr." + key, value) for key, value in item.xattrs]
    block = header(
        name,
        _TYPES[item.kind],
        size=len(stored),
        mode=item.mode,
        uid=numbers["uid"],
        gid=numbers["gid"],
        mtime=item.mtime_ns // _SECOND if 0 <= item.mtime_ns < 8**11 * _SECOND else 0,
        link=link,
        rdev=item.rdev,
    )
    return (pax(records) if records else b"") + block + _padded(stored)


def _pax_map(item: TarItem) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Records of a sparse file, and what comes before its data."""
    pairs = _map(item)
    size = b"%d" % item.size
    if item.sparse == "1.0":
        records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        records += [(b"GNU.sparse.name", item.path), (b"GNU.sparse.realsize", size)]
        lines = [len(pairs), *(number for pair in pairs for number in pair)]
        return records, _padded(b"".join(b"%d\n" % line for line in lines))
    records = [(b"GNU.sparse.size", size), (b"GNU.sparse.numblocks", b"%d" % len(pairs))]
    if item.sparse == "0.1":
        text = b",".join(b"%d,%d" % pair for pair in pairs)
        return [*records, (b"GNU.sparse.name", item.path), (b"GNU.sparse.map", text)], b""
    if item.sparse != "0.0":
        raise ValueError(f"pax has no sparse format {item.sparse}")
    for offset, length in pairs:
        records += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
    return [*records, (b"path", item.path)], b""


def _gnu_item(item: TarItem) -> bytes:
    out = b""
    for kind, text in ((b"L", item.path), (b"K", item.link)):
        if len(text) > 100:
            body = text + b"\0"
            out += header(b"././@LongLink", kind, size=len(body), magic=_GNU) + _padded(body)
    stored = _stored(item)
    kind, tail, more = _TYPES[item.kind], b"", b""
    if item.pieces is not None:
        kind = b"S"
        tail, more = _old_map(_map(item), item.size)
    block = header(
        item.path[:100],
        kind,
        size=len(stored),
        mode=item.mode,
        uid=item.uid,
        gid=item.gid,
        mtime=item.mtime_ns // _SECOND,
        link=item.link[:100],
        magic=_GNU,
        rdev=item.rdev,
        tail=tail,
    )
    return out + block + more + _padded(stored)


def _old_map(pairs: Sequence[tuple[int, int]], size: int) -> tuple[bytes, bytes]:
    """The end of the first header, and the headers that continue the map."""

    def slots(some: Sequence[tuple[int, int]], count: int) -> bytes:
        return b"".join(octal(at, 12) + octal(length, 12) for at, length in some).ljust(24 * count, b"\0")

    first, rest = pairs[:_FIRST_SLOTS], pairs[_FIRST_SLOTS:]
    tail = bytes(41) + slots(first, _FIRST_SLOTS) + (b"\1" if rest else b"\0") + octal(size, 12)
    more = b""
    while rest:
        some, rest = rest[:_MORE_SLOTS], rest[_MORE_SLOTS:]
        more += (slots(some, _MORE_SLOTS) + (b"\1" if rest else b"\0")).ljust(BLOCK, b"\0")
    return tail, more


def _octal_only(item: TarItem) -> None:
    if not (item.uid < 8**7 and item.gid < 8**7 and 0 <= item.mtime_ns < 8**11 * _SECOND):
        raise ValueError(f"a {item.form} header has no room for the owner or time")
    if item.pieces is not None:
        raise ValueError(f"{item.form} has no sparse files")


def _ustar_item(item: TarItem) -> bytes:
    _octal_only(item)
    name, prefix = item.path, b""
    if len(name) > 100:
        cut = name.find(b"/", max(1, len(name) - 101))
        prefix, name = name[:cut], name[cut + 1 :]
        if cut < 0 or len(prefix) > 155 or not name:
            raise ValueError("the path does not fit in a ustar header")
    stored = _stored(item)
    block = header(
        name,
        _TYPES[item.kind],
        size=len(stored),
        mode=item.mode,
        uid=item.uid,
        gid=item.gid,
        mtime=item.mtime_ns // _SECOND,
        link=item.link,
        rdev=item.rdev,
        tail=prefix,
    )
    return block + _padded(stored)


def _v7_item(item: TarItem) -> bytes:
    _octal_only(item)
    if item.kind not in ("file", "dir", "link", "symlink"):
        raise ValueError("v7 knows files, directories and links only")
    path, kind = item.path, {"file": b"\0", "dir": b"\0"}.get(item.kind, _TYPES[item.kind])
    if item.kind == "dir" and not path.endswith(b"/"):
        path += b"/"
    stored = _stored(item)
    block = header(
        path,
        kind,
        size=len(stored),
        mode=item.mode,
        uid=item.uid,
        gid=item.gid,
        mtime=item.mtime_ns // _SECOND,
        link=item.link,
        magic=_V7,
    )
    return block + _padded(stored)


_WRITERS: Final[dict[str, Callable[[TarItem], bytes]]] = {
    "pax": _pax_item,
    "gnu": _gnu_item,
    "ustar": _ustar_item,
    "v7": _v7_item,
}
