"""Which file of an image an offset of a device belongs to, and what is worth fetching with a miss there.

Devices know no files, but what to fetch ahead depends on them. The index is asked for when the first miss needs
it: a mount whose metadata image is kept never waits for the index to be decoded.

Invariant: for one device, answers do not depend on the order of questions, but for what :class:`ReadAhead`
remembers of the reader of a large file.
"""

import stat
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable

from veneer.index.model import ImageIndex
from veneer.mount.readahead import ReadAhead
from veneer.oci.digest import Digest

__all__ = ["FileTable"]

#: Large files whose readers are followed at a time; one that is forgotten starts with a small range again.
FOLLOWED = 512
#: Files that are looked at to find the one that a range is of: more than can start in one page.
_CANDIDATES = 64


class FileTable:
    """The files of one image by where their bytes are.

    :meth:`prepare` may be called in any thread; everything else belongs to one event loop, and prepares what it
    needs when that has not been done.

    Args:
        index: gives the tree; is called once, may take long, and from any thread.
    """

    def __init__(self, index: Callable[[], ImageIndex]) -> None:
        self._load = index
        self._index: ImageIndex | None = None
        #: By device: where the stored bytes of its files start, in ascending order, and whose they are.
        self._tables: dict[Digest, tuple[array[int], array[int]]] = {}
        self._preparing = threading.Lock()
        self._followed: OrderedDict[int, ReadAhead] = OrderedDict()

    @property
    def index(self) -> ImageIndex:
        """The tree."""
        if self._index is None:
            self._index = self._load()
        return self._index

    def is_prepared(self, device: Digest) -> bool:
        """Whether questions about the device with this key are answered at once."""
        return device in self._tables

    def prepare(self, device: Digest) -> None:
        """Find out where files are on a device. Takes about 0.1 s for 100,000 files, once."""
        with self._preparing:
            if device not in self._tables:
                self._tables[device] = self._make(device)

    def window(self, device: Digest, offset: int, length: int) -> tuple[int, int]:
        """The range (start, end) of the device worth fetching with a miss."""
        node, start = self.at(device, offset, length)
        ahead = self._followed.get(node)
        if ahead is None:
            size = next(one.spans.size for one in self.index.devices if one.key == device)
            end = max(start + self._stored(node), offset + length)
            ahead = self._followed[node] = ReadAhead(start, min(end, size))
            if len(self._followed) > FOLLOWED:
                self._followed.popitem(last=False)
        else:
            self._followed.move_to_end(node)
        return ahead.window(offset, length)

    def at(self, device: Digest, offset: int, length: int) -> tuple[int, int]:
        """The node of the file that a read of this range is of, and where the file starts.

        That is the one with most bytes in the range: whoever asks may have widened it to whole pages, which
        brings in neighbours. Where no file is, which no read leads to, it is the root with nothing stored.
        """
        if device not in self._tables:
            self.prepare(device)
        starts, nodes = self._tables[device]
        first = max(0, bisect_right(starts, offset) - 1)
        most, best = 0, -1
        for place in range(first, min(bisect_left(starts, offset + length), first + _CANDIDATES)):
            start = starts[place]
            within = min(start + self._stored(nodes[place]), offset + length) - max(start, offset)
            if within > most:
                most, best = within, place
        return (self.index.root, 0) if best < 0 else (nodes[best], starts[best])

    def _make(self, device: Digest) -> "tuple[array[int], array[int]]":
        index, bases = self.index, self.index.bases
        found: list[tuple[int, int]] = []
        # Layers may be the same device: what an upper one has of it hides what the lower one has.
        for number, one in enumerate(index.devices):
            if one.key != device:
                continue
            end = bases[number + 1] if number + 1 < len(bases) else len(index.mode)
            found += (
                (index.data[node], node)
                for node in range(bases[number], end)
                if index.nlink[node] and index.size[node] and stat.S_ISREG(index.mode[node])
            )
        found.sort()
        return array("q", (start for start, _ in found)), array("q", (node for _, node in found))

    def _stored(self, node: int) -> int:
        segments = self.index.segments.get(node)
        return self.index.size[node] if segments is None else sum(length for _, length in segments)
