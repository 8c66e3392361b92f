"""What is known of a start, besides its pack, fetched ahead: beside the mount, and never in its way.

Looked for only when there is no pack, or one that was not recorded. What this host knows of the layers comes
first; if that is nothing that was recorded, the registry is asked for profiles that are attached to the image,
once the mount is there.

A hint goes to the store as ranges to fetch with the priority of profiles: below what readers wait for, verified
like everything else. Whatever is wrong with it is logged, and the mount goes on without.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import trio

from veneer.daemon.report import HintReport
from veneer.errors import VeneerError
from veneer.image import Image
from veneer.image.contents import Contents
from veneer.image.hints import Hint, attached_hint, known_hint
from veneer.prefetch.pack import MAX_PACK_SIZE, PackIndex
from veneer.prefetch.profile import Use, disjoint
from veneer.store.attached import AttachedDevice
from veneer.store.fetch import Priority
from veneer.store.spanstore import SpanStore
from veneer.store.wanted import Range

__all__ = ["follow_hint"]

log = logging.getLogger(__name__)


async def follow_hint(
    image: Image,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    cache_dir: Path,
    workload: str,
    words: Sequence[str],
    mounted: trio.Event,
    told: Callable[[HintReport], None],
) -> None:
    """Find what is known of a start, and fetch it for as long as this is waited for.

    Args:
        image: what is mounted.
        store: fetches.
        attached: the image's devices, in order.
        cache_dir: where profiles are kept.
        workload: what is started.
        words: the command.
        mounted: set when the mount is there.
        told: gets what was found.
    """
    pack = image.pack
    if pack is not None and not pack.named.static:
        return
    layers = [device.diff_id for device in image.devices]
    try:
        hint = await trio.to_thread.run_sync(known_hint, cache_dir, layers, workload, words)
        if hint is None or hint.profile.static:
            await mounted.wait()
            contents = Contents(image.repository, cache_dir / "blobs")
            hint = await attached_hint(contents, image.manifest, layers, cache_dir, workload) or hint
    except VeneerError as error:
        log.info("image=%s no attached profile cause=%r", image.name, error.message)
        return
    if hint is None:
        return
    told(_report(hint))
    covered = None if pack is None else pack.index
    uses = await trio.to_thread.run_sync(partial(_wanted, hint.profile.uses, covered))
    devices = {one.device.diff_id: one for one in attached}
    ranges = (Range(devices[use.layer], use.offset, use.length) for use in uses)
    await store.bring(ranges, priority=Priority.PROFILE)


def _report(hint: Hint) -> HintReport:
    profile = hint.profile
    return HintReport(
        profile.workload, hint.origin, hint.images, len(profile.layers), profile.size, profile.static
    )


def _wanted(uses: Sequence[Use], pack: PackIndex | None) -> list[Use]:
    """Of the uses what a pack does not have, and not more than any start reads."""
    there: Iterable[Use] = ()
    if pack is not None:
        # Of ranges that overlap, the first one has the bytes.
        there = (Use(place.layer, place.offset, place.length, -1.0, 0.0) for place in pack.places)
    wanted: list[Use] = []
    left = MAX_PACK_SIZE
    for use in disjoint([*there, *uses]):
        if use.first_ms >= 0 and use.length <= left:
            wanted.append(use)
            left -= use.length
    return wanted
