"""Directories as EROFS keeps them: blocks of entries, in each a table of twelve bytes an entry, then the names.

Names are in the order of their bytes, ``.`` and ``..`` among them, because the kernel searches by halves. Names
and tables of all directories are made as one, so that an entry costs next to no Python.
"""

import stat
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, compress, count, pairwise, repeat
from operator import add, sub
from typing import Final

from veneer.erofs.ondisk import BLOCK, DIRENT_SIZE, FILE_TYPES, NAME_MAX
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.columns import picked

__all__ = ["Directories"]

_IS_DIRECTORY: Final = bytes(kind == FILE_TYPES[stat.S_IFDIR] for kind in range(256))
#: An entry in words of 32 bits: a nid has two; name offset and type share one.
_WORDS: Final = DIRENT_SIZE // 4
_TYPE_AT: Final = 10
_DOTS: Final = (b".", b"..")


class Directories:
    """The names of all directories, cut into blocks before anybody knows the nids.

    Args:
        root: the root directory; its ``..`` leads to itself.
        children: directory -> name -> node, in the order of the names; of every directory, breadth first.
        types: dirent types by node.

    Attributes:
        nodes: every directory, breadth first.
        sizes: of each the bytes, its last block as far as it is used.
        tails: of each the bytes used of its last block.
        entries: the node that each entry of all of them leads to, ``.`` and ``..`` too.

    Raises IntegrityError for directories that are not a tree, UnsupportedFormat for a name that is too long.
    """

    def __init__(self, root: int, children: Mapping[int, dict[bytes, int]], types: bytes) -> None:
        tables = list(children.values())
        self.nodes = list(children)
        nodes = list(chain.from_iterable(map(dict.values, tables)))
        is_directory = bytes(picked(types, nodes)).translate(_IS_DIRECTORY)
        if [root, *compress(nodes, is_directory)] != self.nodes:
            raise IntegrityError("directories are not breadth first, or one is in several places")
        owners = chain.from_iterable(map(repeat, self.nodes, map(len, tables)))
        dots = zip(self.nodes, chain((root,), compress(owners, is_directory)), strict=True)

        # Of all directories, one after the other.
        self._names: list[bytes] = list(chain.from_iterable(chain.from_iterable(zip(repeat(_DOTS), tables))))
        values = map(dict.values, tables)
        self.entries: list[int] = list(chain.from_iterable(chain.from_iterable(zip(dots, values, strict=True))))
        firsts = list(accumulate((len(table) + len(_DOTS) for table in tables), initial=0))
        for number, table in enumerate(tables):
            if next(iter(table), b"~") < _DOTS[1]:
                self._sort(firsts[number], firsts[number + 1])
        self._cut(firsts)

    def _sort(self, first: int, end: int) -> None:
        """Put the dots where they belong among names that begin with one of ``!`` to ``-``."""
        entries = sorted(zip(self._names[first:end], self.entries[first:end], strict=True))
        self._names[first:end] = [name for name, _ in entries]
        self.entries[first:end] = [node for _, node in entries]

    def _cut(self, firsts: Sequence[int]) -> None:
        """Cut directories, which begin at ``firsts``, into blocks."""
        lengths = list(map(len, self._names))
        if max(lengths) > NAME_MAX:
            raise UnsupportedFormat(f"a name has {max(lengths)} bytes, more than Linux allows")
        # Where each name begins when they are laid end to end, and what the entries before it take.
        self._starts = list(accumulate(lengths, initial=0))
        used = list(map(add, self._starts, count(0, DIRENT_SIZE)))
        #: First entry of each block, and the number of entries.
        self._cuts = [0]
        #: Of each directory, the number of its blocks.
        self._blocks: list[int] = []
        self.tails: list[int] = []
        for first, end in pairwise(firsts):
            blocks = 1
            while used[end] - used[first] > BLOCK:
                first = bisect_right(used, used[first] + BLOCK, first, end) - 1
                self._cuts.append(first)
                blocks += 1
            self._cuts.append(end)
            self._blocks.append(blocks)
            self.tails.append(used[end] - used[first])
        self.sizes = [
            BLOCK * (blocks - 1) + tail for blocks, tail in zip(self._blocks, self.tails, strict=True)
        ]

    def pack(self, nids: Sequence[int], types: bytes) -> Iterator[bytes]:
        """The blocks of each directory, in the order of :attr:`nodes`; the last block as far as it is used.

        Args:
            nids: by node.
            types: dirent types by node.
        """
        starts, tables, names = self._starts, self._tables(nids, types), b"".join(self._names)
        blocks = pairwise(self._cuts)
        for number in self._blocks:
            content = b""
            for _ in range(number):
                first, end = next(blocks)
                content = content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0") + (
                    tables[DIRENT_SIZE * first : DIRENT_SIZE * end] + names[starts[first] : starts[end]]
                )
            yield content

    def _tables(self, nids: Sequence[int], types: bytes) -> bytes:
        """All entries without their names."""
        cuts, starts, nodes = self._cuts, self._starts, self.entries
        counts = list(map(sub, cuts[1:], cuts))
        # In its block a name is behind the table.
        shifts = [DIRENT_SIZE * number - starts[first] for first, number in zip(cuts, counts, strict=False)]
        words = array("I", bytes(DIRENT_SIZE * len(nodes)))
        # The upper word of a nid stays 0: one of 33 bits would be beyond 128 GiB.
        words[::_WORDS] = array("I", picked(nids, nodes))
        words[2::_WORDS] = array("I", map(add, starts, chain.from_iterable(map(repeat, shifts, counts))))
        if sys.byteorder == "big":
            words.byteswap()
        table = bytearray(words.tobytes())
        table[_TYPE_AT::DIRENT_SIZE] = bytes(picked(types, nodes))
        return bytes(table)
