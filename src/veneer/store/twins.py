"""Spans that several devices have: what is on the disk for one of them need not be fetched for another."""

from veneer.index.model import DEFLATE, Span
from veneer.store.attached import AttachedDevice

__all__ = ["Twins"]


class Twins:
    """Finds spans with the same stored bytes, codec and length in the devices it has seen."""

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[AttachedDevice, int]] = {}

    def add(self, attached: AttachedDevice) -> None:
        """Tell ``attached`` of its twins among the devices so far, and them of it."""
        digests = attached.spans.digests
        for number in range(len(attached.spans)):
            digest = digests[32 * number : 32 * number + 32]
            other, there = self._first.setdefault(digest, (attached, number))
            if other is attached and there == number:
                continue
            if not _alike(attached.spans[number], other.spans[there]):
                continue
            group = other.twins.setdefault(there, [(other, there)])
            group.append((attached, number))
            attached.twins[number] = group

    def remove(self, attached: AttachedDevice) -> None:
        """Forget a device; the others stay each other's twins."""
        digests = attached.spans.digests
        for number in range(len(attached.spans)):
            digest = digests[32 * number : 32 * number + 32]
            if group := attached.twins.get(number):
                # In place: the group is one list for all of them.
                group[:] = [member for member in group if member[0] is not attached]
            if self._first.get(digest, (None, 0))[0] is attached:
                if group:
                    self._first[digest] = group[0]
                else:
                    del self._first[digest]
        attached.twins = {}


def _alike(one: Span, two: Span) -> bool:
    # The same stretch of a stream is something else with another window, of the same layer even.
    return one.codec.name != DEFLATE and (one.codec, one.length, one.stored_length) == (
        two.codec,
        two.length,
        two.stored_length,
    )
