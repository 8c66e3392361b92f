"""Hash a device while it comes, so that little is left to be done when its last span is there.

Worth it for a device all of which is being fetched, and which is to be proven then (:mod:`veneer.store.proof`):
hashing it afterwards would take a third as long as fetching it from near.

Invariant: what was hashed are bytes of the data file that were present and trusted. They are so still if
nothing was taken away since :attr:`HashAhead.generation`; whoever uses the hash has to look.
"""

import trio

from veneer.oci.digest import Hasher
from veneer.store.devicefile import DeviceFile
from veneer.store.presence import PRESENT
from veneer.store.threads import Threads

__all__ = ["HASH_STEP", "HashAhead"]

#: Bytes hashed in one call of a thread: others get theirs in between, and a cancellation is not late.
HASH_STEP = 4 << 20
#: A generation that no map has.
_NEVER = -1


class HashAhead:
    """The hash of a data file from its beginning as far as there is no hole. Used from the store's thread only.

    Args:
        file: in plain form.
        hasher: a new one.
        threads: where it is hashed.
    """

    def __init__(self, file: DeviceFile, hasher: Hasher, threads: Threads) -> None:
        #: Of the presence map, before anything was hashed.
        self.generation = file.map.generation[0]
        self._file = file
        self._hasher = hasher
        self._threads = threads
        #: Spans and bytes that have been hashed.
        self._spans = self._bytes = 0
        self._busy = trio.Lock()
        self._ended = False

    async def follow(self) -> None:
        """Hash what has come since. Returns at once if somebody does already."""
        if self._busy.locked():
            return
        async with self._busy:
            while not self._ended and (length := self._advance()):
                # A call that has begun is finished, whoever is cancelled.
                offset, self._bytes = self._bytes, self._bytes + length
                whole = False
                try:
                    whole = await self._threads.run(self._file.hash_range, self._hasher, offset, length)
                finally:
                    # A call that never began, as who waited for a thread was cancelled, leaves a gap.
                    if not whole:
                        self.generation = _NEVER
                if not whole:
                    return

    async def end(self) -> tuple[Hasher, int]:
        """Hash no more. The hash, for others to go on with, and how many bytes it is of."""
        self.give_up()
        async with self._busy:
            return self._hasher, self._bytes

    def give_up(self) -> None:
        """Hash no more: nobody uses the file from now on, except for a step that is under way."""
        self._ended = True

    def _advance(self) -> int:
        """Pass over the next spans that are there; their bytes."""
        states, lengths = self._file.states, self._file.map.lengths
        length = 0
        while length < HASH_STEP and self._spans < len(states) and states[self._spans] == PRESENT:
            length += lengths[self._spans]
            self._spans += 1
        return length
