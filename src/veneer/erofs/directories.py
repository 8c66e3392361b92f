"""Directories as EROFS keeps them: blocks of entries, in each a table of twelve bytes an entry, then the names.

Names are in the order of their bytes, ``.`` and ``..`` among them, because the kernel searches by halves. The
tables of all directories are made as one, so that an entry costs next to no Python.
"""

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise, repeat
from operator import add, sub
from typing import Final, NamedTuple

from veneer.erofs.ondisk import BLOCK, DIRENT_SIZE, NAME_MAX
from veneer.errors import UnsupportedFormat

__all__ = ["Directories", "Directory"]

#: An entry in words of 32 bits: a nid has two; name offset and type share one.
_WORDS: Final = DIRENT_SIZE // 4
_DOTS: Final = (b".", b"..")
_DOTS_LENGTH: Final = 3


class Directory(NamedTuple):
    """A directory, and how much room its names take.

    Args:
        node: the directory.
        size: bytes, the last block as far as it is used.
        tail: bytes used of the last block.
    """

    node: int
    size: int
    tail: int


class Directories:
    """The names of all directories, cut into blocks before anybody knows the nids."""

    def __init__(self) -> None:
        #: Of all directories, one after the other.
        self._names: list[bytes] = []
        self._nodes: list[int] = []
        #: First entry of each block, and the number of entries.
        self._cuts = [0]
        #: Of each directory, the number of its blocks.
        self._blocks: list[int] = []

    def add(self, node: int, parent: int, children: Mapping[bytes, int]) -> Directory:
        """One more directory.

        Args:
            node: the directory.
            parent: what ``..`` leads to; the root's is itself.
            children: name -> node, in the order of the names.
        """
        names, nodes = self._names, self._nodes
        first = len(names)
        if next(iter(children), b"~") > _DOTS[1]:
            names += _DOTS
            nodes += node, parent
            names += children
            nodes += children.values()
        else:
            own, targets = list(children), list(children.values())
            for name, target in zip(_DOTS, (node, parent), strict=True):
                place = bisect_left(own, name)
                own.insert(place, name)
                targets.insert(place, target)
            names += own
            nodes += targets
        count = len(names) - first
        used = DIRENT_SIZE * count + _DOTS_LENGTH + sum(map(len, children))
        if used <= BLOCK:
            self._cuts.append(first + count)
            self._blocks.append(1)
            return Directory(node, used, used)
        return self._cut(node, first)

    def _cut(self, node: int, first: int) -> Directory:
        """Cut the names from ``first`` on into blocks."""
        lengths = map(len, self._names[first:])
        # What the entries before each one take.
        used = list(accumulate(map(add, lengths, repeat(DIRENT_SIZE)), initial=0))
        cuts = [0]
        while cuts[-1] < len(used) - 1:
            cuts.append(bisect_right(used, used[cuts[-1]] + BLOCK) - 1)
            if cuts[-1] == cuts[-2]:
                raise _too_long(len(self._names[first + cuts[-1]]))
        self._cuts += (first + cut for cut in cuts[1:])
        self._blocks.append(len(cuts) - 1)
        tail = used[-1] - used[cuts[-2]]
        return Directory(node, BLOCK * (len(cuts) - 2) + tail, tail)

    def pack(self, nids: Sequence[int], types: Sequence[int]) -> Iterator[bytes]:
        """The blocks of each directory, in the order of :meth:`add`; the last block as far as it is used.

        Args:
            nids: by node.
            types: dirent types by node, shifted left by 16 bits.

        Raises UnsupportedFormat for a name that is too long.
        """
        starts = list(accumulate(map(len, self._names), initial=0))
        longest = max(map(len, self._names), default=0)
        if longest > NAME_MAX:
            raise _too_long(longest)
        tables, names = self._tables(starts, nids, types), b"".join(self._names)
        blocks = pairwise(self._cuts)
        for number in self._blocks:
            parts: list[bytes] = []
            for left in reversed(range(number)):
                first, end = next(blocks)
                parts.append(tables[DIRENT_SIZE * first : DIRENT_SIZE * end])
                parts.append(names[starts[first] : starts[end]])
                if left:
                    parts.append(bytes(BLOCK - DIRENT_SIZE * (end - first) - starts[end] + starts[first]))
            yield b"".join(parts)

    def _tables(self, starts: Sequence[int], nids: Sequence[int], types: Sequence[int]) -> bytes:
        """All entries without their names; ``starts`` is where names start when they are laid end to end."""
        cuts, nodes = self._cuts, self._nodes
        counts = list(map(sub, cuts[1:], cuts))
        # In its block a name is behind the table.
        shifts = [DIRENT_SIZE * count - starts[first] for first, count in zip(cuts, counts, strict=False)]
        offsets = map(add, starts, chain.from_iterable(map(repeat, shifts, counts)))
        words = array("I", bytes(DIRENT_SIZE * len(nodes)))
        numbers = array("Q", map(nids.__getitem__, nodes))
        if sys.byteorder == "big":
            numbers.byteswap()
        halves = array("I", numbers.tobytes())
        words[::_WORDS], words[1::_WORDS] = halves[::2], halves[1::2]
        last = array("I", map(add, offsets, map(types.__getitem__, nodes)))
        if sys.byteorder == "big":
            last.byteswap()
        words[2::_WORDS] = last
        return words.tobytes()


def _too_long(length: int) -> UnsupportedFormat:
    return UnsupportedFormat(f"a name has {length} bytes, more than Linux allows")
