"""Spans in a data file that lie side by side: written with one system call, and freed as one hole.

All functions want the map's lock. Not here: what is in the map afterwards.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from veneer.store.presence import EMPTY, PresenceMap
from veneer.store.punch import CANNOT_PUNCH, punch

__all__ = ["Fill", "punch_spans", "runs", "write_run"]

_log = logging.getLogger(__name__)

#: Buffers in one pwritev(2); the kernel's limit is 1024.
_MAX_VECTORS = 512
#: Holes are extended to this, where the neighbours are absent too: file systems free whole blocks.
_BLOCK = 4096


class Fill(NamedTuple):
    """Verified bytes of one span for the data file, and their SHA-256."""

    number: int
    data: bytes | memoryview
    digest: bytes


def runs(presence: PresenceMap, fills: Sequence[Fill]) -> Iterator[list[Fill]]:
    """Those of ``fills`` together that are one stretch of the data file."""
    run: list[Fill] = []
    for fill in fills:
        if run and not (
            fill.number == run[-1].number + 1
            and presence.offsets[fill.number]
            == presence.offsets[run[-1].number] + presence.lengths[run[-1].number]
            and len(run) < _MAX_VECTORS
        ):
            yield run
            run = []
        run.append(fill)
    if run:
        yield run


def write_run(fd: int, presence: PresenceMap, run: Sequence[Fill], *, undo: bool = True) -> None:
    """Write one stretch; raises OSError, and has freed what it took then if that is to be undone."""
    offset = presence.offsets[run[0].number]
    total = sum(len(fill.data) for fill in run)
    if total != sum(presence.lengths[fill.number] for fill in run):
        raise ValueError(f"{total} bytes for spans {run[0].number}..{run[-1].number}, which have others")
    try:
        written = os.pwritev(fd, [fill.data for fill in run], offset)
        if written != total:
            rest = b"".join(fill.data for fill in run)
            while written < total:
                written += os.pwrite(fd, memoryview(rest)[written:], offset + written)
    except OSError:
        # Half a run may have taken the last blocks of a full disk.
        if undo:
            _punch_run(fd, presence, run[0].number, run[-1].number)
        raise


def punch_spans(fd: int, presence: PresenceMap, numbers: Sequence[int]) -> bool:
    """Punch absent spans, in ascending order, out of their data file. False if that cannot be done here."""
    first: int | None = None
    for i, number in enumerate(numbers):
        first = number if first is None else first
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            if not _punch_run(fd, presence, first, number):
                return False
            first = None
    return True


def _punch_run(fd: int, presence: PresenceMap, first: int, last: int) -> bool:
    offsets, lengths, states = presence.offsets, presence.lengths, presence.states
    begin, end = offsets[first], offsets[last] + lengths[last]
    floor, ceiling = begin - begin % _BLOCK, end + -end % _BLOCK
    while begin > floor and first > 0 and states[first - 1] == EMPTY:
        first -= 1
        begin = max(floor, offsets[first])
    while end < ceiling and last + 1 < len(offsets) and states[last + 1] == EMPTY:
        last += 1
        end = min(ceiling, offsets[last] + lengths[last])
    if last + 1 == len(offsets):
        # The block that the file ends in is freed only if the hole goes on beyond the end.
        end = ceiling
    try:
        punch(fd, begin, end - begin)
    except OSError as error:
        if error.errno in CANNOT_PUNCH:
            return False
        _log.warning("cannot free space in the device %s: %s", presence.key.hex(), error.strerror)
    return True
