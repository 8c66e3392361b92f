"""The rare facts of the tree section: links, devices, extended attributes, holes, opaque directories.

Most rows have none of them, so each fact is stored for the rows that have it. Which rows those are is stored
only where the kind of the row does not say so already. See docs/reference/index-format.md, "Tree section".
"""

import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Final

from veneer.errors import IntegrityError
from veneer.index.model import IMPLICIT_DIR, LINK, OVERLAY_XATTRS, WHITEOUT, LayerTree, Xattrs
from veneer.index.wire_columns import (
    Fields,
    ascending_column,
    join,
    signed_column,
    split,
    unsigned,
    unsigned_column,
)

__all__ = ["FACT_FIELDS", "KINDS", "MAX_NAME", "Facts", "Segments", "decode_facts", "encode_facts", "rows_of"]

#: NAME_MAX and PATH_MAX (less its NUL) of Linux: longer ones could never be looked up.
MAX_NAME: Final = 255
MAX_PATH: Final = 4095
#: XATTR_NAME_MAX, XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 65536
MAX_XATTR_LIST: Final = 65536
#: dev_t of Linux: 12 bits of major and 20 bits of minor number.
MAX_MAJOR: Final = (1 << 12) - 1
MAX_MINOR: Final = (1 << 20) - 1

#: Type bits of a mode -> the kind of its row, a byte. Types that are not here do not exist.
KINDS: Final = {
    kind: number
    for number, kind in enumerate(
        (
            stat.S_IFREG,
            stat.S_IFDIR,
            IMPLICIT_DIR,
            stat.S_IFLNK,
            LINK,
            WHITEOUT,
            stat.S_IFCHR,
            stat.S_IFBLK,
            stat.S_IFIFO,
        )
    )
}
#: Kinds that another name can lead to.
_INODES: Final = frozenset(
    KINDS[kind] for kind in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)
)

Segments = tuple[tuple[int, int], ...]


def rows_of(kinds: bytes, *types: int) -> list[int]:
    """Rows whose type bits are one of ``types``, ascending; ``kinds`` has one byte a row."""
    wanted = {KINDS[kind] for kind in types}
    selected = kinds.translate(bytes(number in wanted for number in range(256)))
    rows, row = [], selected.find(1)
    while row >= 0:
        rows.append(row)
        row = selected.find(1, row + 1)
    return rows


@dataclass(frozen=True, slots=True)
class Facts:
    """The columns of a :class:`LayerTree` that are dicts by row."""

    targets: dict[int, bytes]
    links: dict[int, int]
    far_links: dict[int, bytes]
    rdevs: dict[int, tuple[int, int]]
    xattrs: dict[int, Xattrs]
    segments: dict[int, Segments]
    opaque: frozenset[int]


#: Number of fields that :func:`encode_facts` makes.
FACT_FIELDS: Final = 21


def encode_facts(tree: LayerTree) -> list[bytes | int]:
    """The fields of all rare facts."""
    link_rows = sorted(tree.links.keys() | tree.far_links.keys())
    far = [number for number, row in enumerate(link_rows) if row in tree.far_links]
    devices = sorted(tree.rdevs.items())
    return [
        join(target for _, target in sorted(tree.targets.items())),
        *ascending_column(far),
        join(tree.far_links[link_rows[number]] for number in far),
        signed_column(target - row for row, target in sorted(tree.links.items())),
        unsigned_column(major for _, (major, _) in devices),
        unsigned_column(minor for _, (_, minor) in devices),
        *_encode_xattrs(tree.xattrs),
        *_encode_segments(tree.segments),
        *ascending_column(sorted(tree.opaque)),
    ]


def decode_facts(fields: Fields, kinds: bytes, size: Sequence[int]) -> Facts:
    """The rare facts of rows of these kinds and sizes."""
    what = fields.what
    symlinks = rows_of(kinds, stat.S_IFLNK)
    targets = fields.strings(len(symlinks))
    if targets and max(map(len, targets)) > MAX_PATH:
        raise IntegrityError(f"{what}: a symbolic link is longer than {MAX_PATH} bytes")
    links, far_links = _decode_links(fields, kinds)
    facts = Facts(
        targets=dict(zip(symlinks, targets, strict=True)),
        links=links,
        far_links=far_links,
        rdevs=_decode_devices(fields, kinds),
        xattrs=_decode_xattrs(fields, kinds),
        segments=_decode_segments(fields, kinds, size),
        opaque=frozenset(fields.ascending(len(kinds))),
    )
    if facts.opaque and not facts.opaque.issubset(rows_of(kinds, stat.S_IFDIR, IMPLICIT_DIR)):
        raise IntegrityError(f"{what}: something other than a directory is opaque")
    return facts


def _decode_links(fields: Fields, kinds: bytes) -> tuple[dict[int, int], dict[int, bytes]]:
    what = fields.what
    rows = rows_of(kinds, LINK)
    far_rows = [rows[number] for number in fields.ascending(len(rows))]
    far_links = dict(zip(far_rows, fields.strings(len(far_rows)), strict=True))
    for path in far_links.values():
        _check_path(path, what)
    near = [row for row in rows if row not in far_links] if far_links else rows
    links = {row: row + delta for row, delta in zip(near, fields.signed(len(near)), strict=True)}
    for target in links.values():
        if not 0 <= target < len(kinds) or kinds[target] not in _INODES:
            raise IntegrityError(f"{what}: a hard link leads to row {target}, which cannot have another name")
    return links, far_links


def _check_path(path: bytes, what: str) -> None:
    names = path.split(b"/")
    if len(path) > MAX_PATH or max(map(len, names)) > MAX_NAME or not {b"", b".", b".."}.isdisjoint(names):
        raise IntegrityError(f"{what}: a hard link leads to the impossible path {path[:200]!r}")


def _decode_devices(fields: Fields, kinds: bytes) -> dict[int, tuple[int, int]]:
    rows = rows_of(kinds, stat.S_IFCHR, stat.S_IFBLK)
    majors, minors = fields.unsigned(len(rows)), fields.unsigned(len(rows))
    if rows and (max(majors) > MAX_MAJOR or max(minors) > MAX_MINOR):
        raise IntegrityError(f"{fields.what}: a device number is beyond what Linux has")
    rdevs = dict(zip(rows, zip(majors, minors, strict=True), strict=True))
    if any(rdev == (0, 0) and kinds[row] == KINDS[stat.S_IFCHR] for row, rdev in rdevs.items()):
        raise IntegrityError(f"{fields.what}: a character device 0:0 would read as a whiteout")
    return rdevs


def _encode_xattrs(xattrs: Mapping[int, Xattrs]) -> list[bytes | int]:
    """Rows, each row's set of attributes by number; the sets, in order of first use, end to end."""
    rows = sorted(xattrs)
    sets = {attributes: number for number, attributes in enumerate(dict.fromkeys(xattrs[row] for row in rows))}
    pairs = [pair for attributes in sets for pair in attributes]
    return [
        *ascending_column(rows),
        unsigned_column(sets[xattrs[row]] for row in rows),
        unsigned_column(map(len, sets)),
        join(name for name, _ in pairs),
        unsigned_column(len(value) for _, value in pairs),
        b"".join(value for _, value in pairs),
    ]


def _decode_xattrs(fields: Fields, kinds: bytes) -> dict[int, Xattrs]:
    what = fields.what
    rows = fields.ascending(len(kinds))
    if any(kinds[row] in (KINDS[LINK], KINDS[WHITEOUT]) for row in rows):
        raise IntegrityError(f"{what}: a hard link or whiteout has attributes of its own")
    set_of = fields.unsigned(len(rows))
    set_count = len(used := list(dict.fromkeys(set_of)))
    if used != list(range(set_count)):
        raise IntegrityError(f"{what}: extended attributes are not in order of first use")
    pair_counts = fields.unsigned(set_count)
    names_blob = fields.blob()
    # Every name takes a byte at least, so this bounds the number of pairs before anything is made of them.
    if set_count and (min(pair_counts) < 1 or sum(pair_counts) > len(names_blob)):
        raise IntegrityError(f"{what}: a set of extended attributes has too few or too many of them")
    pair_count = sum(pair_counts)
    names = split(names_blob, pair_count, what)
    lengths = fields.unsigned(pair_count)
    blob = fields.blob()
    if names and (max(map(len, names)) > MAX_XATTR_NAME or max(lengths) > MAX_XATTR_VALUE):
        raise IntegrityError(f"{what}: an extended attribute is longer than Linux allows")
    if sum(lengths) != len(blob):
        raise IntegrityError(f"{what}: values of extended attributes do not add up")
    ends = accumulate(lengths)
    pairs = ((name, blob[end - length : end]) for name, length, end in zip(names, lengths, ends, strict=True))
    sets = [tuple(islice(pairs, count)) for count in pair_counts]
    for attributes in sets:
        keys = [name for name, _ in attributes]
        if keys != sorted(set(keys)) or sum(map(len, keys)) + len(keys) > MAX_XATTR_LIST:
            raise IntegrityError(f"{what}: extended attributes are not sorted, or have too many names")
        if any(key.startswith(OVERLAY_XATTRS) for key in keys):
            raise IntegrityError(f"{what}: an extended attribute would tell overlayfs what to show")
    if len(set(sets)) != set_count:
        raise IntegrityError(f"{what}: a set of extended attributes is there twice")
    return dict(zip(rows, map(sets.__getitem__, set_of), strict=True))


def _encode_segments(segments: Mapping[int, Segments]) -> list[bytes | int]:
    """Rows, each row's number of segments; of each segment the hole before it and its length."""
    rows = sorted(segments)
    return [
        *ascending_column(rows),
        unsigned_column(len(segments[row]) for row in rows),
        unsigned_column(
            start - before
            for row in rows
            for before, (start, _) in zip(_ends(segments[row]), segments[row], strict=False)
        ),
        unsigned_column(length for row in rows for _, length in segments[row]),
    ]


def _ends(segments: Segments) -> Iterable[int]:
    """Where each segment's hole begins: at 0, then at the end of the segment before."""
    yield 0
    for start, length in segments:
        yield start + length


def _decode_segments(fields: Fields, kinds: bytes, size: Sequence[int]) -> dict[int, Segments]:
    what = fields.what
    rows = fields.ascending(len(kinds))
    if any(kinds[row] != KINDS[stat.S_IFREG] for row in rows):
        raise IntegrityError(f"{what}: something other than a regular file is sparse")
    counts = fields.unsigned(len(rows))
    holes_blob, lengths_blob = fields.blob(), fields.blob()
    # No length is 0, so the column has a byte for each at least.
    total = sum(counts)
    if total > len(lengths_blob):
        raise IntegrityError(f"{what}: more sparse segments than there is room for")
    lengths = unsigned(lengths_blob, total, what)
    holes = unsigned(holes_blob, total, what)
    if total and min(lengths) < 1:
        raise IntegrityError(f"{what}: a sparse segment is empty")
    runs = zip(holes, lengths, strict=True)
    segments = {}
    for row, count in zip(rows, counts, strict=True):
        end = 0
        out: list[tuple[int, int]] = []
        for hole, length in islice(runs, count):
            if out and not hole:
                raise IntegrityError(f"{what}: two sparse segments touch")
            out.append((end + hole, length))
            end += hole + length
        if end > size[row] or sum(length for _, length in out) == size[row]:
            raise IntegrityError(f"{what}: a sparse file has no hole, or data beyond its end")
        segments[row] = tuple(out)
    return segments
