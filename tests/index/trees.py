"""Random layers for tests: nodes linked by name, and how they become the columns of a LayerTree."""

import hashlib
import stat
from array import array
from dataclasses import dataclass, field

import msgpack
from hypothesis import strategies as st

from veneer.index.model import (
    IMPLICIT_DIR,
    LINK,
    WHITEOUT,
    Codec,
    LayerIndex,
    LayerTree,
    MetadataPolicy,
    SpanTable,
    Xattrs,
)
from veneer.index.wire import PackedIndex, decode_spans, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_ZSTD

BLOCK = 512
MAX_INT = (1 << 63) - 1


@dataclass
class Node:
    """One name of a layer. ``near`` picks the inode of a link among the layer's inodes, ``far`` is its path."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    segments: tuple[tuple[int, int], ...] | None = None
    block: int = 0
    target: bytes = b""
    rdev: tuple[int, int] | None = None
    xattrs: Xattrs = ()
    near: int = 0
    far: bytes = b""
    opaque: bool = False
    children: "dict[bytes, Node]" = field(default_factory=dict)

    @property
    def stored(self) -> int:
        return self.size if self.segments is None else sum(length for _, length in self.segments)

    @property
    def is_directory(self) -> bool:
        return stat.S_IFMT(self.mode) in (stat.S_IFDIR, IMPLICIT_DIR)


def device_size(tree: LayerTree) -> int:
    """The smallest device that holds the tree's data."""
    ends = [0]
    for row, size in enumerate(tree.size):
        runs = tree.segments.get(row)
        ends.append(tree.data[row] + (size if runs is None else sum(length for _, length in runs)))
    return max(ends)


def lay_out(root: Node) -> tuple[LayerTree, dict[bytes, int]]:
    """The tree below ``root`` and each path's row."""
    names, rows, paths, first_child, child_count = [b""], [root], [b""], array("q"), array("q")
    for number, node in enumerate(rows):
        first_child.append(len(rows) if node.children else 0)
        child_count.append(len(node.children))
        for name in sorted(node.children):
            names.append(name)
            rows.append(node.children[name])
            paths.append(paths[number] + b"/" + name if number else name)
    inodes = [
        row for row, node in enumerate(rows) if not node.is_directory and node.mode not in (LINK, WHITEOUT)
    ]
    for node in rows:
        if node.mode == LINK and not node.far and not inodes:
            node.mode = WHITEOUT
    numbered = list(enumerate(rows))
    tree = LayerTree(
        names=names,
        mode=array("q", [node.mode for node in rows]),
        uid=array("q", [node.uid for node in rows]),
        gid=array("q", [node.gid for node in rows]),
        mtime_ns=array("q", [node.mtime_ns for node in rows]),
        size=array("q", [node.size for node in rows]),
        data=array("q", [BLOCK * node.block if node.stored else 0 for node in rows]),
        first_child=first_child,
        child_count=child_count,
        targets={row: node.target for row, node in numbered if stat.S_ISLNK(node.mode)},
        links={
            row: inodes[node.near % len(inodes)] for row, node in numbered if node.mode == LINK and not node.far
        },
        far_links={row: node.far for row, node in numbered if node.mode == LINK and node.far},
        rdevs={row: node.rdev for row, node in numbered if node.rdev is not None},
        xattrs={row: node.xattrs for row, node in numbered if node.xattrs},
        segments={row: node.segments for row, node in numbered if node.segments is not None},
        opaque=frozenset(row for row, node in numbered if node.opaque),
    )
    return tree, {path: row for row, path in enumerate(paths)}


#: Any name, or one of few, so that layers meet.
any_names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda b: b.translate(None, b"\0/"))
    .filter(lambda name: name not in (b"", b".", b".."))
)
few_names = st.sampled_from([b"a", b"b", b"c", b"d"])
#: Small numbers, and the ends of every width of a column.
numbers = st.one_of(
    st.integers(0, 9), st.sampled_from([127, 128, 255, 256, 65535, 65536, 1 << 31, (1 << 32) - 1])
)
times = st.one_of(
    st.integers(0, 3).map(lambda second: second * 10**9),
    st.integers(-(1 << 63), MAX_INT),
)
xattr_sets = st.dictionaries(
    st.binary(min_size=1, max_size=8).map(lambda name: b"user." + name.replace(b"\0", b"0")),
    st.binary(max_size=6),
    max_size=3,
).map(lambda pairs: tuple(sorted(pairs.items())))


@st.composite
def sparse(draw: st.DrawFn) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Size and segments of a file with at least one hole."""
    end, segments = 0, []
    for number in range(draw(st.integers(0, 3))):
        hole = draw(st.integers(1 if number else 0, 2000))
        length = draw(st.integers(1, 2000))
        segments.append((end + hole, length))
        end += hole + length
    return end + draw(st.integers(1, 1 << 40)), tuple(segments)


@st.composite
def leaves(draw: st.DrawFn, far_paths: st.SearchStrategy[bytes]) -> Node:
    kind = draw(
        st.sampled_from(
            [stat.S_IFREG] * 4
            + [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, LINK, LINK, WHITEOUT, WHITEOUT]
        )
    )
    if kind == WHITEOUT:
        return Node(WHITEOUT)
    if kind == LINK:
        return Node(LINK, near=draw(st.integers(0, 20)), far=draw(st.one_of(st.just(b""), far_paths)))
    node = Node(
        kind | draw(st.sampled_from([0o644, 0o4755, 0o777])),
        uid=draw(numbers),
        gid=draw(numbers),
        mtime_ns=draw(times),
        xattrs=draw(xattr_sets),
    )
    if kind == stat.S_IFLNK:
        node.target = draw(st.binary(min_size=1, max_size=9).map(lambda target: target.replace(b"\0", b"/")))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.rdev = draw(st.integers(1, 4095)), draw(st.integers(0, (1 << 20) - 1))
    elif kind == stat.S_IFREG:
        if draw(st.booleans()):
            node.size, node.segments = draw(sparse())
        else:
            node.size = draw(st.one_of(st.just(0), st.integers(1, 3000), st.just(1 << 33)))
        node.block = draw(st.integers(0, 1 << 20))
    return node


@st.composite
def directories(
    draw: st.DrawFn, names: st.SearchStrategy[bytes], far_paths: st.SearchStrategy[bytes], depth: int = 2
) -> Node:
    """A directory of a layer with everything below it."""
    if draw(st.integers(0, 2)):
        node = Node(
            stat.S_IFDIR | draw(st.sampled_from([0o755, 0o1777])),
            uid=draw(numbers),
            gid=draw(numbers),
            mtime_ns=draw(times),
            xattrs=draw(xattr_sets),
        )
    else:
        node = Node(IMPLICIT_DIR | 0o755)
    node.opaque = draw(st.integers(0, 5)) == 0
    kinds = leaves(far_paths)
    if depth:
        # Twice as many directories as others: layers meet in them only.
        kinds = st.one_of(kinds, *[directories(names, far_paths, depth - 1)] * 2)
    node.children = draw(st.dictionaries(names, kinds, max_size=4))
    return node


def layers(names: st.SearchStrategy[bytes] = any_names) -> st.SearchStrategy[Node]:
    """The root directory of a random layer; its links into lower layers have the same kind of names."""
    return directories(names, st.lists(names, min_size=1, max_size=2).map(b"/".join))


@st.composite
def span_tables(draw: st.DrawFn) -> tuple[SpanTable, int]:
    """A span table and the size of its blob."""
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(1, 200_000),
                st.one_of(st.just(0), st.integers(0, 300)),
                st.integers(1, 200_000),
                st.sampled_from(["raw", "zstd", "zstd-frames", "gzip"]),
            ),
            max_size=8,
        )
    )
    starts, offsets, lengths, end = array("q", [0]), array("q"), array("q"), 0
    for length, gap, stored, _ in rows:
        starts.append(starts[-1] + length)
        offsets.append(end + gap)
        lengths.append(stored)
        end += gap + stored
    names = list(dict.fromkeys(name for *_, name in rows))
    codec_of = bytes(names.index(name) for *_, name in rows) if len(names) > 1 else b""
    digests = draw(st.binary(min_size=32 * len(rows), max_size=32 * len(rows)))
    table = SpanTable(starts, offsets, lengths, digests, tuple(map(Codec, names)), codec_of)
    return table, end + draw(st.integers(0, 9))


def mutate(section: bytes, data: st.DataObject) -> bytes:
    """The section with some bytes changed: anywhere, or inside of one field so that the msgpack stays valid."""
    if data.draw(st.booleans()):
        return _mutate_bytes(section, data)
    fields = msgpack.unpackb(section)
    number = data.draw(st.integers(0, len(fields) - 1))
    field = fields[number]
    if isinstance(field, bytes):
        fields[number] = _mutate_bytes(field, data)
    elif isinstance(field, int):
        fields[number] = data.draw(st.sampled_from([field + 1, field - 1, 0, 1 << 62]))
    packed: bytes = msgpack.packb(fields)
    return packed


def _mutate_bytes(value: bytes, data: st.DataObject) -> bytes:
    start = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(start, min(start + 4, len(value))))
    return value[:start] + data.draw(st.binary(max_size=4)) + value[end:]


def layer_of(tree: LayerTree, name: bytes = b"layer") -> LayerIndex:
    """The tree over a device of spans of 64 MiB whose stored bytes nobody will ask for."""
    step, size = 64 << 20, device_size(tree)
    starts = array("q", [*range(0, size, step), size])
    count = len(starts) - 1
    spans = SpanTable(
        starts,
        array("q", range(count)),
        array("q", [1] * count),
        hashlib.sha256(name).digest() * count,
        (Codec("zstd"),) if count else (),
    )
    blob, diff_id = Descriptor(OCI_LAYER_ZSTD, Digest.of(name), count), Digest.of(b"device of " + name)
    return LayerIndex(tree, decode_spans(encode_spans(blob, diff_id, spans)))


def unpack_index(data: bytes) -> tuple[tuple[LayerIndex, ...], MetadataPolicy]:
    """Layers and policy of a whole artifact."""
    packed = PackedIndex.parse(data)
    return packed.layers(), packed.policy
