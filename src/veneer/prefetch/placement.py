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


class _Files:
    """The files of one layer that can be in packs, by their place on its device."""

    def __init__(self, index: ImageIndex, number: int) -> None:
        first = index.bases[number]
        past = index.bases[number + 1] if number + 1 < len(index.bases) else len(index.mode)
        data, size = index.data, index.size
        self.nodes = sorted(
            (
                node
                for node in range(first, past)
                if size[node]
                and index.nlink[node]
                and data[node] % BLOCK == 0
                and stat.S_ISREG(index.mode[node])
                and node not in index.segments
            ),
            key=data.__getitem__,
        )
        self.starts = [data[node] for node in self.nodes]
        self._size = size

    def overlapping(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Of each file that has bytes in the range: its node, where it starts on the device, and its size."""
        at = max(0, bisect_right(self.starts, offset) - 1)
        while at < len(self.nodes) and self.starts[at] < end:
            node = self.nodes[at]
            if self.starts[at] + self._size[node] > offset:
                yield node, self.starts[at], self._size[node]
            at += 1


def hot_ranges(index: ImageIndex, ranges: Iterable[Range], most: int) -> list[Range]:
    """The whole chunks of files that ranges touch, in the order of first touch, each once; neighbours joined.

    Args:
        index: the image.
        ranges: as a profile has them; those of other layers, or of no file, are passed over.
        most: bytes in all, at most; what comes later is left out.
    """
    numbers = {device.diff_id: number for number, device in reversed(list(enumerate(index.devices)))}
    # Layers may be the same device; what one of them hides another one may show.
    same = defaultdict(list)
    for number, device in enumerate(index.devices):
        same[device.diff_id].append(number)
    files: dict[int, _Files] = {}
    seen: set[tuple[Digest, int]] = set()
    hot: list[Range] = []
    total = 0
    for layer, offset, length in ranges:
        if layer not in numbers:
            continue
        limit = index.devices[numbers[layer]].spans.size
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
                    if total + stored > most:
                        return hot
                    seen.add((layer, start + begin))
                    total += stored
                    if hot and hot[-1].layer == layer and hot[-1].offset + hot[-1].length == start + begin:
                        hot[-1] = hot[-1]._replace(length=hot[-1].length + stored)
                    else:
                        hot.append(Range(layer, start + begin, stored))
    return hot


def placements(index: ImageIndex, packs: Sequence[PackIndex]) -> dict[int, list[Extent]]:
    """For ``write_erofs``: where the files are that have bytes in packs, its further devices, in order.

    Of several packs with the same bytes the first one has them.
    """
    hot: dict[int, dict[int, tuple[int, int]]] = {}
    by_layer: Mapping[Digest, list[tuple[int, Place]]] = defaultdict(list)
    for number, one in enumerate(packs, len(index.devices)):
        for place in one.places:
            by_layer[place.layer].append((number, place))
    for number, device in enumerate(index.devices):
        if device.diff_id not in by_layer:
            continue
        table = _Files(index, number)
        for pack, place in by_layer[device.diff_id]:
            for node, start, size in table.overlapping(place.offset, place.offset + place.length):
                chunks = hot.setdefault(node, {})
                for chunk, at in _chunks(place, start, size):
                    chunks.setdefault(chunk, (pack, at))
    return {node: _extents(index, node, chunks) for node, chunks in hot.items() if chunks}


def _chunks(place: Place, start: int, size: int) -> Iterator[tuple[int, int]]:
    """The whole chunks of a file that a place has, and where they are in the pack."""
    chunk = chunk_size(size)
    low, high = place.offset - start, place.offset + place.length - start
    for begin in range(max(0, -(-low // chunk)) * chunk, min(high, size), chunk):
        if min(begin + chunk, size) <= high:
            yield begin, place.at + begin - low


def _extents(index: ImageIndex, node: int, chunks: Mapping[int, tuple[int, int]]) -> list[Extent]:
    """The file in pieces: those that are in packs, and between them those of its layer."""
    size, data, layer = index.size[node], index.data[node], index.device_of(node)
    chunk = chunk_size(size)
    out: list[Extent] = []

    def add(begin: int, device: int, offset: int, length: int) -> None:
        if out and (last := out[-1]).device == device and last.offset + last.length == offset:
            out[-1] = last._replace(length=last.length + length)
        else:
            out.append(Extent(begin, device, offset, length))

    end = 0
    for begin in sorted(chunks):
        if begin > end:
            add(end, layer, data + end, begin - end)
        length = min(chunk, size - begin)
        add(begin, *chunks[begin], length)
        end = begin + length
    if end < size:
        add(end, layer, data + end, size - end)
    return out
