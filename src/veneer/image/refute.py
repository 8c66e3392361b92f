"""What is found out about an image's index while its layers are read, noted for whoever opens it next."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from veneer.errors import IntegrityError
from veneer.formats.refuted import Refutations
from veneer.image.image import Image
from veneer.oci.digest import Digest
from veneer.store.attached import AttachedDevice

__all__ = ["note_refuted", "refutations", "watch_layers"]

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


def _note(
    cache_dir: Path, name: str, manifest: Digest, index: Digest, layer: Digest, error: IntegrityError
) -> None:
    log.error("image=%s index=%s is wrong, and is not used for another mount", name, index)
    refutations(cache_dir).add(index, manifest, layer, error.message)
