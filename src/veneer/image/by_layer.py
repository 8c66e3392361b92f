"""Which images of this host know something of a layer: so that an image never seen before can use it.

Next to profiles and packs, which are kept by image, lies one small file for each layer and workload, with the
digests of the latest images that had something for them. To find what is known takes one look a layer, however
much is kept. Everything here blocks.

Not for: belief. Whoever is named may be gone, or know less than it did.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from veneer.errors import UsageError
from veneer.formats.local import replace_file
from veneer.oci.digest import Digest

__all__ = ["images_knowing", "layer_notes", "note_layers"]

_DIRECTORY: Final = "layers"
#: Images that are remembered for one layer and workload, the latest first.
_MOST_IMAGES: Final = 4
_MOST_BYTES: Final = 4096


def note_layers(directory: Path, layers: Iterable[Digest], workload: str, image: Digest) -> None:
    """Remember that an image has something for a workload about these layers. Raises OSError."""
    for layer in layers:
        path = _path(directory, layer, workload)
        images = [image, *(one for one in _read(path) if one != image)][:_MOST_IMAGES]
        replace_file(path, "".join(f"{one}\n" for one in images).encode("ascii"))


def images_knowing(directory: Path, layers: Iterable[Digest], workload: str) -> list[Digest]:
    """The images that have something for a workload about some of these layers; of most of them first."""
    found: dict[Digest, int] = {}
    for layer in layers:
        for image in _read(_path(directory, layer, workload)):
            found[image] = found.get(image, 0) + 1
    return sorted(found, key=found.__getitem__, reverse=True)


def layer_notes(directory: Path, layers: Iterable[Digest], workload: str) -> list[Path]:
    """The files that :func:`images_knowing` reads."""
    return [_path(directory, layer, workload) for layer in layers]


def _path(directory: Path, layer: Digest, workload: str) -> Path:
    return directory / _DIRECTORY / layer.hex / workload


def _read(path: Path) -> list[Digest]:
    try:
        with path.open("rb") as file:
            lines = file.read(_MOST_BYTES).decode("ascii", "replace").splitlines()
        return [Digest.parse(line) for line in lines[:_MOST_IMAGES]]
    except (OSError, UsageError):
        # Damaged or not there: nothing is known.
        return []
