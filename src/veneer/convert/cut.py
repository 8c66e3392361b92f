"""Where a tar stream is cut into spans.

Invariant: the cuts are a function of the tar's content alone, whatever pieces it arrived in; they tile the
stream, and no span is longer than :data:`MAX_SPAN`. The rules, in words:

- The data of a large file begin a span and are cut every :data:`FRAME_SIZE` bytes, so that aligned reads of
  the file touch one span each. Its header stays with what came before.
- Everything else (headers, small files, the tail of a large file, the padding at the end of the archive)
  shares spans with its neighbours as long as they fit into :data:`FRAME_SIZE`; a small file is never split.
- A stretch without file data that is longer than a frame (huge headers, endless padding) is cut every frame.

The figures are measured: docs/decisions/0003-native-layer-frames.md.
"""

from collections import deque
from collections.abc import Iterable, Iterator

from veneer.index.tar import TarEntry

__all__ = ["FRAME_SIZE", "MAX_SPAN", "SMALL_FILE", "SpanCutter"]

#: Bytes of a full span: the kernel's usual read-ahead, and where a longer window stops paying.
FRAME_SIZE = 128 << 10
#: Files up to this size share spans; larger ones start their own.
SMALL_FILE = 64 << 10
#: A frame of neighbours, or one small file behind a header that alone fills a frame.
MAX_SPAN = 2 * FRAME_SIZE + SMALL_FILE

_BLOCK = 512


class SpanCutter:
    """Decides the cuts of one stream. For one thread.

    Args:
        frame_size: bytes of a full span.
        small_file: files up to this size share spans.

    Call :meth:`advance` after each piece with the entries that the piece completed and the position of its
    end; it answers with the cuts up to there. :meth:`finish` gives the rest and the end of the stream.
    """

    def __init__(self, frame_size: int = FRAME_SIZE, small_file: int = SMALL_FILE) -> None:
        self._frame_size = frame_size
        self._small_file = small_file
        self._start = 0  # the last cut that was decided, planned ones included
        self._frontier = 0  # end of the last entry: what follows is headers or padding
        self._planned: deque[Iterator[int]] = deque()
        self._next: int | None = None

    def advance(self, entries: Iterable[TarEntry], position: int) -> list[int]:
        """Cuts not given yet, ascending, up to ``position`` bytes of the stream."""
        for entry in entries:
            self._entry(entry)
        self._gap(position)
        return list(self._until(position))

    def finish(self, size: int) -> list[int]:
        """The last cuts of a stream of ``size`` bytes, and ``size`` itself unless the stream is empty."""
        self._gap(size)
        cuts = [cut for cut in self._until(size) if cut < size]
        return [*cuts, size] if size else []

    def _entry(self, entry: TarEntry) -> None:
        data, end = entry.data, entry.data + entry.stored_size
        self._gap(data)
        if entry.stored_size <= self._small_file:
            self._share(entry.header, end)
        else:
            self._share(entry.header, data)
            cuts = range(data, end, self._frame_size)
            self._plan(cuts[1:] if data == self._start else cuts)
        self._frontier = -(-end // _BLOCK) * _BLOCK

    def _share(self, header: int, end: int) -> None:
        """Keep ``header`` to ``end`` in one span: the open one if it fits, else a new one."""
        if end - self._start > self._frame_size and header > self._start:
            self._plan(range(header, header + 1))

    def _gap(self, end: int) -> None:
        """Cut the stretch from the last entry to ``end`` when it is longer than a frame."""
        if end - self._frontier > self._frame_size:
            first = self._frontier
            if first <= self._start:
                first += ((self._start - first) // self._frame_size + 1) * self._frame_size
            self._plan(range(first, end, self._frame_size))

    def _plan(self, cuts: range) -> None:
        if cuts:
            self._planned.append(iter(cuts))
            self._start = cuts[-1]

    def _until(self, position: int) -> Iterator[int]:
        while True:
            if self._next is None:
                if not self._planned:
                    return
                self._next = next(self._planned[0], None)
                if self._next is None:
                    self._planned.popleft()
                    continue
            if self._next > position:
                return
            yield self._next
            self._next = None
