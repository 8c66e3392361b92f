"""Tree sections: every tree has exactly one encoding, and the decoder takes nothing else."""

import stat
from array import array
from collections.abc import Mapping
from typing import Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.trees import Node, device_size, lay_out, layers, mutate
from veneer.errors import IntegrityError
from veneer.index import wire_tree
from veneer.index.build import TreeBuilder
from veneer.index.model import IMPLICIT_DIR, LINK, WHITEOUT, LayerTree
from veneer.index.tar import TarParser
from veneer.index.wire import decode_tree, encode_tree
from veneer.index.wire_columns import unsigned_column
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import tar

LARGE: Final = 1 << 40
FILE: Final = stat.S_IFREG | 0o644
DIRECTORY: Final = stat.S_IFDIR | 0o755
SYMLINK: Final = stat.S_IFLNK | 0o777
CHAR: Final = stat.S_IFCHR | 0o600


def same(one: LayerTree, other: LayerTree) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in LayerTree.__slots__)


def small_tree(**changes: object) -> LayerTree:
    """A root with ``d`` (which has ``x`` and ``y``), a file, a symlink, a link to the file and a whiteout."""
    tree = LayerTree(
        names=[b"", b"d", b"f", b"l", b"m", b"w", b"x", b"y"],
        mode=array("q", [DIRECTORY, DIRECTORY, FILE, SYMLINK, LINK, WHITEOUT, FILE, FILE]),
        uid=array("q", [0] * 8),
        gid=array("q", [0] * 8),
        mtime_ns=array("q", [0] * 8),
        size=array("q", [0, 0, 700, 0, 0, 0, 10, 0]),
        data=array("q", [0, 0, 512, 0, 0, 0, 4096, 0]),
        first_child=array("q", [1, 6, 0, 0, 0, 0, 0, 0]),
        child_count=array("q", [5, 2, 0, 0, 0, 0, 0, 0]),
        targets={3: b"f"},
        links={4: 2},
    )
    for name, value in changes.items():
        if isinstance(value, tuple):
            row, item = value
            getattr(tree, name)[row] = item
        else:
            setattr(tree, name, value)
    return tree


@given(layers())
@settings(deadline=None, max_examples=150)
def test_what_is_encoded_decodes_to_the_same(root: Node) -> None:
    tree, _ = lay_out(root)
    assert same(decode_tree(encode_tree(tree), device_size(tree)), tree)


@given(random_layers(), st.sampled_from(["drop", "keep"]))
@settings(deadline=None, max_examples=60)
def test_whatever_is_built_from_a_tar_can_be_written(items: list[Layer], devices: str) -> None:
    for layer in items:
        parser, builder, stream = TarParser(), TreeBuilder(devices), tar(layer)
        for entry in (*parser.feed(stream), *parser.finish()):
            builder.add(entry)
        tree = builder.finish()
        assert same(decode_tree(encode_tree(tree), len(stream)), tree)


@given(layers(), st.data())
@settings(deadline=None, max_examples=200)
def test_mutated_sections_are_refused_or_canonical(root: Node, data: st.DataObject) -> None:
    mutated = mutate(encode_tree(lay_out(root)[0]), data)
    try:
        decoded = decode_tree(mutated, LARGE)
    except IntegrityError:
        return
    assert encode_tree(decoded, LARGE) == mutated


@pytest.mark.parametrize("mode", [FILE, LINK, WHITEOUT])
def test_a_lone_root_is_a_directory(mode: int) -> None:
    zero = array("q", [0])
    with pytest.raises(IntegrityError, match="root is not a directory"):
        encode_tree(LayerTree([b""], array("q", [mode]), zero, zero, zero, zero, zero, zero, zero))


@given(layers())
@settings(deadline=None, max_examples=50)
def test_data_must_lie_in_the_device(root: Node) -> None:
    tree, _ = lay_out(root)
    if size := device_size(tree):
        with pytest.raises(IntegrityError, match="outside the device"):
            decode_tree(encode_tree(tree), size - 1)


def test_the_smallest_tree_is_a_root() -> None:
    zero = array("q", [0])
    tree = LayerTree([b""], array("q", [IMPLICIT_DIR | 0o755]), zero, zero, zero, zero, zero, zero, zero)
    assert same(decode_tree(encode_tree(tree), 0), tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": (7, b"x")}, "not sorted, or twice"),
        ({"names": (7, b"a")}, "not sorted, or twice"),
        ({"names": (7, b"..")}, "'..'"),
        ({"names": (1, b".")}, "'.'"),
        ({"names": (7, b"")}, "empty"),
        ({"names": (7, b"y\0")}, "NUL"),
        ({"names": (7, b"y/z")}, "cannot hold 9 numbers"),
        ({"names": (7, b"y" * 256)}, "longer than 255"),
        ({"names": (0, b"root")}, "'names'"),
        ({"mode": (0, FILE)}, "root is not a directory"),
        ({"mode": (7, 0o010644 | 0o200000)}, "does not exist"),
        ({"mode": (7, stat.S_IFSOCK | 0o644)}, "does not exist"),
        ({"mode": (4, LINK | 0o644)}, "mode or owner of its own"),
        ({"uid": (5, 1)}, "mode or owner of its own"),
        ({"mtime_ns": (4, 1)}, "time of its own"),
        ({"uid": (6, 1 << 32)}, "exceeds 32 bits"),
        ({"gid": (6, -1)}, "not well formed"),
        ({"gid": (6, 1 << 32)}, "exceeds 32 bits"),
        ({"size": (1, 5)}, "has a size"),
        ({"size": (6, -1)}, "not well formed"),
        ({"data": (6, 4097)}, "'data'"),
        ({"data": (7, 512)}, "'data'"),
        ({"data": (6, -512)}, "outside the device"),
        ({"child_count": (1, 3)}, "for 7 rows"),
        ({"first_child": (1, 5)}, "'first_child'"),
        ({"targets": {3: b"f" * 4096}}, "longer than 4095"),
        ({"targets": {3: b""}}, "none of them empty"),
        ({"targets": {}}, "expected 1 strings"),
        ({"targets": {3: b"f", 6: b"f"}}, "expected 1 strings"),
        ({"links": {4: 4}}, "cannot have another name"),
        ({"links": {4: 1}}, "cannot have another name"),
        ({"links": {4: 5}}, "cannot have another name"),
        ({"links": {4: 8}}, "cannot have another name"),
        ({"links": {}}, "leads to row 4|column|wider|cannot hold"),
        ({"links": {4: 2}, "far_links": {4: b"d"}}, "column"),
        ({"links": {}, "far_links": {4: b"/d"}}, "impossible path"),
        ({"links": {}, "far_links": {4: b"d/../f"}}, "impossible path"),
        ({"links": {}, "far_links": {4: b"a" * 256}}, "impossible path"),
        ({"links": {}, "far_links": {4: b"a/" * 2047 + b"ab"}}, "impossible path"),
        ({"rdevs": {6: (1, 3)}}, "column"),
        ({"mode": (7, CHAR)}, "column|twice|device"),
        ({"mode": (7, CHAR), "rdevs": {7: (0, 0)}}, "read as a whiteout"),
        ({"mode": (7, CHAR), "rdevs": {7: (4096, 0)}}, "device number"),
        ({"mode": (7, CHAR), "rdevs": {7: (1, 1 << 20)}}, "device number"),
        ({"xattrs": {4: ((b"user.a", b""),)}}, "attributes of its own"),
        ({"xattrs": {6: ()}}, "too few or too many"),
        ({"xattrs": {6: ((b"user.b", b""), (b"user.a", b""))}}, "not sorted"),
        ({"xattrs": {6: ((b"user.a", b""), (b"user.a", b""))}}, "not sorted"),
        ({"xattrs": {6: ((b"u" * 256, b""),)}}, "longer than Linux"),
        ({"xattrs": {6: ((b"user.a", bytes(65537)),)}}, "longer than Linux"),
        ({"xattrs": {6: tuple((b"user.%0200d" % i, b"") for i in range(400))}}, "too many names"),
        ({"xattrs": {6: ((b"user.a", b""), (b"user.overlay.opaque", b"y"))}}, "overlayfs"),
        ({"xattrs": {1: ((b"trusted.overlay.whiteouts", b"y"),)}}, "overlayfs"),
        ({"xattrs": {8: ((b"user.a", b""),)}}, "not below 8"),
        ({"segments": {1: ()}}, "other than a regular file"),
        ({"segments": {6: ((0, 10),)}}, "no hole"),
        ({"segments": {7: ()}}, "no hole"),
        ({"segments": {6: ((5, 6),)}}, "beyond its end"),
        ({"segments": {6: ((0, 2), (2, 2))}}, "touch"),
        ({"segments": {6: ((4, 2), (0, 2))}}, "not well formed"),
        ({"segments": {6: ((1, 2), (4, 0))}}, "empty"),
        ({"segments": {6: ((4, 0),)}}, "than there is room for"),
        ({"opaque": frozenset({6})}, "other than a directory"),
        ({"opaque": frozenset({8})}, "not below 8"),
    ],
)
def test_impossible_trees_are_not_written(changes: dict[str, object], message: str) -> None:
    encode_tree(small_tree())
    with pytest.raises(IntegrityError, match=message):
        encode_tree(small_tree(**changes))


def with_field(number: int, value: object, **changes: object) -> bytes:
    """The small tree's section with one field replaced."""
    return with_fields({number: value}, **changes)


def with_fields(values: Mapping[int, object], **changes: object) -> bytes:
    fields = msgpack.unpackb(encode_tree(small_tree(**changes)))
    for number, value in values.items():
        fields[number] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, "d/f/l/m/w/x/y", "not a byte string"),
        (1, bytes([1, 0, 0, 2, 3, 4, 0, 0]), "order of first use"),
        (1, bytes([0, 0, 1, 2, 3, 5, 1, 1]), "order of first use"),
        (1, bytes([0, 0, 1, 2, 3, 4, 1, 1]) + bytes(8), "wider"),
        (1, bytes(7), "cannot hold"),
        (1, bytes(8) * 7 + b"\xff" * 8, "63 bits"),
        (6, bytes(1), "wider"),
        (6, (10**10).to_bytes(5, "little"), "out of range"),
        (7, (10**9).to_bytes(4, "little"), "out of range"),
        (8, bytes([0, 7]), "not a tree"),
        (8, bytes([7, 0, 0]), "cannot hold"),
        (11, 1 << 62, "not an integer from 0 to 1"),
        (11, True, "not an integer"),
        (11, -1, "not an integer"),
        (10, b"f\0g", "expected 1 strings"),
        (17, 9, "not an integer from 0 to 8"),
        (17, 8, "attributes of its own"),
        (31, bytes([1, 0, 0, 0, 0, 0, 0, 0]), "has a place"),
    ],
)
def test_other_spellings_are_refused(field: int, value: object, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        decode_tree(with_field(field, value), LARGE)


def test_tables_have_no_entry_twice() -> None:
    modes = [DIRECTORY, FILE, SYMLINK, LINK, WHITEOUT, FILE]
    attributes = {1: bytes([0, 0, 1, 2, 3, 4, 1, 5]), 2: unsigned_column(modes)}
    with pytest.raises(IntegrityError, match="mode, owner and group are twice"):
        decode_tree(with_fields(attributes), LARGE)
    with pytest.raises(IntegrityError, match="a time is twice"):
        decode_tree(with_fields({5: bytes([0, 0, 0, 0, 0, 0, 0, 1])}), LARGE)
    sets = {19: bytes([0, 1]), 20: bytes([1, 1]), 21: b"user.a\0user.a"}
    with pytest.raises(IntegrityError, match="set of extended attributes is there twice"):
        decode_tree(with_fields(sets, xattrs=dict.fromkeys([6, 7], ((b"user.a", b""),))), LARGE)


@pytest.mark.parametrize("values", [b"val", b"value."])
def test_values_of_attributes_must_add_up(values: bytes) -> None:
    with pytest.raises(IntegrityError, match="do not add up"):
        decode_tree(with_field(23, values, xattrs={6: ((b"user.a", b"value"),)}), LARGE)


@pytest.mark.parametrize("field", [20, 26])
def test_counts_without_bytes_to_back_them_allocate_nothing(field: int) -> None:
    """Numbers of attributes of a set and of segments of a file: 2^62 of them."""
    changes: dict[str, object] = {"xattrs": {6: ((b"user.a", b""),)}, "segments": {6: ((0, 2),)}}
    with pytest.raises(IntegrityError, match=r"too many|room for"):
        decode_tree(with_field(field, (1 << 62).to_bytes(8, "little"), **changes), LARGE)


def test_rows_that_are_their_own_ancestors_are_refused() -> None:
    """Two directories, the second of which has itself as a child: the counts add up all the same."""
    tree = small_tree()
    tree.mode[7] = DIRECTORY
    tree.first_child[1], tree.child_count[1] = 6, 1
    tree.first_child[7], tree.child_count[7] = 7, 1
    with pytest.raises(IntegrityError, match="not a tree"):
        encode_tree(tree)


def test_depth_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Node(DIRECTORY)
    root.children[b"a"] = Node(DIRECTORY, children={b"b": Node(DIRECTORY)})
    tree, _ = lay_out(root)
    monkeypatch.setattr(wire_tree, "MAX_DEPTH", 2)
    encode_tree(tree)
    monkeypatch.setattr(wire_tree, "MAX_DEPTH", 1)
    with pytest.raises(IntegrityError, match="at most 1 levels"):
        encode_tree(tree)


def test_rows_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_tree(small_tree())
    monkeypatch.setattr(wire_tree, "MAX_ROWS", 8)
    decode_tree(data, LARGE)
    monkeypatch.setattr(wire_tree, "MAX_ROWS", 7)
    with pytest.raises(IntegrityError, match="more than 7 rows"):
        decode_tree(data, LARGE)
