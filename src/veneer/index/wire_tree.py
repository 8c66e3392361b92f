"""The tree section of the index format: a :class:`LayerTree` as columns, and back.

The decoder is the specification in code: it accepts exactly what the encoder writes, and the encoder passes
what it has written through the decoder. It works on whole columns at the speed of C and looks at single rows
only where a fact is rare. The layout is specified in docs/reference/index-format.md, "Tree section".
"""

import stat
from array import array
from collections.abc import Iterable
from itertools import accumulate, chain, compress
from operator import add, ge
from typing import Final, TypeVar

from veneer.errors import IntegrityError
from veneer.index.columns import LIMIT, column, exceeds, filled, lanes, repeated
from veneer.index.model import IMPLICIT_DIR, LINK, WHITEOUT, LayerTree
from veneer.index.wire_columns import Fields, pack, signed_column, spread, unsigned_column
from veneer.index.wire_facts import FACT_FIELDS, KINDS, MAX_NAME, Segments, decode_facts, encode_facts, rows_of
from veneer.index.wire_spans import MAX_DEVICE_SIZE

__all__ = ["MAX_DEPTH", "MAX_ROWS", "decode_tree", "encode_tree"]

#: A row of 2 stored bytes takes about 150 bytes of memory, so rows are bounded apart from bytes.
MAX_ROWS: Final = 1 << 22
#: Directories below each other: PATH_MAX leaves no room for more names of one byte.
MAX_DEPTH: Final = 2048
MAX_ID: Final = (1 << 32) - 1

_WHAT: Final = "tree section"
_FIELDS: Final = 11 + FACT_FIELDS
#: Devices are addressed in blocks of 512 bytes, and so are the headers and data of a tar.
_BLOCK_SHIFT: Final = 9
_BLOCK: Final = 1 << _BLOCK_SHIFT
_NS: Final = 1_000_000_000
_FIRST_TIME: Final = -(1 << 63)
_LAST_TIME: Final = (1 << 63) - 1
_MAX_MODE: Final = 0o177777
#: Kind of a row -> 1 unless it is a regular file.
_NOT_REGULAR: Final = bytes(number != KINDS[stat.S_IFREG] for number in range(256))
#: No component of a path.
_IMPOSSIBLE: Final = frozenset((b"", b".", b".."))
#: All bits of a number in a column.
_MASK: Final = (1 << 64) - 1

_Row = TypeVar("_Row")


def encode_tree(tree: LayerTree, device_size: int = MAX_DEVICE_SIZE) -> bytes:
    """The plain section of a tree whose data are in a device of ``device_size`` bytes.

    Raises IntegrityError when the tree is not well formed, or says something that the format cannot.
    """
    try:
        data = pack(_encode(tree))
    except (OverflowError, ValueError, LookupError) as error:
        raise IntegrityError(f"{_WHAT}: the tree is not well formed: {error}") from error
    written = decode_tree(data, device_size)
    for name in LayerTree.__slots__:
        if getattr(written, name) != getattr(tree, name):
            raise IntegrityError(f"{_WHAT}: column {name!r} of the tree says what the format cannot")
    return data


def _encode(tree: LayerTree) -> list[bytes | int]:
    attributes = list(zip(tree.mode, tree.uid, tree.gid, strict=True))
    attribute_table, attribute_of = _table(attributes)
    time_table, time_of = _table(tree.mtime_ns)
    directories = {
        value for value, _, _ in attribute_table if stat.S_IFMT(value) in (stat.S_IFDIR, IMPLICIT_DIR)
    }
    stored = _stored(tree.size, tree.segments)
    return [
        b"/".join(tree.names[1:]),
        unsigned_column(attribute_of),
        *(unsigned_column(column) for column in zip(*attribute_table, strict=True)),
        unsigned_column(time_of),
        signed_column(time // _NS for time in time_table),
        unsigned_column(time % _NS for time in time_table),
        unsigned_column(compress(tree.child_count, map(directories.__contains__, tree.mode))),
        unsigned_column(tree.size),
        *encode_facts(tree),
        signed_column(_skips(tree.data, stored)),
    ]


def _table(values: Iterable[_Row]) -> tuple[list[_Row], list[int]]:
    """The distinct values in order of first use, and the number of each value among them."""
    rows = list(values)
    table = {value: number for number, value in enumerate(dict.fromkeys(rows))}
    return list(table), [table[value] for value in rows]


def _stored(size: "array[int]", segments: dict[int, Segments]) -> "array[int]":
    """Bytes of data that each row has in the device: all of a file but its holes."""
    if not segments:
        return size
    stored = size[:]
    for row, runs in segments.items():
        stored[row] = sum(length for _, length in runs)
    return stored


def _stride(length: int) -> int:
    """Blocks from where a row's data are expected to where the next row's are: its data and one header."""
    return (length + 2 * _BLOCK - 1) >> _BLOCK_SHIFT


def _skips(data: "array[int]", stored: "array[int]") -> Iterable[int]:
    """Of each row, the blocks between where its data are and where a sorted tar would have them."""
    expected = 1
    for offset, length in zip(data, stored, strict=True):
        skipped = (offset >> _BLOCK_SHIFT) - expected if length else 0
        yield skipped
        expected += skipped + _stride(length)


def decode_tree(data: bytes, device_size: int) -> LayerTree:
    """The tree of a plain section.

    Raises IntegrityError for anything that :func:`encode_tree` would not have written, and for data outside
    the device of ``device_size`` bytes.
    """
    fields = Fields(data, _FIELDS, _WHAT)
    names = _decode_names(fields.blob())
    mode, uid, gid, kinds = _decode_attributes(fields, len(names))
    mtime_ns = _decode_times(fields, len(names))
    directories = rows_of(kinds, stat.S_IFDIR, IMPLICIT_DIR)
    first_child, child_count = _decode_shape(fields, len(names), directories)
    _check_order(names, first_child, directories)
    size = fields.unsigned(len(names))
    if any(compress(size, kinds.translate(_NOT_REGULAR))):
        raise IntegrityError(f"{_WHAT}: something other than a regular file has a size")
    if any(mtime_ns[row] for row in rows_of(kinds, LINK, WHITEOUT)):
        raise IntegrityError(f"{_WHAT}: a hard link or whiteout has a time of its own")
    facts = decode_facts(fields, kinds, size)
    place = _decode_places(fields, _stored(size, facts.segments), device_size)
    return LayerTree(
        names=names,
        mode=mode,
        uid=uid,
        gid=gid,
        mtime_ns=mtime_ns,
        size=size,
        data=place,
        first_child=first_child,
        child_count=child_count,
        targets=facts.targets,
        links=facts.links,
        far_links=facts.far_links,
        rdevs=facts.rdevs,
        xattrs=facts.xattrs,
        segments=facts.segments,
        opaque=facts.opaque,
    )


def _decode_names(blob: bytes) -> list[bytes]:
    """The name of each row, the root's first. The separator is the one byte that no name can have."""
    if blob.count(b"/") + 2 > MAX_ROWS:
        raise IntegrityError(f"{_WHAT}: more than {MAX_ROWS} rows")
    if not blob:
        return [b""]
    names = blob.split(b"/")
    # Directories are dicts by name later on, so that names are hashed here costs nothing.
    if b"\0" in blob or not _IMPOSSIBLE.isdisjoint(names):
        raise IntegrityError(f"{_WHAT}: a name is empty, '.' or '..', or has a NUL")
    if max(map(len, names)) > MAX_NAME:
        raise IntegrityError(f"{_WHAT}: a name is longer than {MAX_NAME} bytes")
    names.insert(0, b"")
    return names


def _decode_table_size(numbers: "array[int]") -> int:
    """Entries of a table whose entries are numbered in order of first use, all of them used."""
    used = list(dict.fromkeys(numbers.tolist()))
    if used != list(range(len(used))):
        raise IntegrityError(f"{_WHAT}: a table is not in order of first use")
    return len(used)


def _decode_attributes(fields: Fields, count: int) -> "tuple[array[int], array[int], array[int], bytes]":
    """Mode, owner, group and kind of each row."""
    attribute_of = fields.unsigned(count)
    entries = _decode_table_size(attribute_of)
    modes, uids, gids = fields.unsigned(entries), fields.unsigned(entries), fields.unsigned(entries)
    if len(set(zip(modes, uids, gids, strict=True))) != entries:
        raise IntegrityError(f"{_WHAT}: mode, owner and group are twice in their table")
    if max(uids) > MAX_ID or max(gids) > MAX_ID:
        raise IntegrityError(f"{_WHAT}: an owner or group exceeds 32 bits")
    kinds = array("q")
    for mode, uid, gid in zip(modes, uids, gids, strict=True):
        kind = KINDS.get(stat.S_IFMT(mode) if mode <= _MAX_MODE else -1)
        if kind is None:
            raise IntegrityError(f"{_WHAT}: mode {mode:o} does not exist")
        if stat.S_IFMT(mode) in (LINK, WHITEOUT) and (stat.S_IMODE(mode), uid, gid) != (0, 0, 0):
            raise IntegrityError(f"{_WHAT}: a hard link or whiteout has a mode or owner of its own")
        kinds.append(kind)
    return (
        spread(modes, attribute_of),
        spread(uids, attribute_of),
        spread(gids, attribute_of),
        bytes(spread(kinds, attribute_of).tolist()),
    )


def _decode_times(fields: Fields, count: int) -> "array[int]":
    """Modification time of each row."""
    time_of = fields.unsigned(count)
    entries = _decode_table_size(time_of)
    times = _times(fields.signed(entries), fields.unsigned(entries))
    if len(set(times.tolist())) != entries:
        raise IntegrityError(f"{_WHAT}: a time is twice in its table")
    return spread(times, time_of)


def _times(seconds: "array[int]", fractions: "array[int]") -> "array[int]":
    """Seconds and nanoseconds as nanoseconds."""
    count = len(seconds)
    if exceeds(lanes(fractions), repeated(_NS - 1, count), count):
        raise IntegrityError(f"{_WHAT}: a time is out of range")
    whole = lanes(seconds)
    is_negative = whole & repeated(LIMIT, count)
    if not is_negative and not exceeds(whole, repeated(_LAST_TIME // _NS - 1, count), count):
        return column(whole * _NS + lanes(fractions), count)
    times = [second * _NS + fraction for second, fraction in zip(seconds, fractions, strict=True)]
    if not _FIRST_TIME <= min(times) <= max(times) <= _LAST_TIME:
        raise IntegrityError(f"{_WHAT}: a time is out of range")
    return array("q", times)


def _decode_shape(fields: Fields, count: int, directories: list[int]) -> "tuple[array[int], array[int]]":
    """First child and number of children of each row: a tree of ``count`` rows in breadth-first order."""
    counts = fields.unsigned(len(directories))
    if not directories or directories[0] != 0:
        raise IntegrityError(f"{_WHAT}: the root is not a directory")
    if sum(counts) != count - 1:
        raise IntegrityError(f"{_WHAT}: {sum(counts)} children for {count - 1} rows")
    first_child, child_count = array("q", bytes(8 * count)), array("q", bytes(8 * count))
    first = level_end = 1
    depth = 0
    for row, children in zip(directories, counts, strict=True):
        if row >= level_end:  # children so far are rows up to ``first``, all of them one level deeper
            level_end, depth = first, depth + 1
        if row >= first or depth > MAX_DEPTH:
            raise IntegrityError(f"{_WHAT}: rows are not a tree of at most {MAX_DEPTH} levels")
        if children:
            first_child[row], child_count[row] = first, children
            first += children
    return first_child, child_count


def _check_order(names: list[bytes], first_child: "array[int]", directories: list[int]) -> None:
    """Names ascend, except from the last child of one directory to the first of the next."""
    rows = range(2, len(names))
    breaks = set(compress(rows, map(ge, names[1:], names[2:])))
    if not breaks.issubset(map(first_child.__getitem__, directories)):
        raise IntegrityError(f"{_WHAT}: names of a directory are not sorted, or twice there")


def _decode_places(fields: Fields, stored: "array[int]", device_size: int) -> "array[int]":
    """Device offset of each row's data, given how many bytes of it there are."""
    count = len(stored)
    skips, lengths, limits = fields.signed(count), lanes(stored), repeated(device_size, count)
    has_data = filled(lengths, count)
    if lanes(skips) & has_data != lanes(skips):
        raise IntegrityError(f"{_WHAT}: a row without data has a place for them")
    outside = f"{_WHAT}: data of a file are outside the device of {device_size} bytes"
    if exceeds(lengths, limits, count):
        raise IntegrityError(outside)
    strides = lengths + repeated(_stride(0) << _BLOCK_SHIFT | _BLOCK - 1, count)
    strides = strides >> _BLOCK_SHIFT & repeated(_MASK >> _BLOCK_SHIFT, count)
    blocks = list(accumulate(map(add, skips, chain((1,), column(strides, count)))))
    # Rows without data lie between others, or after the last one.
    if min(blocks) < 0 or max(blocks) > (device_size >> _BLOCK_SHIFT) + count + 1:
        raise IntegrityError(outside)
    offsets = lanes(array("q", blocks)) << _BLOCK_SHIFT & has_data
    if exceeds(offsets + lengths, limits, count):
        raise IntegrityError(outside)
    return column(offsets, count)
