"""Paths of a process in a container: symlinks are followed inside the image, and ``..`` stops at its root.

So nothing ever leads to the files of this host.
"""

import stat
from collections.abc import Iterable
from typing import NamedTuple

from veneer.errors import NotFound
from veneer.index.model import ImageIndex

__all__ = ["ACCOUNT_FILES", "MAX_SYMLINKS", "Located", "find", "locate", "paths_to"]

#: What is read of an image before every container: who its users and groups are.
ACCOUNT_FILES = (b"etc/passwd", b"etc/group")
#: Symlinks on one path, as in Linux.
MAX_SYMLINKS = 40


class Located(NamedTuple):
    """A node, and the one path to it that leads over no symlink (no slash in front; ``b""`` is the root)."""

    node: int
    path: bytes


def find(index: ImageIndex, path: bytes, what: str, *, follow: bool = True) -> int:
    """The node at ``path``; a symlink at its end is followed only if ``follow``.

    Args:
        index: the image.
        path: from its root, whether a slash is in front or not.
        what: names the image in errors.
        follow: whether a symlink at the end of the path is followed.

    Raises:
        NotFound: no such file, a component is not a directory, or symlinks lead in circles.
    """
    return locate(index, path, what, follow=follow).node


def locate(index: ImageIndex, path: bytes, what: str, *, follow: bool = True) -> Located:
    """The same, with the path that one gets to without symlinks."""
    shown = path.decode(errors="backslashreplace")
    pending = [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]
    trail: list[tuple[int, bytes]] = [(index.root, b"")]
    links = 0
    while pending:
        name = pending.pop()
        at = trail[-1][0]
        if not stat.S_ISDIR(index.mode[at]):
            raise NotFound(f"{what}: {shown}: not a directory")
        if name == b"..":
            del trail[max(1, len(trail) - 1) :]
            continue
        node = index.children.get(at, {}).get(name)
        if node is None:
            raise NotFound(f"{what}: {shown}: no such file or directory")
        if stat.S_ISLNK(index.mode[node]) and (pending or follow):
            links += 1
            if links > MAX_SYMLINKS:
                raise NotFound(f"{what}: {shown}: too many levels of symbolic links")
            target = index.targets[node]
            if target.startswith(b"/"):
                del trail[1:]
            pending += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
            continue
        trail.append((node, name))
    return Located(trail[-1][0], b"/".join(name for _, name in trail[1:]))


def paths_to(index: ImageIndex, nodes: Iterable[int]) -> dict[int, bytes]:
    """A path of each node that is no directory and that a name leads to, without a slash in front."""
    children, wanted = index.children, set(nodes)
    sought = wanted | children.keys()
    above: dict[int, tuple[int, bytes]] = {}
    for folder, entries in children.items():
        if not sought.isdisjoint(entries.values()):
            for name, node in entries.items():
                if node in sought:
                    above.setdefault(node, (folder, name))
    paths = {index.root: b""}
    for folder in children:  # breadth first: whatever is above one has been there
        if folder in above:
            parent, name = above[folder]
            paths[folder] = paths[parent] + name + b"/"
    return {node: paths[above[node][0]] + above[node][1] for node in wanted if node in above}
