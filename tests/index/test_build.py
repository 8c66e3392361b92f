"""One layer's tree: what the builder makes of entries, and what it refuses."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError
from veneer.index.build import TreeBuilder
from veneer.index.model import IMPLICIT_DIR, LINK, WHITEOUT, LayerTree
from veneer.index.tar import TarEntry, TarParser
from veneer.index.wire_tree import decode_tree, encode_tree
from veneer.testing.images import Layer
from veneer.testing.tars import TarItem, opaque, tar, whiteout


def entries_of(items: Layer) -> list[TarEntry]:
    return TarParser().feed(tar(items))


def built(*items: TarItem, devices: str = "drop") -> tuple[LayerTree, dict[str, int]]:
    builder = TreeBuilder(devices)
    for entry in entries_of(items):
        builder.add(entry)
    tree = builder.finish()
    assert decode_tree(encode_tree(tree), 1 << 40).names == tree.names  # it is well formed
    return tree, dict(builder.dropped)


def paths(tree: LayerTree) -> list[bytes]:
    """The path of each row."""
    found = [b""] * len(tree)
    for row, (first, count) in enumerate(zip(tree.first_child, tree.child_count, strict=True)):
        for child in range(first, first + count):
            found[child] = found[row] + b"/" + tree.names[child]
    return found


def kinds(tree: LayerTree) -> dict[bytes, int]:
    return {path: stat.S_IFMT(mode) for path, mode in zip(paths(tree), tree.mode, strict=True)}


def file(path: bytes, content: bytes = b"x") -> TarItem:
    return TarItem(path, content=content)


def directory(path: bytes, mode: int = 0o755) -> TarItem:
    return TarItem(path, "dir", mode=mode)


def link(path: bytes, target: bytes) -> TarItem:
    return TarItem(path, "link", link=target)


def test_rows_are_breadth_first_and_sorted() -> None:
    tree, _ = built(file(b"b/y"), file(b"c"), file(b"a/deep/z"), directory(b"b/"), file(b"b/x"), file(b"\xff"))
    assert paths(tree) == [b"", b"/a", b"/b", b"/c", b"/\xff", b"/a/deep", b"/b/x", b"/b/y", b"/a/deep/z"]
    assert list(tree.first_child) == [1, 5, 6, 0, 0, 8, 0, 0, 0]
    assert list(tree.child_count) == [4, 1, 2, 0, 0, 1, 0, 0, 0]


def test_attributes_and_places_of_data() -> None:
    items = (
        TarItem(b"./", "dir", mode=0o711, uid=1, gid=2, mtime_ns=3),
        TarItem(
            b"empty", mode=0o4755, uid=5, gid=6, mtime_ns=-7, xattrs=((b"user.b", b"2"), (b"user.a", b"1"))
        ),
        TarItem(b"full", content=b"data"),
        TarItem(b"holes", pieces=((5, b"abc"),), size=10, form="gnu", sparse="old"),
        TarItem(b"nothing but a hole", pieces=(), size=10, form="gnu", sparse="old"),
        TarItem(b"symlink", "symlink", mode=0, link=b"target"),
        TarItem(b"device", "block", mode=0o600, rdev=(8, 1)),
    )
    tree, dropped = built(*items, devices="keep")
    row = {name: number for number, name in enumerate(tree.names)}
    by_path = {entry.path: entry for entry in entries_of(items)}

    assert (tree.mode[0], tree.uid[0], tree.gid[0], tree.mtime_ns[0]) == (stat.S_IFDIR | 0o711, 1, 2, 3)
    empty = row[b"empty"]
    assert (tree.mode[empty], tree.uid[empty], tree.gid[empty]) == (stat.S_IFREG | 0o4755, 5, 6)
    assert (tree.mtime_ns[empty], tree.data[empty]) == (-7, 0)
    assert tree.xattrs == {empty: ((b"user.a", b"1"), (b"user.b", b"2"))}
    assert tree.data[row[b"full"]] == by_path[b"full"].data
    assert tree.data[row[b"holes"]] == by_path[b"holes"].data
    assert tree.data[row[b"nothing but a hole"]] == 0
    assert tree.segments == {row[b"holes"]: ((5, 3),), row[b"nothing but a hole"]: ()}
    assert tree.targets == {row[b"symlink"]: b"target"}
    assert tree.mode[row[b"symlink"]] == stat.S_IFLNK | 0o777
    assert tree.rdevs == {row[b"device"]: (8, 1)}
    assert dropped == {}


def test_spellings_of_a_path() -> None:
    tree, _ = built(directory(b"/a//./b/"), file(b"./a/b/./c"), file(b"//a/d"), directory(b"."))
    assert paths(tree) == [b"", b"/a", b"/a/b", b"/a/d", b"/a/b/c"]
    assert tree.mode[1] == IMPLICIT_DIR | 0o755
    assert tree.mode[2] == stat.S_IFDIR | 0o755


def test_the_last_entry_of_a_path_wins() -> None:
    tree, _ = built(file(b"f", b"old"), file(b"f", b"newer"))
    assert list(tree.size) == [0, 5]
    tree, _ = built(directory(b"d"), file(b"d/a"), directory(b"d/", mode=0o700), file(b"d/b"))
    assert paths(tree) == [b"", b"/d", b"/d/a", b"/d/b"]
    assert tree.mode[1] == stat.S_IFDIR | 0o700
    tree, _ = built(file(b"d/sub/a"), file(b"d"))
    assert kinds(tree) == {b"": IMPLICIT_DIR, b"/d": stat.S_IFREG}
    tree, _ = built(file(b"d/sub/a"), file(b"d"), directory(b"d"), file(b"d/sub/b"))
    assert paths(tree) == [b"", b"/d", b"/d/sub", b"/d/sub/b"]


def test_whiteouts() -> None:
    tree, dropped = built(
        whiteout(b"gone"), whiteout(b"d/gone too"), whiteout(b"gone"), file(b".wh..wh.orph/x")
    )
    assert kinds(tree) == {b"": IMPLICIT_DIR, b"/d": IMPLICIT_DIR, b"/gone": WHITEOUT, b"/d/gone too": WHITEOUT}
    assert dropped == {"aufs metadata": 1}


def test_whatever_a_name_can_be_can_be_hidden() -> None:
    """The mark of a whiteout is no part of the name that it hides."""
    longest = b"n" * 255
    tree, _ = built(whiteout(longest))
    assert kinds(tree) == {b"": IMPLICIT_DIR, b"/" + longest: WHITEOUT}
    with pytest.raises(IntegrityError, match="more than 255 bytes"):
        built(whiteout(longest + b"n"))


@pytest.mark.parametrize("turn", [1, -1])
def test_an_entry_wins_over_the_whiteout_of_its_name(turn: int) -> None:
    tree, _ = built(*(whiteout(b"f"), file(b"f"))[::turn])
    assert kinds(tree) == {b"": IMPLICIT_DIR, b"/f": stat.S_IFREG}
    tree, _ = built(*(whiteout(b"d"), directory(b"d", mode=0o700))[::turn])
    assert (tree.mode[1], tree.opaque) == (stat.S_IFDIR | 0o700, frozenset({1}))
    # An implied directory whose lower one is hidden has nowhere to take attributes from.
    tree, _ = built(*(whiteout(b"d"), file(b"d/f"))[::turn])
    assert (tree.mode[1], tree.opaque) == (stat.S_IFDIR | 0o755, frozenset({1}))


def test_opaque_directories() -> None:
    tree, _ = built(opaque(b""), opaque(b"d"), file(b"d/f"), directory(b"e"))
    assert tree.opaque == {0, 1}
    assert kinds(tree)[b"/d"] == IMPLICIT_DIR
    tree, _ = built(opaque(b"d"), file(b"d"))
    assert tree.opaque == frozenset()


def test_hard_links_end_at_the_first_row_of_the_inode() -> None:
    items = (
        file(b"z/first", b"abc"),
        TarItem(b"b", "link", link=b"/z/first", mode=0o777, uid=99, xattrs=((b"user.a", b""),)),
        link(b"a/deep", b"./b"),
    )
    tree, _ = built(*items)
    row = {path: number for number, path in enumerate(paths(tree))}
    assert tree.links == {row[b"/a/deep"]: row[b"/b"], row[b"/z/first"]: row[b"/b"]}
    assert tree.mode[row[b"/b"]] == stat.S_IFREG | 0o644
    assert (tree.uid[row[b"/b"]], tree.size[row[b"/b"]], tree.xattrs) == (0, 3, {})
    assert tree.mode[row[b"/z/first"]] == LINK


def test_a_link_keeps_the_inode_that_its_target_had() -> None:
    tree, _ = built(file(b"a", b"old"), link(b"b", b"a"), link(b"c", b"b"), file(b"a", b"new!"))
    assert list(tree.size) == [0, 4, 3, 0]
    assert tree.links == {3: 2}


def test_links_into_the_layers_below() -> None:
    tree, _ = built(link(b"a", b"/usr//bin/x"), link(b"b", b"a"), file(b"usr/lib/y"))
    row = {path: number for number, path in enumerate(paths(tree))}
    assert tree.far_links == {row[b"/a"]: b"usr/bin/x", row[b"/b"]: b"usr/bin/x"}
    assert tree.links == {}


def test_device_nodes_are_left_out_but_still_hide_what_is_below() -> None:
    items = (
        TarItem(b"null", "char", rdev=(1, 3)),
        TarItem(b"disk", "block", rdev=(8, 0)),
        TarItem(b"zero", "char", rdev=(0, 0)),
        link(b"another", b"null"),
        TarItem(b"pipe", "fifo"),
    )
    tree, dropped = built(*items)
    hidden = dict.fromkeys((b"/null", b"/disk", b"/zero", b"/another"), WHITEOUT)
    assert kinds(tree) == {b"": IMPLICIT_DIR, b"/pipe": stat.S_IFIFO} | hidden
    assert dropped == {"device node": 2, "whiteout device": 1}
    tree, dropped = built(*items, devices="keep")
    assert kinds(tree)[b"/another"] == stat.S_IFCHR
    assert kinds(tree)[b"/zero"] == WHITEOUT
    assert dropped == {"whiteout device": 1}


def test_attributes_that_nobody_may_see_are_left_out() -> None:
    names = [
        b"user.a",
        b"trusted.overlay.opaque",
        b"user.overlay.x",
        b"security.capability",
        b"com.apple.x",
        b"user.",
    ]
    xattrs = tuple((name, b"v") for name in names)
    tree, dropped = built(TarItem(b"f", xattrs=xattrs))
    assert tree.xattrs == {1: ((b"security.capability", b"v"), (b"user.a", b"v"))}
    assert dropped == {"overlay xattr": 2, "unsupported xattr": 2}
    tree, dropped = built(TarItem(b"f", "fifo", xattrs=((b"user.a", b"v"), (b"trusted.a", b"v"))))
    assert tree.xattrs == {1: ((b"trusted.a", b"v"),)}
    assert dropped == {"unsupported xattr": 1}


def test_times_beyond_64_bits_are_clamped() -> None:
    last = (1 << 63) - 1
    tree, dropped = built(*(TarItem(b"%d" % n, mtime_ns=t) for n, t in enumerate((last, last + 1, -last - 2))))
    assert list(tree.mtime_ns) == [0, last, last, -last - 1]
    assert dropped == {"clamped time": 2}


REFUSED: dict[str, tuple[Layer, str]] = {
    "out of the tree": ((file(b"../etc/passwd"),), "'..'"),
    "out and in again": ((file(b"a/../b"),), "'..'"),
    "out at the end": ((directory(b"a/.."),), "'..'"),
    "a file without name": ((file(b"./"),), "no name"),
    "a long name": ((file(b"n" * 256),), "more than 255 bytes"),
    "a long name on the way": ((file(b"n" * 256 + b"/f"),), "more than 255 bytes"),
    "too deep": ((file(b"d/" * 1025 + b"f"),), "more than 1024 levels"),
    "through a symlink": ((TarItem(b"s", "symlink", link=b"/etc"), file(b"s/passwd")), "not a directory"),
    "through a file": ((file(b"d/f"), file(b"d/f/g")), "not a directory"),
    "through a hard link": ((file(b"f"), link(b"l", b"f"), file(b"l/g")), "not a directory"),
    "into what was a directory": ((file(b"d/e/f"), file(b"d"), file(b"d/e/g")), "not a directory"),
    "through a device": ((TarItem(b"n", "char", rdev=(1, 3)), file(b"n/f")), "not a directory"),
    "through a whiteout": ((file(b".wh.d/f"),), "through a whiteout"),
    "a whiteout of nothing": ((file(b".wh."),), "nothing that can be hidden"),
    "a whiteout of itself": ((file(b"d/.wh.."),), "nothing that can be hidden"),
    "a whiteout of the parent": ((file(b"d/.wh..."),), "nothing that can be hidden"),
    "a whiteout of a long name": ((whiteout(b"d/" + b"n" * 256),), "more than 255 bytes"),
    "a symlink to nothing": ((TarItem(b"s", "symlink"),), "a symlink to nothing"),
    "a link to a directory": ((directory(b"d"), link(b"l", b"d")), "which is a directory"),
    "a link to an implied directory": ((file(b"d/f"), link(b"l", b"d")), "which is a directory"),
    "a link to the root": ((link(b"l", b"/"),), "which is no file"),
    "a link to itself": ((file(b"l"), link(b"l", b"./l")), "to itself"),
    "a link out of the tree": ((link(b"l", b"../x"),), "'..'"),
    "a link through a symlink": (
        (TarItem(b"s", "symlink", link=b"d"), file(b"d/f"), link(b"l", b"s/f")),
        "through what is not a directory",
    ),
    "a link to a whiteout": ((whiteout(b"f"), link(b"l", b"f")), "which the layer hides"),
    "a link to a later whiteout": ((link(b"l", b"d/f"), whiteout(b"d/f")), "which the layer hides"),
    "a link into a hidden directory": ((link(b"l", b"d/e/f"), whiteout(b"d")), "which the layer hides"),
    "a link into an opaque directory": ((link(b"l", b"d/f"), opaque(b"d")), "which the layer hides"),
    "a link to a whiteout's name": ((file(b".wh.f"), link(b"l", b".wh.f")), "which is no file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    items, why = REFUSED[name]
    with pytest.raises(IntegrityError, match=why) as caught:
        built(*items)
    assert "tar entry" in caught.value.message
    assert "at offset" in caught.value.message


def test_a_nul_in_a_path_is_refused() -> None:
    [entry] = entries_of((file(b"a"),))
    for path in (b"a\0b", b"a\0/b", b"a/b\0/"):
        entry.path = path
        with pytest.raises(IntegrityError, match="NUL"):
            TreeBuilder().add(entry)


def test_rows_and_metadata_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.index.build.MAX_ROWS", 10)
    built(file(b"1/2/3/4/5/6/7/8/9"))
    with pytest.raises(IntegrityError, match="more than 10 names"):
        built(file(b"1/2/3/4/5/6/7/8/9/10"))
    with pytest.raises(IntegrityError, match="more than 10 names"):
        built(*(whiteout(b"%d" % n) for n in range(10)))
    monkeypatch.setattr("veneer.index.build.MAX_TEXT", 100)
    too_much = (
        TarItem(b"f", xattrs=((b"user.a", bytes(100)),)),
        TarItem(b"s", "symlink", link=b"t" * 100),
        TarItem(b"h", pieces=tuple((n * 9, b"x") for n in range(7)), size=100),
        link(b"l", b"far/" + b"t" * 97),
        file(b"n" * 101),
    )
    for item in too_much:
        with pytest.raises(IntegrityError, match="more than 100 bytes of metadata"):
            built(item)


@st.composite
def hostile_entries(draw: st.DrawFn) -> list[TarEntry]:
    """Few names, so that they collide in every way."""
    names = st.sampled_from(
        [b"a", b"b", b".", b"..", b"", b".wh.a", b".wh..wh..opq", b".wh..wh.x", b"a\0", b".wh.."]
    )
    path = st.lists(names, min_size=1, max_size=4).map(b"/".join)
    kind = st.sampled_from(["file", "dir", "symlink", "link", "char", "block", "fifo"])
    items = draw(st.lists(st.tuples(path, kind, path), max_size=12))
    return [
        TarEntry(p, k, 0o644, 0, 0, 0, 0, 512, 0, target, (1, 3), {}, None, 512 * number)
        for number, (p, k, target) in enumerate(items)
    ]


@given(hostile_entries())
@settings(deadline=None, max_examples=400)
def test_a_tree_is_well_formed_or_refused(entries: list[TarEntry]) -> None:
    builder = TreeBuilder("keep")
    try:
        for entry in entries:
            builder.add(entry)
        tree = builder.finish()
    except IntegrityError:
        return
    assert decode_tree(encode_tree(tree), 1 << 40).names == tree.names


ANY_ORDER = (
    directory(b"./", mode=0o700),
    directory(b"d", mode=0o711),
    file(b"d/f"),
    file(b"d/implied/g"),
    whiteout(b"d/gone"),
    whiteout(b"d/implied"),
    opaque(b"e"),
    directory(b"e/sub"),
    TarItem(b"e/s", "symlink", link=b"t"),
    link(b"far", b"somewhere/else"),
)


@given(st.permutations(ANY_ORDER))
@settings(deadline=None, max_examples=50)
def test_order_means_nothing_where_paths_are_there_once(items: list[TarItem]) -> None:
    tree, _ = built(*items)
    expected, _ = built(*ANY_ORDER)
    assert (tree.names, tree.mode, tree.first_child, tree.far_links, tree.opaque) == (
        expected.names,
        expected.mode,
        expected.first_child,
        expected.far_links,
        expected.opaque,
    )
