"""Free the space of spans that are not on disk any more.

File systems free whole blocks, and spans end anywhere: so a hole is extended over absent neighbours.
"""

import logging
from collections.abc import Sequence

from veneer.store.presence import EMPTY, PresenceMap
from veneer.store.punch import CANNOT_PUNCH, punch

__all__ = ["punch_spans"]

_log = logging.getLogger(__name__)

_BLOCK = 4096


def punch_spans(fd: int, presence: PresenceMap, numbers: Sequence[int]) -> bool:
    """Punch absent spans, in ascending order, out of their data file. False if that cannot be done here.

    The caller holds the map's lock.
    """
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
