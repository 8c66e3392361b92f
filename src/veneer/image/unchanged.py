"""Whether an image that is open already is what opening it again would give, without opening it again.

What an image is opened as follows from its manifest, the settings, and what this host keeps for it: a sidecar,
and packs for it or for its layers. Those are files that are replaced, never written to; so as long as each of
them is the same file, or not there, nothing has changed.

Not for: images whose index is looked for in the registry, or that have none. Blocks.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from veneer.image.by_layer import images_knowing, layer_notes
from veneer.image.image import Image
from veneer.image.open import kept_sidecars
from veneer.image.packs import local_pack_note
from veneer.oci.digest import Digest
from veneer.settings import Settings

__all__ = ["Mark", "can_be_told", "mark_of"]

#: Of each file: device, inode, size and time, or None where there is none.
Mark = tuple[tuple[int, int, int, int] | None, ...]


def can_be_told(image: Image) -> bool:
    """Whether :func:`mark_of` says all that matters about this image."""
    return image.index_origin in ("annotation", "local")


def mark_of(manifest: Digest, layers: Sequence[Digest], settings: Settings, workload: str) -> Mark:
    """What this host keeps for an image and a workload, to be compared with what it kept before.

    Args:
        manifest: digest of the image's.
        layers: diffIDs of its layers.
        settings: say where.
        workload: whose pack is wanted.
    """
    packs, cache_dir = settings.cache_dir / "packs", settings.cache_dir
    paths = [
        kept_sidecars(settings).note(manifest),
        local_pack_note(cache_dir, manifest, workload),
        *layer_notes(packs, layers, workload),
        *(local_pack_note(cache_dir, image, workload) for image in images_knowing(packs, layers, workload)),
    ]
    return tuple(map(_file, paths))


def _file(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
