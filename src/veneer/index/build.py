"""From the entries of one tar to the tree of one layer.

The result is what the layer says of itself, in the form that :class:`~veneer.index.model.LayerTree` documents,
and does not depend on the order of entries except where the tar does: of entries with one path the last wins, a
file in place of a directory takes its children away, a directory over a directory gives it new attributes.

Decisions where unpackers differ or say nothing:

- A path never leads through a symlink or another non-directory of the same layer; ``..`` is refused.
- A whiteout hides what is below the layer, wherever in the tar it is: an entry of the same name wins, and if it
  is a directory it is opaque. If the layer only implies that directory, it is a new one with default
  attributes. The type of the whiteout's own entry means nothing (containerd and umoci ignore it as well).
- ``.wh..wh.*`` other than the opaque marker is bookkeeping of aufs and left out.
- The root's own entry counts (umoci applies it, containerd does not).
- Names are links to inodes. The attributes in a hard link's header are ignored, as GNU tar and umoci do
  (containerd applies them; writers repeat the inode's, so that both agree). A link to what the layer does not
  have is a link into the layers below; to a directory, to itself or to something that the layer hides it is
  refused.
- A device node that is left out still hides what the layers below have in its place: its row is a whiteout.
- Extended attributes that would drive overlayfs are left out, and those that no Linux file system takes.

Pure and single-threaded; memory is bounded by :data:`MAX_ROWS` and :data:`MAX_TEXT`.
"""

import stat
from collections import Counter
from typing import Final

from veneer.errors import IntegrityError
from veneer.index.build_layout import Node, lay_out
from veneer.index.build_path import WHITEOUT_PREFIX, check_name, components
from veneer.index.model import IMPLICIT_DIR, LINK, OVERLAY_XATTRS, WHITEOUT, LayerTree, Xattrs
from veneer.index.tar_entry import TarEntry, display
from veneer.index.tar_header import MalformedTar

__all__ = ["MAX_ROWS", "MAX_TEXT", "TreeBuilder"]

#: Names of a layer, implied directories and whiteouts included.
MAX_ROWS: Final = 4_000_000
#: Bytes of names, link targets, extended attributes and sparse maps of a layer. Real ones have some megabytes.
MAX_TEXT: Final = 1 << 29
#: Directories whose path is remembered; in nearly all tars the entries of one directory follow each other.
_REMEMBERED_PARENTS: Final = 20_000
#: Memory of one segment of a sparse map, about.
_SEGMENT_COST: Final = 16

_AUFS_PREFIX: Final = WHITEOUT_PREFIX + WHITEOUT_PREFIX
_OPAQUE_MARKER: Final = _AUFS_PREFIX + b".opq"

_MIN_TIME: Final = -(1 << 63)
_MAX_TIME: Final = (1 << 63) - 1

#: Linux gives every symlink these permissions.
_SYMLINK_MODE: Final = stat.S_IFLNK | 0o777
_TYPES: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}

_NAMESPACES: Final = (b"user.", b"trusted.", b"security.", b"system.")


class TreeBuilder:
    """Add every entry in the order of the tar, then finish once.

    Faults are IntegrityErrors that name the entry and its offset; after one the builder must not be used.

    Args:
        devices: ``drop`` or ``keep``: device nodes. (0, 0) character devices are always dropped.

    Attributes:
        dropped: what was left out or clamped, and how many.
    """

    def __init__(self, devices: str = "drop") -> None:
        if devices not in ("drop", "keep"):
            raise ValueError(f"devices must be drop or keep, not {devices!r}")
        self.dropped: Counter[str] = Counter()
        self._keep_devices = devices == "keep"
        self._root = Node(IMPLICIT_DIR | 0o755, {})
        #: Paths as entries spell them -> directory; None where aufs keeps its bookkeeping.
        self._parents: dict[bytes, Node | None] = {}
        self._far: list[tuple[TarEntry, bytes]] = []
        self._rows = 1
        self._text = 0

    def add(self, entry: TarEntry) -> None:
        """Take the next entry of the tar."""
        try:
            self._add(entry)
        except MalformedTar as error:
            raise _refused(entry, error) from error

    def finish(self) -> LayerTree:
        """The tree of all entries."""
        for entry, target in self._far:
            try:
                self._check_far(target)
            except MalformedTar as error:
                raise _refused(entry, error) from error
        return lay_out(self._root)

    def _add(self, entry: TarEntry) -> None:
        head, _slash, name = entry.path.rpartition(b"/")
        if name in (b"", b".", b".."):  # a directory's slash at the end, mostly
            parts = components(entry.path)
            if not parts:
                self._add_root(entry)
                return
            head, name = b"/".join(parts[:-1]), parts[-1]
        else:
            check_name(name)
        parent = self._parents[head] if head in self._parents else self._parent(head)
        if parent is None or (name.startswith(_AUFS_PREFIX) and name != _OPAQUE_MARKER):
            self.dropped["aufs metadata"] += 1
        elif name.startswith(WHITEOUT_PREFIX):
            self._hide(parent, name)
        elif entry.kind == "dir":
            self._add_directory(parent, name, entry)
        elif entry.kind == "link":
            self._place(parent, name, self._linked(entry))
        else:
            self._place(parent, name, self._inode(entry))

    def _add_root(self, entry: TarEntry) -> None:
        if entry.kind != "dir" or not entry.path:
            raise MalformedTar("it has no name")
        self._root.mode = stat.S_IFDIR | entry.mode
        self._describe(self._root, entry)

    def _parent(self, head: bytes) -> Node | None:
        """The directory at ``head``, implied if need be; None inside the bookkeeping of aufs."""
        node = self._root
        found: Node | None = node
        for name in components(head):
            if name.startswith(WHITEOUT_PREFIX):
                if not name.startswith(_AUFS_PREFIX):
                    raise MalformedTar("its path leads through a whiteout")
                found = None
                break
            kids = node.children
            child = kids.get(name) if kids is not None else node
            if child is None:
                child = Node(IMPLICIT_DIR | 0o755, {})
                self._place(node, name, child)
            elif child.children is None:
                raise MalformedTar("its path leads through something that is not a directory")
            found = node = child
        if len(self._parents) >= _REMEMBERED_PARENTS:
            self._parents.clear()
        self._parents[head] = found
        return found

    def _hide(self, parent: Node, name: bytes) -> None:
        if name == _OPAQUE_MARKER:
            parent.opaque = True
            return
        hidden = name[len(WHITEOUT_PREFIX) :]
        if hidden in (b"", b".", b".."):
            raise MalformedTar("a whiteout of nothing that can be hidden")
        if parent.hidden is None:
            parent.hidden = set()
        if hidden not in parent.hidden:
            self._count_row(hidden)
            parent.hidden.add(hidden)

    def _add_directory(self, parent: Node, name: bytes, entry: TarEntry) -> None:
        kids = parent.children
        node = kids.get(name) if kids is not None else None
        if node is None or node.children is None:
            node = Node(stat.S_IFDIR, {})
            self._place(parent, name, node)
        node.mode = stat.S_IFDIR | entry.mode
        self._describe(node, entry)

    def _place(self, parent: Node, name: bytes, node: Node) -> None:
        """Give ``node`` this name, in place of whatever has it."""
        kids = parent.children
        assert kids is not None  # parents are directories
        replaced = kids.get(name)
        if replaced is None:
            self._count_row(name)
        elif replaced.children is not None:
            self._parents.clear()  # some of them were inside
        kids[name] = node

    def _count_row(self, name: bytes) -> None:
        self._rows += 1
        if self._rows > MAX_ROWS:
            raise MalformedTar(f"the layer has more than {MAX_ROWS} names")
        self._count_text(len(name))

    def _count_text(self, length: int) -> None:
        self._text += length
        if self._text > MAX_TEXT:
            raise MalformedTar(f"the layer has more than {MAX_TEXT} bytes of metadata")

    def _inode(self, entry: TarEntry) -> Node:
        """A new inode of anything but a directory."""
        if entry.kind == "file":
            node = Node(stat.S_IFREG | entry.mode)
            node.size = entry.size
            if entry.stored_size:
                node.data = entry.data
            if entry.segments is not None:
                self._count_text(_SEGMENT_COST * len(entry.segments))
                node.segments = entry.segments
        elif entry.kind == "symlink":
            if not entry.link or b"\0" in entry.link:
                raise MalformedTar("a symlink to nothing")
            self._count_text(len(entry.link))
            node = Node(_SYMLINK_MODE)
            node.target = entry.link
        elif entry.kind == "char" and entry.rdev == (0, 0):
            self.dropped["whiteout device"] += 1
            return Node(WHITEOUT)
        elif entry.kind == "fifo" or self._keep_devices:
            node = Node(_TYPES[entry.kind] | entry.mode)
            node.rdev = None if entry.kind == "fifo" else entry.rdev
        else:
            self.dropped["device node"] += 1
            return Node(WHITEOUT)
        self._describe(node, entry)
        return node

    def _describe(self, node: Node, entry: TarEntry) -> None:
        """Give an inode the attributes of its entry."""
        node.uid, node.gid = entry.uid, entry.gid
        node.mtime_ns = entry.mtime_ns
        if not _MIN_TIME <= entry.mtime_ns <= _MAX_TIME:
            self.dropped["clamped time"] += 1
            node.mtime_ns = min(max(entry.mtime_ns, _MIN_TIME), _MAX_TIME)
        node.xattrs = self._kept_xattrs(entry) if entry.xattrs else ()

    def _kept_xattrs(self, entry: TarEntry) -> Xattrs:
        kept = []
        for name, value in sorted(entry.xattrs.items()):
            namespace = name.partition(b".")[0] + b"."
            if name.startswith(OVERLAY_XATTRS):
                self.dropped["overlay xattr"] += 1
            elif (
                namespace not in _NAMESPACES
                or name == namespace
                # Linux has user attributes on these two only.
                or (namespace == b"user." and entry.kind not in ("file", "dir"))
            ):
                self.dropped["unsupported xattr"] += 1
            else:
                self._count_text(len(name) + len(value))
                kept.append((name, value))
        return tuple(kept)

    def _linked(self, entry: TarEntry) -> Node:
        """The node that a hard link is another name of."""
        parts = components(entry.link)
        if not parts or any(part.startswith(WHITEOUT_PREFIX) for part in parts):
            raise MalformedTar(f"a hard link to {display(entry.link)}, which is no file")
        if parts == components(entry.path):
            raise MalformedTar("a hard link to itself")
        node: Node | None = self._root
        for part in parts:
            assert node is not None  # the loop ends when it is
            if node.children is None:
                raise MalformedTar(f"a hard link to {display(entry.link)}, through what is not a directory")
            node = node.children.get(part)
            if node is None:
                far = Node(LINK)
                far.target = b"/".join(parts)
                self._count_text(len(far.target))
                self._far.append((entry, far.target))
                return far
        assert node is not None  # the loop ends when it is
        if node.children is not None:
            raise MalformedTar(f"a hard link to {display(entry.link)}, which is a directory")
        return node

    def _check_far(self, target: bytes) -> None:
        """Raise if the layer hides the path below that one of its hard links leads to."""
        node: Node | None = self._root
        for part in target.split(b"/"):
            if node is None or node.children is None:
                return
            if node.opaque or (node.hidden and part in node.hidden):
                raise MalformedTar(f"a hard link to {display(target)}, which the layer hides")
            node = node.children.get(part)


def _refused(entry: TarEntry, why: MalformedTar) -> IntegrityError:
    return IntegrityError(f"tar entry {display(entry.path)}, header at offset {entry.header}: {why}")
