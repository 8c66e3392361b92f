"""Whether an image that is open already is what opening it again would give, without opening it again.

What an image is opened as follows from its manifest, the settings, and what this host keeps for it: a sidecar,
and packs for it or for its layers. Small notes name those; so as long as the notes say the same, or are not
there, nothing has changed.

Not for: images whose index is looked for in the registry, or that have none. Blocks.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from veneer.image.by_layer import images_knowing, layer_notes
from veneer.image.image import Image
from veneer.image.open import kept_sidecars
from veneer.image.packs import local_pack_note
from veneer.oci.digest import Digest
from veneer.settings import Settings
from veneer.store.kept import note_use

__all__ = ["Mark", "can_be_told", "mark_of"]

#: Of each note: the SHA-256 of what it says, or None where there is none.
Mark = tuple[bytes | None, ...]


def can_be_told(image: Image) -> bool:
    """Whether :func:`mark_of` says all that matters about this image."""
    return image.index_origin in ("annotation", "local")


def mark_of(manifest: Digest, layers: Sequence[Digest], settings: Settings, workload: str) -> Mark:
    """What this host keeps for an image and a workload, to be compared with what it kept before.

    Notes that it uses so count as used.

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
    for path in paths[:2]:
        note_use(path)
    return tuple(map(_said, paths))


def _said(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
