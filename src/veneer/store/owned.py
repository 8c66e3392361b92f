"""What the owner of a mounted device may take away from under the kernel, and when.

The kernel asks before it reads, is told that the bytes are there, and reads them a moment later. Whatever is
punched in that moment it reads as zeros, and keeps. The moment cannot be seen from outside; so a span is left
alone until it was idle for :data:`MIN_IDLE_S`, which is many orders of magnitude longer.

Invariant: no span is punched that the kernel was told about less than that ago. It holds while other threads
tell the kernel: they note the use *before* they look whether the span is there, and here the span is made
absent *before* the notes are looked at again. So one of the two sees the other. A span that has just been
written counts as used too: whoever had it fetched has not told the kernel yet.

A device that is complete raises no events, so nobody knows what the kernel reads of it. It is first made to
raise them again, and nothing is punched before it has done so for as long.

Uses are kept in memory, by a clock that does not jump, and stands still while the machine sleeps. What an
earlier owner noted is not known here: to a new one all spans are as good as used when it took over.

Not here: the punching itself (:mod:`veneer.store.devicefile`), what is worth keeping
(:mod:`veneer.store.cache`).
"""

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from veneer.errors import VeneerError
from veneer.store.pin import Pin
from veneer.store.presence import PRESENT, PresenceMap

__all__ = ["MIN_IDLE_S", "BeforePunch", "IdleRule", "Owned"]

_log = logging.getLogger(__name__)

#: Nobody is kept from running for so long between a permission and the read that follows it, unless on purpose.
MIN_IDLE_S = 60.0

#: Makes sure that every later read of the device by the kernel is asked for; raises OSError if it cannot.
BeforePunch = Callable[[], None]


class IdleRule:
    """How long a span must be idle.

    Args:
        min_idle_s: in seconds.
        clock: a monotonic clock in nanoseconds.
    """

    __slots__ = ("clock", "min_idle_ns")

    def __init__(self, min_idle_s: float = MIN_IDLE_S, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.min_idle_ns = int(min_idle_s * 1e9)
        self.clock = clock


class Owned:
    """A device that this process has pinned. Any thread may note and ask; :meth:`take` needs the map's lock.

    Args:
        directory: of the device.
        presence: its map, whose lock the caller holds.
        before_punch: called before anything is punched out of it.
        rule: how long spans must be idle.

    Raises CacheError or OSError when the device cannot be pinned.
    """

    def __init__(
        self,
        directory: Path,
        presence: PresenceMap,
        before_punch: BeforePunch,
        rule: IdleRule,
    ) -> None:
        self.pin = Pin.take(directory)
        self._map = presence
        self._before_punch = before_punch
        self._rule = rule
        self._name = directory.name
        self._uses = array("Q", bytes(8 * presence.count))
        #: Before this moment nothing is known of uses.
        self._since = rule.clock()
        #: The kernel may be reading without asking.
        self._unwatched = presence.complete
        self._watched_since: int | None = None

    @property
    def unwatched(self) -> bool:
        """Whether the kernel may be reading it without asking, so that nothing can be punched at once."""
        return self._unwatched or self._map.complete

    @property
    def watching(self) -> bool:
        """Whether it was complete until lately, and is watched in order to evict what turns out to be idle."""
        since = self._watched_since
        return since is not None and self._rule.clock() - since < self._rule.min_idle_ns

    def note(self, first: int, past: int) -> None:
        """Take note that the kernel is about to read these spans."""
        now = self._rule.clock()
        if past - first == 1:
            self._uses[first] = now
        else:
            self._uses[first:past] = array("Q", [now]) * (past - first)

    def complete(self) -> None:
        """Take note that the device was found to be complete."""
        self._unwatched = True

    def is_idle(self, number: int) -> bool:
        """Whether a span may be taken away, or would be if the device were watched for long enough."""
        if self.unwatched:
            return True
        return self._rule.clock() - max(self._since, self._uses[number]) >= self._rule.min_idle_ns

    def take(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        """Make spans absent: those of ``numbers``, ascending, that may be punched then, and their bytes."""
        if self.unwatched:
            self._watch()
            return [], 0
        present = self._map
        idle = [n for n in numbers if present.states[n] == PRESENT and self.is_idle(n)]
        if not idle:
            return [], 0
        digests = {number: present.digest(number) for number in idle}
        freed = present.clear(idle)
        gone = [number for number in idle if self.is_idle(number)]
        try:
            freed -= self._restore(digests, set(idle).difference(gone))
            self._before_punch()
        except (OSError, VeneerError) as error:
            _log.warning("nothing of the device %s can be evicted: %s", self._name, error)
            freed -= self._restore(digests, gone)
            gone = []
        return gone, freed

    def _watch(self) -> None:
        self._unwatched = True
        # First: whoever stops watching a complete device looks afterwards whether it still is complete.
        self._map.clear_complete()
        try:
            self._before_punch()
        except (OSError, VeneerError) as error:
            _log.warning("reads of the device %s cannot be watched: %s", self._name, error)
        else:
            self._since = self._watched_since = self._rule.clock()
            self._unwatched = False

    def _restore(self, digests: dict[int, bytes], numbers: "set[int] | list[int]") -> int:
        """Their bytes were never touched."""
        return sum(self._map.mark(n, [digests[n]], self._map.uses[n]) for n in sorted(numbers))
