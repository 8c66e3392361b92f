"""Ranges of one device that overlap: who comes first where, and who is where.

A range is ``(start, end, value)`` in bytes, with ``start < end``.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

__all__ = ["cut_to_first", "overlaid"]

T = TypeVar("T")


def cut_to_first(ranges: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Cut ranges so that each byte belongs to one of those that had it: to the one with the lowest value.

    Values are distinct. Pieces come in order of place; those of one range that touch are one piece.
    """
    ordered = sorted(ranges)
    out: list[tuple[int, int, int]] = []
    open_: list[tuple[int, int]] = []
    at = following = 0
    while following < len(ordered) or open_:
        if not open_:
            at = max(at, ordered[following][0])
        while following < len(ordered) and ordered[following][0] <= at:
            _, end, value = ordered[following]
            heapq.heappush(open_, (value, end))
            following += 1
        while open_ and open_[0][1] <= at:
            heapq.heappop(open_)
        if not open_:
            continue
        value, stop = open_[0]
        if following < len(ordered):
            stop = min(stop, ordered[following][0])
        if out and out[-1][1:] == (at, value):
            out[-1] = (out[-1][0], stop, value)
        else:
            out.append((at, stop, value))
        at = stop
    return out


def overlaid(runs: Sequence[Iterable[tuple[int, int, T]]]) -> Iterator[tuple[int, int, Mapping[int, T]]]:
    """The pieces between all ends of all ranges, in order: start, end, and by number of run what it has there.

    The ranges of one run do not overlap. Pieces that no run has are left out.
    """
    ends: list[tuple[int, bool, int, T]] = []
    for number, ranges in enumerate(runs):
        for start, end, value in ranges:
            ends += ((start, True, number, value), (end, False, number, value))
    # What ends at a place does so before something else begins there.
    ends.sort(key=lambda item: item[:2])
    there: dict[int, T] = {}
    before = 0
    for at, begins, number, value in ends:
        if there and before < at:
            yield before, at, dict(there)
        before = at
        if begins:
            there[number] = value
        else:
            del there[number]
