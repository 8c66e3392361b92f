"""Plain bytes of spans kept in memory, least recently used first out.

For what the disk does not hold: devices kept in stored form, and whatever a full or broken disk refused.
"""

from collections import OrderedDict

__all__ = ["MemoryCache"]


class MemoryCache:
    """At most ``limit`` bytes. Used from the store's own thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._spans: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()

    def get(self, key: bytes, number: int) -> bytes | None:
        """The span ``number`` of the device ``key``, if it is here."""
        data = self._spans.get((key, number))
        if data is not None:
            self._spans.move_to_end((key, number))
        return data

    def forget(self, key: bytes) -> None:
        """Drop all spans of a device."""
        for name in [name for name in self._spans if name[0] == key]:
            self._size -= len(self._spans.pop(name))

    def put(self, key: bytes, number: int, data: bytes) -> None:
        """Keep a span, unless it alone is more than the limit."""
        if len(data) > self._limit:
            return
        if (old := self._spans.pop((key, number), None)) is not None:
            self._size -= len(old)
        self._spans[key, number] = data
        self._size += len(data)
        while self._size > self._limit:
            self._size -= len(self._spans.popitem(last=False)[1])
