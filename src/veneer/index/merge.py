"""Layers to one tree: what overlayfs would show if every layer were unpacked into a directory of its own.

The result is made of the layers' own columns, laid end to end, so a row costs next to nothing unless an upper
layer touches its directory. Whiteouts and opaque directories hide, names of upper layers win, directories
merge with directories and with nothing else, hard links end at one node.

Symbolic links are never followed: neither a layer's paths nor its hard links can leave the place they name.
Trees are believed to be well formed, as the builder and the wire format make them.
"""

import stat
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, compress
from typing import Final, TypeVar

from veneer.errors import IntegrityError
from veneer.index.columns import plane
from veneer.index.model import (
    IMPLICIT_DIR,
    WHITEOUT,
    ImageIndex,
    LayerIndex,
    LayerTree,
    MetadataPolicy,
)

__all__ = ["merge"]

#: A directory that no layer describes is what unpackers make of it: root's, at the beginning of time.
_DEFAULT_DIR_MODE: Final = stat.S_IFDIR | 0o755

_Children = dict[int, dict[bytes, int]]
_Fact = TypeVar("_Fact")


def merge(layers: Sequence[LayerIndex], policy: MetadataPolicy | None = None) -> ImageIndex:
    """The image that ``layers`` (lowest first) make; ``policy`` is recorded in it.

    Raises IntegrityError when a hard link leads to nothing in the layers below, or to a directory.
    """
    trees = [layer.tree for layer in layers] or [_empty_tree()]
    bases = list(accumulate(map(len, trees), initial=0))[:-1]
    overlay = _Overlay()
    for number, (tree, base) in enumerate(zip(trees, bases, strict=True), 1):
        overlay.add(tree, base, f"layer {number} of {len(trees)}")
    children, nlink = overlay.reachable(sum(map(len, trees)))
    index = ImageIndex(
        devices=tuple(layer.device for layer in layers),
        bases=bases,
        root=overlay.root,
        children=children,
        mode=_joined(tree.mode for tree in trees),
        uid=_joined(tree.uid for tree in trees),
        gid=_joined(tree.gid for tree in trees),
        mtime_ns=_joined(tree.mtime_ns for tree in trees),
        size=_joined(tree.size for tree in trees),
        data=_joined(tree.data for tree in trees),
        nlink=nlink,
        targets=_facts((tree.targets for tree in trees), bases),
        rdevs=_facts((tree.rdevs for tree in trees), bases),
        xattrs=_facts((tree.xattrs for tree in trees), bases),
        segments=_facts((tree.segments for tree in trees), bases),
        policy=MetadataPolicy() if policy is None else policy,
    )
    for node in overlay.undescribed:
        index.mode[node] = _DEFAULT_DIR_MODE
        index.uid[node] = index.gid[node] = index.mtime_ns[node] = 0
    return index


def _empty_tree() -> LayerTree:
    """What an image without layers shows: a root that nothing describes."""
    zero = array("q", [0])
    return LayerTree([b""], array("q", [IMPLICIT_DIR]), zero, zero, zero, zero, zero, zero, zero)


def _joined(columns: "Iterable[array[int]]") -> "array[int]":
    joined = array("q")
    for column in columns:
        # Equal item sizes are copied in one piece; anything else has to be converted item by item.
        joined.extend(column if column.typecode == joined.typecode else array("q", column.tolist()))
    return joined


def _facts(parts: Iterable[dict[int, _Fact]], bases: Iterable[int]) -> dict[int, _Fact]:
    """Rare facts by row of each layer as facts by node."""
    facts: dict[int, _Fact] = {}
    for part, base in zip(parts, bases, strict=True):
        facts.update({base + row: fact for row, fact in part.items()} if base else part)
    return facts


def _rows(types: bytes, *kinds: int) -> list[int]:
    """Rows whose type is one of ``kinds``, ascending; ``types`` has the upper byte of each mode."""
    wanted = types.translate(bytes(stat.S_IFMT(byte << 8) in kinds for byte in range(256)))
    return list(compress(range(len(types)), wanted)) if any(wanted) else []


class _Overlay:
    """The names of the layers added so far: which node each leads to.

    ``children`` holds every reachable directory, the empty ones too, and may hold hidden ones; a node is a
    directory exactly if it is a key.
    """

    def __init__(self) -> None:
        self.children: _Children = {}
        self.root = 0
        #: Nodes of directories that their layer implies; those that exist below are never reachable.
        self.undescribed: list[int] = []

    def add(self, tree: LayerTree, base: int, what: str) -> None:
        """Lay one layer, whose row r is node ``base + r``, over the others."""
        types = plane(tree.mode, 1)
        directories = _rows(types, stat.S_IFDIR, IMPLICIT_DIR)
        if not directories or directories[0] != 0:
            raise IntegrityError(f"{what}: its root is not a directory")
        implied = set(_rows(types, IMPLICIT_DIR))
        whiteouts = _rows(types, WHITEOUT)
        nodes = self._nodes(tree, base, what)
        self.undescribed += [base + row for row in implied]

        below: dict[int, int] = {}  # directory row -> the directory it is laid over
        if self.children:
            below[0] = self.root
            if 0 in implied:
                nodes[0] = self.root
        self.root = nodes[0]
        whiteouts.reverse()
        names, first_child, child_count = tree.names, tree.first_child, tree.child_count
        # Breadth first, child ranges follow each other: whiteouts are met in their order.
        for row in directories:
            first = first_child[row]
            end = first + child_count[row]
            kids = dict(zip(names[first:end], nodes[first:end], strict=True))
            if (lower := below.pop(row, None)) is not None:
                under = self.children.pop(lower)
                if under and row not in tree.opaque:
                    for child in directories[bisect_left(directories, first) : bisect_left(directories, end)]:
                        found = under.get(names[child])
                        if found is not None and found in self.children:
                            below[child] = found
                            if child in implied:
                                kids[names[child]] = nodes[child] = found
                    before = len(under)
                    under.update(kids)
                    kids = dict(sorted(under.items())) if before < len(under) else under
            while whiteouts and whiteouts[-1] < end:
                kids.pop(names[whiteouts.pop()])
            self.children[nodes[row]] = kids

    def _nodes(self, tree: LayerTree, base: int, what: str) -> list[int]:
        """The node that each row's name leads to, hard links resolved."""
        nodes = list(range(base, base + len(tree)))
        for row, target in tree.links.items():
            nodes[row] = base + target
        for row, path in tree.far_links.items():
            nodes[row] = self._inode(path, what)
        return nodes

    def _inode(self, path: bytes, what: str) -> int:
        """The node at ``path`` in the layers added so far, for another name of it."""
        node: int | None = self.root
        for name in path.split(b"/"):
            kids = self.children.get(node) if node is not None else None
            node = kids.get(name) if kids is not None else None
        if node is None:
            raise IntegrityError(f"{what}: a hard link leads to {path!r}, which the layers below do not have")
        if node in self.children:
            raise IntegrityError(f"{what}: a hard link leads to {path!r}, which is a directory")
        return node

    def reachable(self, count: int) -> "tuple[_Children, array[int]]":
        """The directories that names lead to, parents first, and the link counts of ``count`` nodes."""
        children: _Children = {}
        subdirectories = []
        pending = [self.root]
        for node in pending:
            children[node] = kids = self.children[node]
            directories = list(filter(self.children.__contains__, kids.values()))
            subdirectories.append(len(directories))
            pending += directories
        nlink = [0] * count
        for node in chain.from_iterable(map(dict.values, children.values())):
            nlink[node] += 1
        for node, number in zip(pending, subdirectories, strict=True):
            nlink[node] = 2 + number
        return children, array("q", nlink)
