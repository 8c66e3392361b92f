"""A pack that a mount uses: its device, and where its bytes are besides.

A pack is fetched in its order, ahead of whoever reads it. What its source does not give is made of the layers'
bytes, which the pack is a copy of; so a pack can be slow, but neither fail a read nor spoil one.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import trio

from veneer.errors import MountError
from veneer.mount.bdi import NORMAL_KB, set_read_ahead
from veneer.mount.interest import Interest
from veneer.mount.precontent import GuardedDevices
from veneer.oci.descriptor import Descriptor
from veneer.prefetch.pack import PackIndex, in_order
from veneer.source.base import BlobSource
from veneer.store.fetch import Priority
from veneer.store.original import Originals, Piece
from veneer.store.spanstore import AttachedDevice, SpanStore
from veneer.store.wanted import Range

__all__ = ["Packed", "follow_next_start", "follow_start", "originals"]

log = logging.getLogger(__name__)

#: Queued at a time; less than a store clips.
_STEP = 16 << 20
#: Pauses between attempts to fetch what is left of a pack, after some of it could not be had.
_PAUSES_S = (1.0, 5.0, 30.0)
#: A start has ended when its pack is there and the kernel has asked about nothing for so long since the mount.
QUIET_S = 2.0
#: Who has asked so often about what is not in the pack (1 MiB, page by page) reads something else.
MISFIT = 256
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A pack, attached to a store.

    Args:
        descriptor: of its index.
        data: its index as it is stored.
        index: what it has.
        attached: its device.
        originals: the same bytes in the layers.
    """

    descriptor: Descriptor
    data: bytes
    index: PackIndex
    attached: AttachedDevice
    originals: Originals

    @classmethod
    def attach(
        cls,
        descriptor: Descriptor,
        data: bytes,
        index: PackIndex,
        source: BlobSource,
        store: SpanStore,
        layers: Sequence[AttachedDevice],
    ) -> Self:
        """Attach a pack next to the layers, which have all bytes that it has."""
        found = originals(index, store, layers)
        attached = store.attach(index.device, source, original=found.read)
        return cls(descriptor, data, index, attached, found)

    def prefetch(self, store: SpanStore) -> None:
        """Queue all that is missing, in its order, and wait for nothing."""
        for start in range(0, self.attached.size, _STEP):
            store.prefetch(self.attached, start, start + _STEP, priority=Priority.PROFILE)


def originals(index: PackIndex, store: SpanStore, layers: Sequence[AttachedDevice]) -> Originals:
    """Where the bytes of a pack are in the layers."""
    devices = {layer.device.diff_id: layer for layer in layers}

    def pieces() -> list[Piece]:
        return [
            Piece(place.at, place.length, devices[place.layer], place.offset)
            for place in in_order(index.places)
        ]

    return Originals(store, pieces)


async def follow_start(
    packed: Packed,
    store: SpanStore,
    guards: GuardedDevices,
    attached: Sequence[AttachedDevice],
    setting: Path | None,
    interest: Interest,
    read_in: Callable[[], None],
) -> None:
    """Fetch a pack to its end, and let the kernel read ahead again when the start is over.

    Both wait while nobody has the mount: the pack is for who starts.

    While a start reads from its pack, what the kernel reads ahead is mostly cold, and would cost requests that
    nobody waits for. Files that were opened meanwhile go on without; the store has a policy of its own.

    Args:
        packed: the pack, which is held.
        store: fetches it.
        guards: holds the devices.
        attached: all devices of the mount, the pack's included.
        setting: of the mount's read-ahead; None to leave it alone.
        interest: whether anybody has the mount.
        read_in: has the kernel read what the pack has. Blocks.
    """
    fetched = trio.Event()
    async with trio.open_nursery() as nursery:
        if setting is not None:
            nursery.start_soon(_end_start, packed, fetched, guards, attached, setting, interest)
        await interest.pursue(partial(_fetch, packed, store))
        fetched.set()
        # The kernel reads a device that is complete without asking anybody.
        await guards.considered(packed.attached)
        if packed.attached.complete:
            await trio.to_thread.run_sync(read_in)


async def follow_next_start(
    packed: Packed,
    guards: GuardedDevices,
    attached: Sequence[AttachedDevice],
    setting: Path,
    interest: Interest,
) -> None:
    """The same for another start from a mount whose pack has been fetched, or is being.

    Whatever the kernel has dropped from its page cache meanwhile would bring its cold neighbours along again.
    When starts overlap, the first one ends the small read-ahead for all.
    """
    fetched = trio.Event()
    fetched.set()
    await _end_start(packed, fetched, guards, attached, setting, interest)


async def _end_start(
    packed: Packed,
    fetched: trio.Event,
    guards: GuardedDevices,
    attached: Sequence[AttachedDevice],
    setting: Path,
    interest: Interest,
) -> None:
    """Wait until the start is over, or turns out to be another one than that of the pack."""
    cold = [one for one in attached if one is not packed.attached]
    before, last = guards.questions(cold), trio.current_time()
    while guards.questions(cold) - before < MISFIT:
        if fetched.is_set() and trio.current_time() - last >= QUIET_S:
            break
        if not fetched.is_set():
            await interest.there()
        await trio.sleep(_LOOK_S)
        last = max(last, guards.asked(attached))
    try:
        await trio.to_thread.run_sync(set_read_ahead, setting, NORMAL_KB)
    except MountError as error:
        log.warning("%s", error.message)


async def _fetch(packed: Packed, store: SpanStore) -> None:
    attached = packed.attached

    async def comes() -> bool:
        await store.bring([Range(attached, 0, attached.size)], priority=Priority.PROFILE)
        return attached.all_present

    if await comes():
        return
    # Next best: the same bytes of the layers, which what is missing is made of when it is read.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(packed.originals.bring, Priority.PROFILE)
        for pause in _PAUSES_S:
            await trio.sleep(pause)
            if await comes():
                nursery.cancel_scope.cancel()
                return
    log.warning("%s cannot be had as a whole; the layers stand in for the rest", packed.attached.source.name)
