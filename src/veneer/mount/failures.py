"""Telling about failed reads without drowning the log.

The kernel repeats a failed read page by page and programs repeat it again, so the same file is told once in
a while only, and all files together at a bounded rate; what was left out is counted.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from veneer.errors import VeneerError
from veneer.index.model import ImageIndex

__all__ = ["FailureLog"]

log = logging.getLogger(__name__)

#: A file that keeps failing is told again after this long.
REPEAT_AFTER_S = 60.0
#: Lines for all files together: so many in any window of WINDOW_S.
MAX_LINES, WINDOW_S = 20, 10.0
#: Files remembered for REPEAT_AFTER_S; more than MAX_LINES allows in that time.
REMEMBERED = 256


class FailureLog:
    """Failed reads of one mounted image. Used by one event loop only."""

    def __init__(self, image: str, index: ImageIndex, clock: Callable[[], float] = time.monotonic) -> None:
        self._image = image
        self._index = index
        self._clock = clock
        self._told: OrderedDict[int, float] = OrderedDict()
        self._window_start = clock()
        self._lines = 0
        self._left_out = 0

    def record(self, node: int, offset: int, length: int, error: VeneerError, where: str = "") -> None:
        """Log that a read of a file failed, unless that was said a moment ago.

        ``where`` says more about the place, in words of whoever records it.
        """
        now = self._clock()
        if now - self._told.get(node, float("-inf")) < REPEAT_AFTER_S:
            return
        if now - self._window_start >= WINDOW_S:
            if self._left_out:
                log.error("image=%s failed_reads_not_shown=%d", self._image, self._left_out)
            self._window_start, self._lines, self._left_out = now, 0, 0
        if self._lines >= MAX_LINES:
            self._left_out += 1
            return
        self._lines += 1
        self._told[node] = now
        self._told.move_to_end(node)
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        log.error(
            "read failed image=%s path=%r offset=%d length=%d%s error=%s cause=%r",
            self._image,
            "/" + self._path(node).decode("utf-8", "backslashreplace"),
            offset,
            length,
            f" {where}" if where else "",
            type(error).__name__,
            error.message,
        )

    def _path(self, node: int) -> bytes:
        return next((path for path, found in self._index.walk() if found == node), b"?")
