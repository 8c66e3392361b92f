"""What a mount reads, noted while it does, in memory that is bounded by what a profile may hold.

Whoever lets the kernel read a device tells of each read when it comes. Only pages that were not read before
count; neighbours that are read one after the other become one use.
"""

from array import array

from veneer.oci.digest import Digest
from veneer.prefetch.profile import MAX_MS, MAX_RUN, MAX_USES, Profile, Use

__all__ = ["PAGE", "Recorder"]

#: What the kernel reads at least, and what ranges are aligned to but at the end of a device.
PAGE = 4096
#: Pages that are looked after together: what nothing is read of takes no memory.
_GROUP = 256


class Recorder:
    """Collects the uses of one mount. Belongs to one thread.

    Args:
        began: when the mount was made, in seconds of whatever clock :meth:`note` is told.
        most: how many uses are kept.

    Attributes:
        lost: reads that were first uses, and for which there was no room any more.
        shared: whether other mounts had one of the devices meanwhile, whose reads are here as well.
    """

    def __init__(self, began: float, *, most: int = MAX_USES) -> None:
        self.lost = 0
        self.shared = False
        self._began = began
        self._most = most
        self._numbers: dict[Digest, int] = {}
        self._sizes: list[int] = []
        #: By device and group: one byte a page that says whether it was read.
        self._seen: dict[tuple[int, int], bytearray] = {}
        # By use: device, its first page and the one after the last, and seconds.
        self._device, self._start, self._end = array("i"), array("q"), array("q")
        self._first, self._wait = array("d"), array("d")

    def __len__(self) -> int:
        return len(self._device)

    def note(self, layer: Digest, size: int, offset: int, length: int, at: float) -> int | None:
        """Tell of a read.

        Args:
            layer: diffID of the device.
            size: of the device.
            offset: where the read begins.
            length: at least 1; the range lies in the device.
            at: when it came.

        Returns:
            For :meth:`waited`; None when it was no first use.
        """
        device = self._numbers.get(layer)
        if device is None:
            device = self._numbers[layer] = len(self._sizes)
            self._sizes.append(size)
        # Two layers of one diffID have one size, or else one of them is a lie that is found out in time.
        end = min(offset + length, self._sizes[device])
        use, full = None, False
        for page in range(offset // PAGE, -(-end // PAGE)):
            group, place = divmod(page, _GROUP)
            seen = self._seen.get((device, group))
            if seen is not None and seen[place]:
                continue
            added = self._add(device, page, at)
            if added is None:
                full = True
                break
            use = added if use is None else use
            if seen is None:
                seen = self._seen[device, group] = bytearray(_GROUP)
            seen[place] = 1
        self.lost += full
        return use

    def waited(self, use: int, seconds: float) -> None:
        """Tell how long it took until the bytes of a read were there."""
        self._wait[use] = max(self._wait[use], seconds)

    def profile(self, workload: str, image: str, command: tuple[str, ...]) -> Profile:
        """What was noted so far, as the profile of one run. The only method for other threads, too."""
        # Columns only grow, and the last one last.
        count, layers = len(self._wait), tuple(self._numbers)
        uses = []
        for use in range(count):
            device, offset = self._device[use], self._start[use] * PAGE
            length = min(self._end[use] * PAGE, self._sizes[device]) - offset
            uses.append(Use(layers[device], offset, length, _ms(self._first[use]), _ms(self._wait[use])))
        return Profile(workload, image, command, 1, tuple(uses))

    def _add(self, device: int, page: int, at: float) -> int | None:
        """Make a page part of the last use, or a use of its own; None when there is no room for that."""
        last = len(self) - 1
        if (
            last >= 0
            and self._device[last] == device
            and self._end[last] == page
            and (page + 1 - self._start[last]) * PAGE <= MAX_RUN
        ):
            self._end[last] = page + 1
            return last
        if len(self) >= self._most:
            return None
        self._device.append(device)
        self._start.append(page)
        self._end.append(page + 1)
        self._first.append(max(0.0, at - self._began))
        self._wait.append(0.0)
        return last + 1


def _ms(seconds: float) -> float:
    return min(MAX_MS, round(1e3 * seconds, 3))
