"""What is given up when there has to be room: what was not used for longest, be it spans or kept besides.

Not here: how much there has to be (:mod:`veneer.store.cache`), and which spans of a mounted device may go
(:mod:`veneer.store.owned`).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from veneer.store.devicefile import DeviceFile, Evicted
from veneer.store.kept import KeptItem
from veneer.store.presence import MapMismatch

__all__ = ["Devices", "evict_oldest"]

_log = logging.getLogger(__name__)

#: Spans evicted under one hold of a device's lock: about a millisecond.
_BATCH = 128


class Devices(Protocol):
    """All devices of a cache; see :class:`~veneer.store.cache.DeviceCache`."""

    def paths(self) -> list[Path]:
        """Their directories."""

    def visit(self, path: Path) -> AbstractContextManager[DeviceFile]:
        """One of them, opened. Raises OSError or MapMismatch."""

    def remove(self, path: Path) -> bool:
        """Delete one that nobody uses."""


class _Row(NamedTuple):
    """A span that may be evicted; the least recently used sorts first."""

    used: int
    path: Path
    number: int
    length: int
    later: bool
    item: KeptItem | None = None


def evict_oldest(
    devices: Devices, excess: int, tell: Callable[[Evicted], None], items: Iterable[KeptItem] = ()
) -> int:
    """Take ``excess`` bytes away, if there are so many that may go. Returns the bytes freed.

    Args:
        devices: all of them; one whose map is damaged is removed.
        excess: in bytes.
        tell: is told of what goes, as it goes.
        items: what else may go; but for indexes, which go when their devices have gone.
    """
    rows = [_Row(one.used_ns, one.path, 0, one.size, False, one) for one in items if one.kind != "index"]
    for path in devices.paths():
        try:
            with devices.visit(path) as file:
                later = file.unwatched
                rows.extend(
                    _Row(used, path, number, length, later) for number, used, length in file.evictable()
                )
        except MapMismatch:
            devices.remove(path)
        except OSError as error:
            _log.warning("cannot look into %s: %s", path, error)
    rows.sort(key=lambda row: row[:4])
    victims, rest = _split(rows, excess)
    freed = _evict(devices, victims, tell)
    if freed < excess:
        # Complete devices that are mounted begin to be watched now, and are evicted from later. Until then
        # others have to give way, if there are any.
        victims, _ = _split([row for row in rest if not row.later], excess - freed)
        freed += _evict(devices, victims, tell)
    return freed


def _evict(devices: Devices, rows: Iterable[_Row], tell: Callable[[Evicted], None]) -> int:
    numbers_of: defaultdict[Path, list[int]] = defaultdict(list)
    freed = 0
    for row in rows:
        if row.item is None:
            numbers_of[row.path].append(row.number)
            continue
        _log.info("evicted the %s %s", row.item.kind, row.path)
        tell(Evicted(0, row.item.remove()))
        freed += row.length
    for path, numbers in numbers_of.items():
        with suppress(FileNotFoundError, MapMismatch), devices.visit(path) as file:
            for first in range(0, len(numbers), _BATCH):
                evicted = file.evict(numbers[first : first + _BATCH])
                tell(evicted)
                freed += evicted.freed
    return freed


def _split(rows: Sequence[_Row], excess: int) -> tuple[Sequence[_Row], Sequence[_Row]]:
    """The first rows that hold ``excess`` bytes together, and the others."""
    planned = 0
    for i, row in enumerate(rows):
        if planned >= excess:
            return rows[:i], rows[i:]
        planned += row.length
    return rows, ()
