"""Directories as EROFS keeps them: blocks of entries, in each a table of twelve bytes an entry, then the names.

Names are in the order of their bytes, ``.`` and ``..`` among them, because the kernel searches by halves.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import add
from typing import Final

from veneer.erofs.ondisk import BLOCK, DIRENT_SIZE, NAME_MAX
from veneer.errors import UnsupportedFormat

__all__ = ["Directory"]

#: Packers of a block's table by its number of entries: a nid and, in one word, name offset and type of each.
_TABLES: Final = [struct.Struct("<" + "QI" * count) for count in range(BLOCK // DIRENT_SIZE + 1)]


class Directory:
    """The names of one directory, cut into blocks before anybody knows the nids.

    Args:
        node: the directory.
        parent: what ``..`` leads to; the root's is itself.
        children: name -> node, in the order of the names.

    Attributes:
        size: bytes, the last block as far as it is used.
        tail: bytes used of the last block.
    """

    __slots__ = ("_cuts", "_names", "_nodes", "_starts", "node", "size", "tail")

    def __init__(self, node: int, parent: int, children: Mapping[bytes, int]) -> None:
        names, nodes = list(children), list(children.values())
        for name, target in ((b".", node), (b"..", parent)):
            place = bisect_left(names, name)
            names.insert(place, name)
            nodes.insert(place, target)
        lengths = list(map(len, names))
        if max(lengths) > NAME_MAX:
            raise UnsupportedFormat(f"a name has {max(lengths)} bytes, more than Linux allows")
        self.node = node
        self._names, self._nodes = names, nodes
        #: Where each name starts if all of them are laid end to end.
        self._starts = list(accumulate(lengths, initial=0))
        #: First entry of each block, and the number of entries.
        self._cuts = self._cut()
        first, end = self._cuts[-2:]
        self.tail = DIRENT_SIZE * (end - first) + self._starts[end] - self._starts[first]
        self.size = BLOCK * (len(self._cuts) - 2) + self.tail

    def _cut(self) -> list[int]:
        count = len(self._names)
        if DIRENT_SIZE * count + self._starts[-1] <= BLOCK:
            return [0, count]
        # What the entries before each one take.
        used = list(map(add, self._starts, range(0, DIRENT_SIZE * count + 1, DIRENT_SIZE)))
        cuts = [0]
        while cuts[-1] < count:
            cuts.append(bisect_right(used, used[cuts[-1]] + BLOCK) - 1)
        return cuts

    def pack(self, nids: Sequence[int], types: Sequence[int]) -> bytes:
        """All blocks, the last one as far as it is used.

        Args:
            nids: by node.
            types: dirent types by node, shifted left by 16 bits.
        """
        names, nodes, starts = self._names, self._nodes, self._starts
        blocks: list[bytes] = []
        for first, end in zip(self._cuts, self._cuts[1:], strict=False):
            count = end - first
            some = nodes[first:end]
            shift = DIRENT_SIZE * count - starts[first]
            table = [0] * (2 * count)
            table[::2] = map(nids.__getitem__, some)
            table[1::2] = [
                start + shift + types[node] for start, node in zip(starts[first:end], some, strict=True)
            ]
            blocks += _TABLES[count].pack(*table), *names[first:end]
            if end < len(names):
                blocks.append(bytes(BLOCK - DIRENT_SIZE * count - starts[end] + starts[first]))
        return b"".join(blocks)
