"""The Range request header (RFC 9110, section 14), resolved against a length. Pure.

What is malformed, in an unknown unit, or a burden (too many ranges, or overlapping ones that add up to more
than twice the whole) is ignored as the RFC allows: the answer is then the whole. Only ranges that are well
formed and all outside are unsatisfiable.
"""

import re
from dataclasses import dataclass

__all__ = ["MAX_RANGES", "ByteRange", "Unsatisfiable", "parse_range"]

#: More than a client that coalesces ever sends; each costs some 100 bytes of multipart header.
MAX_RANGES = 1_000
#: Offsets of more digits lie behind any blob.
_MAX_DIGITS = 18
_BEYOND = 10**_MAX_DIGITS

_SPEC = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)
_UNIT = re.compile(r"bytes=(.*)", re.IGNORECASE | re.DOTALL)


class Unsatisfiable(Exception):
    """None of the ranges overlaps the representation: status 416."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``length`` > 0 bytes from ``offset``, inside the representation."""

    offset: int
    length: int

    def content_range(self, total: int) -> str:
        """The value of Content-Range for this part."""
        return f"bytes {self.offset}-{self.offset + self.length - 1}/{total}"


def parse_range(header: str | None, total: int) -> list[ByteRange] | None:
    """The satisfiable ranges in the order asked for, or None for the whole.

    Raises :class:`Unsatisfiable` when the header is valid but no range overlaps ``total`` bytes.
    """
    match = _UNIT.fullmatch(header.strip()) if header else None
    if match is None:
        return None
    texts = [text for item in match[1].split(",") if (text := item.strip(" \t"))]
    if not texts or len(texts) > MAX_RANGES:
        return None
    found = []
    for text in texts:
        spec = _SPEC.fullmatch(text)
        if spec is None or text == "-":
            return None
        first, last = _number(spec[1]), _number(spec[2])
        if first is not None and last is not None and last < first:
            return None
        part = _resolve(first, last, total)
        if part is not None:
            found.append(part)
    if not found:
        raise Unsatisfiable
    if len(found) > 1 and sum(part.length for part in found) > 2 * total:
        return None
    return found


def _number(digits: str) -> int | None:
    if not digits:
        return None
    return int(digits) if len(digits) <= _MAX_DIGITS else _BEYOND


def _resolve(first: int | None, last: int | None, total: int) -> ByteRange | None:
    if first is None:
        length = min(last or 0, total)
        return ByteRange(total - length, length) if length else None
    if first >= total:
        return None
    end = total if last is None else min(last + 1, total)
    return ByteRange(first, end - first)
