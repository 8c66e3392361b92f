"""The files of an image as whoever looks at them as data sees them: by path, in pieces, and not without end.

Everything that is read here was made by somebody else. Parsers say :class:`Malformed` of what is not what it
claims to be; whoever called them goes on without, since what comes of it is a hint.
"""

import stat
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from veneer.errors import NotFound
from veneer.index.model import ImageIndex
from veneer.index.paths import locate

__all__ = ["File", "ImageFiles", "Malformed", "Read", "ReadNode"]

#: Gives ``length`` bytes at ``offset`` of a node, which lie in its size.
ReadNode = Callable[[int, int, int], bytes]
#: Gives up to ``length`` bytes at ``offset`` of one file: fewer at its end.
Read = Callable[[int, int], bytes]

#: What is read of one image at most: the largest start measured looks at 9 MB.
_MOST_READ: Final = 96 << 20
#: What is read at a time at most.
_MOST_AT_ONCE: Final = 16 << 20
#: Most reads are of headers: one piece of each file is fetched once.
_PIECE: Final = 64 << 10
_PIECES: Final = 256


class Malformed(ValueError):
    """A file is not what it claims to be."""


class File(NamedTuple):
    """A regular file.

    Args:
        node: in the image's index.
        path: to it over no symlink, from the root, without a slash in front.
        size: in bytes.
        mtime_s: when it was changed, in seconds since the epoch.
        executable: anybody may run it.
    """

    node: int
    path: bytes
    size: int
    mtime_s: int
    executable: bool


class ImageFiles:
    """The files of one image. For one thread.

    Args:
        index: of the image, whiteouts resolved.
        read: of its contents; what it raises goes through.
        most: bytes that are read in all; of what comes later nothing is to be had.

    Attributes:
        exhausted: whether something was not read because of that.
    """

    def __init__(self, index: ImageIndex, read: ReadNode, most: int = _MOST_READ) -> None:
        self.exhausted = False
        self._index = index
        self._read = read
        self._left = most
        self._pieces: dict[tuple[int, int], bytes] = {}

    def file(self, path: bytes) -> File | None:
        """The regular file that a process finds at ``path``."""
        try:
            node, real = locate(self._index, path, "the image")
        except NotFound:
            return None
        index, mode = self._index, self._index.mode[node]
        if not stat.S_ISREG(mode):
            return None
        return File(node, real, index.size[node], index.mtime_ns[node] // 1_000_000_000, bool(mode & 0o111))

    def directory(self, path: bytes) -> bytes | None:
        """The path over no symlink to a directory, if there is one at ``path``."""
        try:
            node, real = locate(self._index, path, "the image")
        except NotFound:
            return None
        return real if stat.S_ISDIR(self._index.mode[node]) else None

    def names(self, path: bytes) -> Sequence[bytes]:
        """What is in a directory, in order; nothing if it is none."""
        try:
            node, _ = locate(self._index, path, "the image")
        except NotFound:
            return ()
        return tuple(self._index.children.get(node, ()))

    def read(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of a range, as far as they are in the file.

        Raises:
            Malformed: more is asked for than anybody should need.
            VeneerError: what reading reported.
        """
        end = file.size if length is None else min(file.size, offset + length)
        if offset < 0 or end - offset > _MOST_AT_ONCE:
            raise Malformed(f"{end - offset} bytes at {offset} are wanted at once")
        if offset >= end:
            return b""
        if end - offset > _PIECE:
            return self._fetch(file, offset, end)
        first, last = offset // _PIECE, (end - 1) // _PIECE
        found = b"".join(self._piece(file, number) for number in range(first, last + 1))
        return found[offset - first * _PIECE : end - first * _PIECE]

    def reader(self, file: File) -> Read:
        """:meth:`read` of one file."""
        return lambda offset, length: self.read(file, offset, length)

    def _piece(self, file: File, number: int) -> bytes:
        key = file.node, number
        if (piece := self._pieces.get(key)) is None:
            start = number * _PIECE
            piece = self._fetch(file, start, min(file.size, start + _PIECE))
            while len(self._pieces) >= _PIECES:
                del self._pieces[next(iter(self._pieces))]
            self._pieces[key] = piece
        return piece

    def _fetch(self, file: File, offset: int, end: int) -> bytes:
        if end - offset > self._left:
            self.exhausted = True
            raise Malformed("the image is too large to look at all of it")
        self._left -= end - offset
        return self._read(file.node, offset, end - offset)
