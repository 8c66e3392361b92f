"""Whether what the disk holds of a device is the layer it should be, as a whole.

Every span was verified when it was written. This says more: that the spans together are what the image's config
promises, and that the disk still has them. Only such a device may the kernel read without asking.
"""

import logging

from veneer.errors import IntegrityError
from veneer.store.attached import AttachedDevice
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile
from veneer.store.hashing import HASH_STEP, HashAhead
from veneer.store.presence import EMPTY, Form
from veneer.store.threads import Threads

__all__ = ["hash_ahead", "prove"]

_log = logging.getLogger(__name__)


async def prove(attached: AttachedDevice, cache: DeviceCache, threads: Threads) -> bool:
    """Hash the data file of a device, and note that it is complete. See :meth:`SpanStore.prove`."""
    if attached.complete:
        return True
    file = attached.file
    if file is None or attached.form is not Form.PLAIN or not attached.all_present or file.to_be_watched:
        return False
    generation, states = file.map.generation[0], bytes(file.states)
    if EMPTY in states:
        return False
    diff_id = attached.device.diff_id
    hasher, hashed = diff_id.hasher(), 0
    if (ahead := attached.ahead) is not None:
        attached.ahead = None
        begun = await ahead.end()
        if ahead.generation == generation:
            hasher, hashed = begun
    for offset in range(hashed, attached.size, HASH_STEP):
        length = min(HASH_STEP, attached.size - offset)
        # Detached meanwhile: nobody wants to know any more.
        if attached.file is None or not await threads.run(file.hash_range, hasher, offset, length):
            return False
    if attached.file is None:
        return False
    try:
        diff_id.check_hash(hasher, f"contents of layer {attached.device.blob.digest}")
    except IntegrityError as error:
        await threads.run(_drop_what_is_wrong, cache, file, generation, error)
        return False
    return await threads.run(file.confirm, generation, states)


async def hash_ahead(attached: AttachedDevice, threads: Threads) -> None:
    """Hash what has come of a device that will soon be complete, and is mounted, so that it will be proven."""
    file = attached.file
    if file is None or not file.pinned or attached.form is not Form.PLAIN or attached.complete:
        return
    if attached.ahead is None and attached.all_present:
        return  # The proof has begun, or hashes all of it.
    if attached.ahead is None or attached.ahead.generation != file.map.generation[0]:
        attached.forget_hash()
        attached.ahead = HashAhead(file, attached.device.diff_id.hasher(), threads)
    await attached.ahead.follow()


def _drop_what_is_wrong(cache: DeviceCache, file: DeviceFile, generation: int, error: IntegrityError) -> None:
    """Damaged spans are dropped, and will be fetched again. If there are none, the device is no such layer."""
    everything = range(file.map.count)
    if file.map.generation[0] != generation:
        return
    if dropped := cache.verify(file, everything).dropped:
        _log.warning("device %s: spans %s were damaged on disk", file.directory.name, dropped)
        return
    if file.map.generation[0] != generation:
        return
    if not file.pinned:
        cache.evict(file, everything)
    _log.error("device %s: %s", file.directory.name, error)
    raise error
