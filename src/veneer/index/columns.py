"""Arithmetic on whole columns: one addition for ten thousand numbers.

The 64-bit numbers of a column, laid end to end, are one long integer. Sums, shifts and masks of such integers
are those of all numbers in them, at the speed of memory: shifting 10,000 numbers takes 0.13 ms, and 0.64 ms as
a list comprehension.

Invariant: no result leaves the 64 bits of its number (its *lane*), or it would carry into its neighbour.
Callers bound what they add, with :func:`exceeds`. A shift to the right moves the lowest bits of other lanes
into the highest of each, which is for the caller to mask.
"""

import sys
from array import array
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, TypeVar

__all__ = ["LIMIT", "column", "exceeds", "filled", "lanes", "picked", "plane", "repeated", "signed_lanes"]

#: Numbers that :func:`exceeds` and :func:`filled` can tell apart are below this.
LIMIT: Final = 1 << 63
_SIZE: Final = 8

_Value = TypeVar("_Value")


def lanes(numbers: "array[int]") -> int:
    """A column (an array of type ``q`` or ``Q``) as one integer."""
    return int.from_bytes(numbers.tobytes(), sys.byteorder)


def signed_lanes(numbers: "array[int]") -> int:
    """The same for numbers of which some are negative: each counts as it is, and borrows from other lanes.

    So only what has been made of it whole and has no negative number any more is a column again.
    """
    marks = repeated(LIMIT, len(numbers))
    return (lanes(numbers) ^ marks) - marks


def column(value: int, count: int) -> "array[int]":
    """The column of type ``q`` that an integer of ``count`` lanes is."""
    return array("q", value.to_bytes(_SIZE * count, sys.byteorder))


def repeated(number: int, count: int) -> int:
    """The integer of ``count`` lanes that all hold ``number``, from 0 to 2^64 - 1."""
    return int.from_bytes(number.to_bytes(_SIZE, sys.byteorder) * count, sys.byteorder)


def exceeds(value: int, limits: int, count: int) -> bool:
    """Whether one of ``count`` lanes is above that of ``limits``; all lanes of both are below :data:`LIMIT`."""
    marks = repeated(LIMIT, count)
    # A lane keeps its mark unless it is larger than what it is taken from.
    return (marks + limits - value) & marks != marks


def filled(value: int, count: int) -> int:
    """For each of ``count`` lanes below :data:`LIMIT`: all bits if it holds anything but 0, none if not."""
    marks = value + repeated(LIMIT - 1, count) & repeated(LIMIT, count)
    return (marks << 1) - (marks >> _SIZE * 8 - 1)


def plane(numbers: "array[int]", place: int) -> bytes:
    """Of each number of a column the byte at ``place``, counted from the lowest."""
    return numbers.tobytes()[place if sys.byteorder == "little" else _SIZE - 1 - place :: _SIZE]


def picked(values: Sequence[_Value], places: Sequence[int]) -> Sequence[_Value]:
    """``values[place]`` for each of ``places``, in half of the time that ``map`` takes."""
    if len(places) < 2:  # which itemgetter treats otherwise
        return [values[place] for place in places]
    found: tuple[_Value, ...] = itemgetter(*places)(values)
    return found
