"""What is found out about an image's index while its layers are read, noted for whoever opens it next."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from veneer.errors import IntegrityError
from veneer.formats.base import IndexLocation
from veneer.formats.refuted import Refutations
from veneer.image.image import Image
from veneer.oci.digest import Digest
from veneer.store.attached import AttachedDevice

__all__ = ["note_refuted", "refutations", "watch_layers", "when_malformed"]

log = logging.getLogger(__name__)


def refutations(cache_dir: Path) -> Refutations:
    """The indexes that are known to be wrong here."""
    return Refutations(cache_dir / "refuted")


def note_refuted(image: Image, cache_dir: Path, number: int, error: IntegrityError) -> None:
    """Note that all of a layer (from 0) has come, and is not what the image promises. Blocks."""
    if image.index_descriptor is not None:
        layer = image.manifest.layers[number].digest
        _note(cache_dir, image.name, image.manifest.digest, image.index_descriptor.digest, layer, error)


def watch_layers(image: Image, attached: Sequence[AttachedDevice], cache_dir: Path) -> None:
    """Have it noted when one of the image's devices turns out wrong."""
    if (descriptor := image.index_descriptor) is None:
        return  # this host made the index, of layers that were right
    where = cache_dir, image.name, image.manifest.digest, descriptor.digest
    for device, layer in zip(attached, image.manifest.layers, strict=True):
        device.on_refuted[descriptor.digest] = partial(_note, *where, layer.digest)


def when_malformed(
    cache_dir: Path, name: str, manifest: Digest, location: IndexLocation
) -> Callable[[IntegrityError], None] | None:
    """What to call, in any thread, when an index has all that is looked at first, and no tree; None: nothing.

    Whoever may push can add a referrer: a bad one must not make an image worse than without, more than once.
    """
    if location.origin != "referrer" or location.descriptor is None or location.pinned:
        return None
    return partial(_note, cache_dir, name, manifest, location.descriptor.digest, None)


def _note(
    cache_dir: Path, name: str, manifest: Digest, index: Digest, layer: Digest | None, error: IntegrityError
) -> None:
    log.error("image=%s index=%s is wrong, and is not used for another mount", name, index)
    refutations(cache_dir).add(index, manifest, layer, error.message)
