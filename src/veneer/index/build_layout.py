"""A layer's nodes, linked by name, laid out as the columns of a :class:`~veneer.index.model.LayerTree`."""

import stat
from array import array

from veneer.index.model import IMPLICIT_DIR, LINK, WHITEOUT, LayerTree, Xattrs

__all__ = ["Node", "lay_out"]


class Node:
    """An inode, or what stands for one: LINK (into the layers below), WHITEOUT, IMPLICIT_DIR.

    Hard links are several names of one node. A node is a directory exactly if it has ``children``.
    """

    __slots__ = (
        "children",
        "data",
        "gid",
        "hidden",
        "mode",
        "mtime_ns",
        "opaque",
        "rdev",
        "row",
        "segments",
        "size",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, children: "dict[bytes, Node] | None" = None) -> None:
        self.mode = mode
        self.uid = self.gid = self.mtime_ns = self.size = self.data = 0
        self.children = children
        #: Names that the layer hides in this directory.
        self.hidden: set[bytes] | None = None
        self.opaque = False
        #: Of a symlink, or the path of a link into the layers below.
        self.target = b""
        self.rdev: tuple[int, int] | None = None
        self.xattrs: Xattrs = ()
        self.segments: tuple[tuple[int, int], ...] | None = None
        #: Where the inode is, once it has a row.
        self.row = -1


def lay_out(root: Node) -> LayerTree:
    """The tree below ``root``, breadth first; the first row that an inode's names get is the inode's.

    Uses the nodes up: each tree can be laid out once.
    """
    names, rows = [b""], [root]
    first_child, child_count = array("q"), array("q")
    links: dict[int, int] = {}
    far_links: dict[int, bytes] = {}
    another_name = Node(LINK)
    for node in rows:  # grows while it is walked
        if node.children is None:
            first_child.append(0)
            child_count.append(0)
            continue
        kids = _with_whiteouts(node, node.children)
        first_child.append(len(rows) if kids else 0)
        child_count.append(len(kids))
        for name in sorted(kids):
            child = kids[name]
            if child.row >= 0:
                links[len(rows)] = child.row
                child = another_name
            elif child.mode == LINK:
                far_links[len(rows)] = child.target
            elif child.mode != WHITEOUT:
                child.row = len(rows)
            names.append(name)
            rows.append(child)
    return LayerTree(
        names=names,
        mode=array("q", [node.mode for node in rows]),
        uid=array("q", [node.uid for node in rows]),
        gid=array("q", [node.gid for node in rows]),
        mtime_ns=array("q", [node.mtime_ns for node in rows]),
        size=array("q", [node.size for node in rows]),
        data=array("q", [node.data for node in rows]),
        first_child=first_child,
        child_count=child_count,
        targets={row: node.target for row, node in enumerate(rows) if node.target and node.mode != LINK},
        links=links,
        far_links=far_links,
        rdevs={row: node.rdev for row, node in enumerate(rows) if node.rdev is not None},
        xattrs={row: node.xattrs for row, node in enumerate(rows) if node.xattrs},
        segments={row: node.segments for row, node in enumerate(rows) if node.segments is not None},
        opaque=frozenset(row for row, node in enumerate(rows) if node.opaque),
    )


def _with_whiteouts(node: Node, kids: dict[bytes, Node]) -> dict[bytes, Node]:
    """The directory's names with those that it hides: as whiteouts, or as opaque directories."""
    for name in node.hidden or ():
        child = kids.get(name)
        if child is None:
            kids[name] = Node(WHITEOUT)
        elif child.children is not None:
            child.opaque = True
            if child.mode & ~0o7777 == IMPLICIT_DIR:
                # The one below is gone, so there is nothing to take the attributes from.
                child.mode = stat.S_IFDIR | 0o755
    return kids
