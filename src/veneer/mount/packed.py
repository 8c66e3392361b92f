"""A pack that a mount uses: its device, and where its bytes are besides.

A pack is fetched in its order, ahead of whoever reads it. What its source does not give is made of the layers'
bytes, which the pack is a copy of; so a pack can be slow, but neither fail a read nor spoil one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from veneer.oci.digest import Digest
from veneer.prefetch.pack import PackIndex, in_order
from veneer.source.base import BlobSource
from veneer.store.fetch import Priority
from veneer.store.original import Originals, Piece
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["Packed", "originals"]

#: Queued at a time; less than a store clips.
_STEP = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A pack, attached to a store.

    Args:
        identity: digest of its index.
        index: what it has.
        attached: its device.
        originals: the same bytes in the layers.
    """

    identity: Digest
    index: PackIndex
    attached: AttachedDevice
    originals: Originals

    @classmethod
    def attach(
        cls,
        identity: Digest,
        index: PackIndex,
        source: BlobSource,
        store: SpanStore,
        layers: Sequence[AttachedDevice],
    ) -> Self:
        """Attach a pack next to the layers, which have all bytes that it has."""
        found = originals(index, store, layers)
        attached = store.attach(index.device, source, original=found.read)
        return cls(identity, index, attached, found)

    def prefetch(self, store: SpanStore) -> None:
        """Queue all that is missing, in its order, and wait for nothing."""
        for start in range(0, self.attached.size, _STEP):
            store.prefetch(self.attached, start, start + _STEP, priority=Priority.PROFILE)


def originals(index: PackIndex, store: SpanStore, layers: Sequence[AttachedDevice]) -> Originals:
    """Where the bytes of a pack are in the layers."""
    devices = {layer.device.diff_id: layer for layer in layers}
    return Originals(
        store,
        [Piece(place.at, place.length, devices[place.layer], place.offset) for place in in_order(index.places)],
    )
