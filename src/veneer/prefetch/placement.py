"""Between files and packs: which chunks of files a profile touches, and which of them a pack has.

A file that is partly in a pack is mapped chunk by chunk. Chunks are pages: smaller ones would never be read
alone. Only of files so large that EROFS could not hold all their chunks they are larger (:func:`chunk_size`).

Files whose bytes are not aligned to blocks on their device, and sparse ones, are left to their layers.
"""

import stat
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from veneer.index.model import Extent, ImageIndex
from veneer.oci.digest import Digest
from veneer.prefetch.pack import BLOCK, PackIndex, Place

__all__ = ["Range", "chunk_size", "hot_ranges", "placements"]

_PAGE: Final = 4096
#: Chunks that a file may have in a metadata image.
_MOST_CHUNKS: Final = 1 << 18


class Range(NamedTuple):
    """``length`` bytes at ``offset`` of the device of ``layer`` (a diffID)."""

    layer: Digest
    offset: int
    length: int


def chunk_size(size: int) -> int:
    """The chunks that a file of ``size`` bytes is cut into, in bytes: a power of two."""
    return max(_PAGE, (1 << (max(size, 1) - 1).bit_length()) // _MOST_CHUNKS)


#: Whole chunks of a file: from where to where, which pack has them, and where they begin there.
_Run = tuple[int, int, int, int]


class _Files:
    """The files of one layer that can be in packs, by their place on its device."""

    def __init__(self, index: ImageIndex, number: int) -> None:
        first = index.bases[number]
        past = index.bases[number + 1] if number + 1 < len(index.bases) else len(index.mode)
        data, segments = index.data, index.segments
        rows = slice(first, past)
        columns = zip(
            range(first, past), index.size[rows], index.nlink[rows], data[rows], index.mode[rows], strict=True
        )
        files = [
            node
            for node, size, links, place, mode in columns
            if size and links and not place % BLOCK and stat.S_ISREG(mode)
        ]
        self.nodes = sorted(
            [node for node in files if node not in segments] if segments else files, key=data.__getitem__
        )
        self.starts = list(map(data.__getitem__, self.nodes))
        self._size = index.size

    def overlapping(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Of each file that has bytes in the range: its node, where it starts on the device, and its size."""
        at = max(0, bisect_right(self.starts, offset) - 1)
        while at < len(self.nodes) and self.starts[at] < end:
            node = self.nodes[at]
            if self.starts[at] + self._size[node] > offset:
                yield node, self.starts[at], self._size[node]
            at += 1


def hot_ranges(index: ImageIndex, ranges: Iterable[Range], most: int) -> list[Range]:
    """The chunks of files that ranges need, in the order of first need, each once; neighbours joined.

    Who reads a page of a file reads all of it, but tars are not aligned to pages: what is recorded is the pages
    of the device around it, with parts of the files before and after. So a chunk counts once all pages that it
    lies in have been read.

    Args:
        index: the image.
        ranges: as a profile has them; those of other layers, or of no file, are passed over, and what is behind
            the end of a device.
        most: bytes in all, at most; what comes later is left out.
    """
    numbers = {device.diff_id: number for number, device in reversed(list(enumerate(index.devices)))}
    # Layers may be the same device; what one of them hides another one may show.
    same = defaultdict(list)
    for number, device in enumerate(index.devices):
        same[device.diff_id].append(number)
    files: dict[int, _Files] = {}
    read: dict[Digest, set[int]] = defaultdict(set)
    seen: set[tuple[Digest, int]] = set()
    hot: list[Range] = []
    total = 0
    for layer, offset, length in ranges:
        if layer not in numbers:
            continue
        limit = index.devices[numbers[layer]].spans.size
        length = min(length, limit - offset)
        pages = read[layer]
        pages.update(_pages(offset, length))
        for number in same[layer]:
            table = files.get(number) or files.setdefault(number, _Files(index, number))
            for _, start, size in table.overlapping(offset, offset + length):
                chunk = chunk_size(size)
                first = max(0, offset - start) // chunk
                past = -(-min(size, offset + length - start) // chunk)
                for begin in range(first * chunk, past * chunk, chunk):
                    stored = min(chunk, -(-(size - begin) // BLOCK) * BLOCK)
                    if (layer, start + begin) in seen or start + begin + stored > limit:
                        continue
                    if chunk == _PAGE and not pages.issuperset(_pages(start + begin, stored)):
                        continue
                    if total + stored > most:
                        return hot
                    seen.add((layer, start + begin))
                    total += stored
                    if hot and hot[-1].layer == layer and hot[-1].offset + hot[-1].length == start + begin:
                        hot[-1] = hot[-1]._replace(length=hot[-1].length + stored)
                    else:
                        hot.append(Range(layer, start + begin, stored))
    return hot


def _pages(offset: int, length: int) -> range:
    """Numbers of the pages of a device that a range lies in."""
    return range(offset // _PAGE, -(-(offset + length) // _PAGE))


def placements(index: ImageIndex, packs: Sequence[PackIndex]) -> dict[int, list[Extent]]:
    """For ``write_erofs``: where the files are that have bytes in packs, its further devices, in order.

    Of several packs with the same bytes it is the one whose piece begins first.
    """
    hot: dict[int, list[_Run]] = defaultdict(list)
    by_layer: Mapping[Digest, list[tuple[int, Place]]] = defaultdict(list)
    for number, one in enumerate(packs, len(index.devices)):
        for place in one.places:
            by_layer[place.layer].append((number, place))
    for number, device in enumerate(index.devices):
        if device.diff_id not in by_layer:
            continue
        table = _Files(index, number)
        for pack, (_, offset, length, at) in by_layer[device.diff_id]:
            for node, start, size in table.overlapping(offset, offset + length):
                chunk = chunk_size(size)
                # Whole chunks; the file's last one may be short.
                begin = max(0, -(-(offset - start) // chunk)) * chunk
                end = offset + length - start
                end = size if end >= size else end // chunk * chunk
                if begin < end:
                    hot[node].append((begin, end, pack, at + start + begin - offset))
    return {node: _extents(index, node, runs) for node, runs in hot.items()}


def _extents(index: ImageIndex, node: int, runs: list[_Run]) -> list[Extent]:
    """The file in pieces: those that are in packs, and between them those of its layer."""
    size, data, layer = index.size[node], index.data[node], index.device_of(node)
    out: list[Extent] = []
    end = 0
    for begin, past, pack, at in sorted(runs):
        if begin > end:
            out.append(Extent(end, layer, data + end, begin - end))
        # Of what several packs have, a later one has the rest.
        first = max(begin, end)
        if first < past:
            out.append(Extent(first, pack, at + first - begin, past - first))
            end = past
    if end < size:
        out.append(Extent(end, layer, data + end, size - end))
    return out
