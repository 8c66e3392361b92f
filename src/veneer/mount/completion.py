"""Fetch all of a mounted image in the background, so that it needs the registry, and maybe us, no longer.

It goes on until everything is there, whatever fails on the way: registries come back, and disks are cleaned up.

Not here: how it keeps out of everybody's way (:mod:`veneer.store.bulk`).
"""

import logging
from collections.abc import Callable, Sequence

import trio

from veneer.errors import VeneerError
from veneer.store.presence import Form
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["complete_devices", "prove_when_quiet"]

log = logging.getLogger(__name__)

#: Pauses between attempts; the last one again and again.
_PAUSES_S = (1.0, 5.0, 30.0, 120.0)
#: Who has read nothing for so long is not starting any more, and hashing is in nobody's way.
_QUIET_S = 10.0


async def complete_devices(
    store: SpanStore,
    devices: Sequence[AttachedDevice],
    tell: Callable[[AttachedDevice], None] | None = None,
) -> None:
    """Fetch and prove one device after the other.

    Args:
        store: fetches them.
        devices: of the image.
        tell: told of each device that is all there, and sees to its proof.
    """
    for attached in devices:
        attempts = 0
        while not await store.fetch_rest(attached):
            pause = _PAUSES_S[min(attempts, len(_PAUSES_S) - 1)]
            attempts += 1
            log.info("%s is not complete yet, the next attempt is in %g s", attached.source.name, pause)
            await trio.sleep(pause)
        if tell is not None:
            tell(attached)
        else:
            await _prove(store, attached)
    log.info("all of %d devices is in the cache", len(devices))


async def prove_when_quiet(store: SpanStore, devices: Sequence[AttachedDevice]) -> None:
    """Prove devices that are all there, when nothing else is read: so that the next mount of them is direct.

    Args:
        store: serves only this mount.
        devices: of the image.
    """
    left = [device for device in devices if device.form is Form.PLAIN]
    while left := [device for device in left if not device.complete]:
        reads = store.stats.reads
        await trio.sleep(_QUIET_S)
        for device in [device for device in left if device.all_present]:
            if store.stats.reads == reads:
                left.remove(device)
                await _prove(store, device)


async def _prove(store: SpanStore, attached: AttachedDevice) -> None:
    try:
        await store.prove(attached)
    except VeneerError as error:
        log.error("%s cause=%r", attached.source.name, error.message)
