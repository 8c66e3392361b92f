"""The bytes of a device that is a copy of pieces of others, from those others.

Used where the copy's own source fails: slower, and right, since every byte is verified where it comes from.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from veneer.store.fetch import Priority
from veneer.store.spanstore import AttachedDevice, SpanStore
from veneer.store.wanted import Range

__all__ = ["Originals", "Piece"]


class Piece(NamedTuple):
    """``length`` bytes at ``at`` of the copy are those at ``offset`` of ``device``."""

    at: int
    length: int
    device: AttachedDevice
    offset: int


class Originals:
    """What a copy consists of.

    Args:
        store: has the other devices.
        pieces: gives those that tile the copy, in order; most starts need none.
    """

    def __init__(self, store: SpanStore, pieces: Callable[[], Sequence[Piece]]) -> None:
        self._store = store
        self._find = pieces

    @cached_property
    def _pieces(self) -> Sequence[Piece]:
        return self._find()

    @cached_property
    def _starts(self) -> list[int]:
        return [piece.at for piece in self._pieces]

    async def read(self, offset: int, length: int, priority: Priority) -> bytes:
        """A range of the copy. Raises VeneerError as reading the other devices does."""
        pieces = self._within(offset, offset + length)
        # Asked for together, so that neighbours share requests.
        for piece in pieces:
            self._store.prefetch(piece.device, piece.offset, piece.offset + piece.length, priority=priority)
        found = [
            await self._store.read(piece.device, piece.offset, piece.length, priority=priority)
            for piece in pieces
        ]
        return b"".join(found)

    async def bring(self, priority: Priority) -> None:
        """Fetch all that the copy consists of, in its order, for as long as this is waited for."""
        ranges = (Range(piece.device, piece.offset, piece.length) for piece in self._pieces)
        await self._store.bring(ranges, priority=priority)

    def _within(self, offset: int, end: int) -> list[Piece]:
        found = []
        for piece in self._pieces[bisect_right(self._starts, offset) - 1 :]:
            if piece.at >= end:
                break
            low, high = max(offset, piece.at), min(end, piece.at + piece.length)
            found.append(Piece(low, high - low, piece.device, piece.offset + low - piece.at))
        return found
