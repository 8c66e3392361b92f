"""How much of a file is worth fetching along with a read that has to wait: one policy for every backend.

Small files are fetched whole, and those of medium size at the second miss: programs and libraries are jumped
about in, and most of them is wanted. In larger ones the range doubles with each miss that goes on where the
ranges before it have led, and starts small again after a jump. Everything is counted in bytes of the device:
the stored bytes of a file are one run there, holes take none.
"""

__all__ = ["MAX_WINDOW", "MIN_WINDOW", "WHOLE_FILE", "ReadAhead"]

#: A file up to this size is worth one request as a whole: at 100 Mb/s it costs about as much as the
#: round trip that reading it in two parts would add.
WHOLE_FILE = 1 << 20
#: One up to this size is fetched as a whole once a second read of it has to wait.
WHOLE_LATER = 8 << 20
#: Bounds of the range fetched ahead of a reader.
MIN_WINDOW, MAX_WINDOW = 256 << 10, 8 << 20
#: Reads that the kernel sends ahead overtake one another: this close to the range before is in sequence.
SEQUENCE_SLACK = 256 << 10


class ReadAhead:
    """Where the reader of one file seems to be going. Only misses are told: hits cost nothing.

    Args:
        start: where the stored bytes of the file begin on their device.
        end: where they end.
    """

    __slots__ = ("_end", "_last", "_missed", "_reach", "_size", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._start = start
        self._end = end
        self._last = self._reach = start
        self._size = MIN_WINDOW // 2
        self._missed = False

    def window(self, offset: int, length: int) -> tuple[int, int]:
        """The device range (start, end) worth fetching with a miss of ``length`` bytes at ``offset``."""
        if self._end - self._start <= (WHOLE_LATER if self._missed else WHOLE_FILE):
            return self._start, self._end
        self._missed = True
        # On from the last miss, whose range is still under way, or from the end of that range; a place between
        # them, where a program jumps about in its library, is neither.
        in_sequence = min(abs(offset - self._last), abs(offset - self._reach)) <= SEQUENCE_SLACK
        self._size = min(2 * self._size, MAX_WINDOW) if in_sequence else MIN_WINDOW
        self._last = offset + length
        self._reach = min(self._end, offset + max(length, self._size))
        return offset, self._reach
