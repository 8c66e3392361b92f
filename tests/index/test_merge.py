"""Merging layers: random ones against a model of one fact a path, and the cases that unpackers get wrong."""

import stat
from array import array
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.trees import BLOCK, Node, few_names, lay_out, layer_of, layers
from veneer.errors import IntegrityError
from veneer.index.merge import merge
from veneer.index.model import IMPLICIT_DIR, LINK, WHITEOUT, Extent, ImageIndex, MetadataPolicy
from veneer.testing.trees import node_at

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644


@dataclass(frozen=True)
class Fact:
    """What a path of an image is. Names of one inode have facts with the same ``inode``."""

    inode: tuple[int, bytes]
    device: int
    node: Node

    @property
    def is_directory(self) -> bool:
        return self.node.is_directory


class BrokenLinkError(Exception):
    """A hard link that leads to nothing, or to a directory."""


def overlay(roots: list[Node]) -> dict[bytes, Fact]:
    """The image by path, made one name after the other as an unpacker would."""
    image: dict[bytes, Fact] = {}
    for number, root in enumerate(roots):
        below = dict(image)
        tree, rows = lay_out(root)
        paths = {row: path for path, row in rows.items()}
        nodes = {path: at(root, path) for path in rows}
        for path, node in nodes.items():  # parents come before their children
            if node.mode == WHITEOUT:
                hide(image, path)
            elif node.is_directory:
                old = image.get(path)
                if old is None or not old.is_directory:
                    hide(image, path)
                    implied = stat.S_IFMT(node.mode) == IMPLICIT_DIR
                    image[path] = Fact((number, path), number, Node(DIRECTORY) if implied else node)
                elif stat.S_IFMT(node.mode) != IMPLICIT_DIR:
                    image[path] = Fact((number, path), number, node)
                if node.opaque:
                    hide(image, path, itself=False)
            else:
                hide(image, path)
                row = rows[path]
                if row in tree.far_links:
                    found = below.get(tree.far_links[row])
                    if found is None or found.is_directory:
                        raise BrokenLinkError
                    image[path] = found
                else:
                    inode = paths[tree.links.get(row, row)]
                    image[path] = Fact((number, inode), number, nodes[inode])
    return image


def at(root: Node, path: bytes) -> Node:
    node = root
    for name in path.split(b"/") if path else ():
        node = node.children[name]
    return node


def hide(image: dict[bytes, Fact], path: bytes, *, itself: bool = True) -> None:
    for other in list(image):
        if (other == path and itself) or (other != path and (not path or other.startswith(path + b"/"))):
            del image[other]


def parent_of(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


@given(st.lists(layers(few_names), min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
def test_merging_is_what_unpacking_layer_by_layer_gives(roots: list[Node]) -> None:
    merged_layers = [layer_of(lay_out(root)[0]) for root in roots]
    try:
        expected = overlay(roots)
    except BrokenLinkError:
        with pytest.raises(IntegrityError, match="hard link"):
            merge(merged_layers)
        return
    index = merge(merged_layers)
    walked = list(index.walk())
    paths = [path for path, _ in walked]
    assert len(set(paths)) == len(paths)
    assert set(paths) == set(expected)
    for path, node in walked:
        check(index, node, expected[path], path)
    inodes: dict[int, set[tuple[int, bytes]]] = {}
    for path, node in walked:
        inodes.setdefault(node, set()).add(expected[path].inode)
    assert all(len(same) == 1 for same in inodes.values())
    assert len(inodes) == len({fact.inode for fact in expected.values()})
    for kids in index.children.values():
        assert list(kids) == sorted(kids)
    for path, node in walked:
        if expected[path].is_directory:
            below = [other for other, fact in expected.items() if other and fact.is_directory]
            assert index.nlink[node] == 2 + sum(parent_of(other) == path for other in below)
        else:
            assert index.nlink[node] == sum(fact.inode == expected[path].inode for fact in expected.values())


def check(index: ImageIndex, node: int, fact: Fact, path: bytes) -> None:
    expected = fact.node
    assert index.mode[node] == expected.mode, path
    assert (index.uid[node], index.gid[node]) == (expected.uid, expected.gid)
    assert index.mtime_ns[node] == expected.mtime_ns
    assert index.xattrs.get(node, ()) == expected.xattrs
    assert index.rdevs.get(node) == expected.rdev
    assert index.targets.get(node, b"") == expected.target
    assert index.size[node] == expected.size
    runs = ((0, expected.size),) if expected.segments is None else expected.segments
    extents, place = [], BLOCK * expected.block
    for start, length in runs:
        if stat.S_ISREG(expected.mode) and length:
            extents.append(Extent(start, fact.device, place, length))
        place += length
    assert index.extents(node) == extents


def root_of(**children: Node) -> Node:
    return Node(DIRECTORY, children={name.encode(): node for name, node in children.items()})


def merged(*roots: Node) -> ImageIndex:
    return merge([layer_of(lay_out(replace(root))[0]) for root in roots])


def names(index: ImageIndex) -> list[str]:
    return [path.decode() for path, _ in index.walk()][1:]


def file(uid: int = 0) -> Node:
    return Node(FILE, uid=uid)


def directory(**children: Node) -> Node:
    return root_of(**children)


def test_no_layers_make_an_empty_root() -> None:
    index = merge([])
    assert list(index.walk()) == [(b"", index.root)]
    assert (index.mode[index.root], index.nlink[index.root]) == (DIRECTORY, 2)
    assert index.devices == ()


def test_an_implied_directory_keeps_what_it_has_below() -> None:
    lower = root_of(d=Node(stat.S_IFDIR | 0o1777, uid=7, gid=8, mtime_ns=9, children={b"old": file()}))
    upper = root_of(d=Node(IMPLICIT_DIR | 0o755, children={b"new": file()}))
    index = merged(lower, upper)
    node = node_at(index, b"d")
    assert node is not None
    assert (index.mode[node], index.uid[node], index.gid[node]) == (stat.S_IFDIR | 0o1777, 7, 8)
    assert index.mtime_ns[node] == 9
    assert names(index) == ["d", "d/new", "d/old"]


def test_an_implied_directory_in_place_of_a_symlink_is_a_new_one() -> None:
    """Nothing is ever unpacked through a symlink; the layer's own path is what counts."""
    lower = root_of(lib=Node(stat.S_IFLNK | 0o777, target=b"usr/lib"), usr=directory(lib=directory(a=file())))
    upper = root_of(lib=Node(IMPLICIT_DIR | 0o700, uid=5, children={b"b": file()}))
    index = merged(lower, upper)
    node = node_at(index, b"lib")
    assert node is not None
    assert (index.mode[node], index.uid[node]) == (DIRECTORY, 0)
    assert names(index) == ["lib", "lib/b", "usr", "usr/lib", "usr/lib/a"]


def test_an_opaque_directory_hides_what_is_below_and_nothing_beside() -> None:
    lower = root_of(a=directory(x=directory(deep=file()), y=file()), b=directory(z=file()))
    upper = root_of(
        a=Node(IMPLICIT_DIR, opaque=True, children={b"x": Node(IMPLICIT_DIR, children={b"n": file()})})
    )
    index = merged(lower, upper)
    assert names(index) == ["a", "a/x", "a/x/n", "b", "b/z"]


def test_a_directory_is_laid_over_its_own_path_only() -> None:
    lower = root_of(a=directory(b=directory(x=file())), b=directory(y=file()))
    upper = root_of(a=directory(n=file()), b=Node(IMPLICIT_DIR, children={b"m": file()}))
    index = merged(lower, upper)
    assert names(index) == ["a", "a/b", "a/b/x", "a/n", "b", "b/m", "b/y"]


def test_a_whiteout_of_what_is_not_there_hides_nothing() -> None:
    assert names(merged(root_of(a=file()), root_of(b=Node(WHITEOUT), d=directory(c=Node(WHITEOUT))))) == [
        "a",
        "d",
    ]


def test_a_name_may_come_back_above_its_whiteout() -> None:
    index = merged(root_of(d=directory(a=file(1))), root_of(d=Node(WHITEOUT)), root_of(d=directory(b=file(2))))
    assert names(index) == ["d", "d/b"]


def test_a_link_into_a_lower_layer_survives_the_removal_of_what_it_led_to() -> None:
    lower = root_of(a=Node(FILE, size=5, block=3))
    upper = root_of(a=Node(WHITEOUT), b=Node(LINK, far=b"a"))
    index = merged(lower, upper)
    node = node_at(index, b"b")
    assert node is not None
    assert names(index) == ["b"]
    assert index.extents(node) == [Extent(0, 0, 3 * BLOCK, 5)]
    assert index.nlink[node] == 1


def test_replacing_one_name_of_an_inode_leaves_the_others() -> None:
    index = merged(root_of(a=file(1), b=Node(LINK, near=0)), root_of(a=file(2)))
    one, other = node_at(index, b"a"), node_at(index, b"b")
    assert one is not None
    assert other is not None
    assert (index.uid[one], index.uid[other]) == (2, 1)
    assert (index.nlink[one], index.nlink[other]) == (1, 1)


@pytest.mark.parametrize("far", [b"missing", b"d", b"f/x", b"l/f", b"s/x"])
def test_links_to_nothing_or_through_anything_but_directories_are_refused(far: bytes) -> None:
    lower = root_of(d=directory(x=file()), f=file(), l=Node(stat.S_IFLNK | 0o777, target=b"."))
    with pytest.raises(IntegrityError, match="layer 2 of 2: a hard link leads to"):
        merged(lower, root_of(h=Node(LINK, far=far)))


def test_a_link_does_not_see_its_own_layer() -> None:
    with pytest.raises(IntegrityError):
        merged(root_of(), root_of(a=file(), b=Node(LINK, far=b"a")))


@pytest.mark.parametrize("mode", [FILE, LINK, WHITEOUT])
def test_a_root_that_is_not_a_directory_is_refused(mode: int) -> None:
    layer = layer_of(lay_out(Node(DIRECTORY))[0])
    layer.tree.mode = array("q", [mode])
    with pytest.raises(IntegrityError, match="root is not a directory"):
        merge([layer])


def test_a_large_directory_stays_sorted_when_a_layer_adds_to_it() -> None:
    many = {b"%05d" % number: file() for number in range(20_000)}
    index = merged(root_of(d=Node(DIRECTORY, children=many)), root_of(d=directory(**{"00007x": file()})))
    kids = index.children[node_at(index, b"d") or 0]
    assert len(kids) == 20_001
    assert list(kids) == sorted(kids)


def test_the_policy_is_kept() -> None:
    policy = MetadataPolicy("keep", {"time": 2})
    assert merge([layer_of(lay_out(root_of())[0])], policy).policy == policy


def test_columns_of_any_integer_type_merge() -> None:
    """Builders need not use the array type that the wire format decodes to."""
    layer = layer_of(lay_out(root_of(a=file(3)))[0])
    layer.tree.uid = array("I", layer.tree.uid)
    index = merge([layer])
    assert index.uid[node_at(index, b"a") or 0] == 3
