"""An image of random content, and the same tree in a plain directory to compare with.

Every byte depends on its file and its place in it, so that zeros, another file's bytes and bytes of another
offset are all seen as wrong. Half of the files cannot be compressed, half can; three layers replace, remove and
add.
"""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.testing.images import Layer, write_image
from veneer.testing.tars import TarItem, whiteout

__all__ = ["Content", "make_content"]

#: Sizes of small files: around a block, a page, the first read-ahead, and a span.
_SMALL = (1, 300, 512, 4095, 4096, 4097, 10_000, 16_384, 30_000, 65_536, 100_000)
#: Of the content, what is in small files.
_SMALL_SHARE = 0.4
_LARGE_MIN, _LARGE_MAX = 1 << 20, 5 << 20
_FILES_A_DIRECTORY = 40
#: Files of the lowest layer of which a higher one replaces one, and hides one.
_REPLACED, _HIDDEN = 10, 15
_LINE = 64


@dataclass(frozen=True, slots=True)
class Content:
    """What readers may find below a mount of the image.

    Args:
        plain: directory that holds the right content of every file.
        files: paths relative to it, with sizes.
        layout: OCI layout with the image (not converted yet), tagged ``source``.
        order: layer and place among that layer's files of each file.
    """

    plain: Path
    files: tuple[tuple[str, int], ...]
    layout: Path
    order: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def make_content(directory: Path, size: int, seed: int) -> Content:
    """Make an image of about ``size`` bytes below ``directory``."""
    rng = random.Random(f"content {seed}")
    layers, files = _layers(rng, size)
    layout, plain = directory / "source", directory / "plain"
    write_image(layers, layout, "source", "none")
    for path, content in files.items():
        target = plain / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    order = {
        os.fsdecode(item.path): (number, place)
        for number, layer in enumerate(layers)
        for place, item in enumerate(item for item in layer if item.kind == "file")
    }
    return Content(plain, tuple((path, len(files[path])) for path in sorted(files)), layout, order)


def _layers(rng: random.Random, size: int) -> tuple[list[Layer], dict[str, bytes]]:
    base = dict(_files(rng, "base", int(size * 0.7)))
    names = sorted(base)
    replaced = {name: _bytes(rng, name + " again", len(base[name])) for name in names[:: _REPLACED + 1]}
    hidden = [name for name in names[5 :: _HIDDEN + 1] if name not in replaced]
    second = replaced | dict(_files(rng, "middle", int(size * 0.2)))
    third = dict(_files(rng, "top", int(size * 0.1)))
    final = base | second | third
    for name in hidden:
        del final[name]
    hiding = tuple(whiteout(os.fsencode(name)) for name in hidden)
    return [_items(base), hiding + _items(second), _items(third)], final


def _items(files: dict[str, bytes]) -> Layer:
    directories = sorted({parent for name in files for parent in _parents(name)})
    return (
        *(TarItem(os.fsencode(name), "dir", 0o755) for name in directories),
        *(TarItem(os.fsencode(name), content=content) for name, content in files.items()),
    )


def _parents(name: str) -> list[str]:
    return [str(parent) for parent in Path(name).parents if str(parent) != "."]


def _files(rng: random.Random, top: str, size: int) -> Iterator[tuple[str, bytes]]:
    """Files below ``top`` of ``size`` bytes together, small ones and large ones mixed."""
    small, large, number = int(size * _SMALL_SHARE), int(size * (1 - _SMALL_SHARE)), 0
    while small > 0 or large > 0:
        if large > 0 and (small <= 0 or rng.random() < 0.02):
            length = min(rng.randrange(_LARGE_MIN, _LARGE_MAX), max(large, 1))
            large -= length
        else:
            length = rng.choice(_SMALL)
            small -= length
        name = f"{top}/d{number // _FILES_A_DIRECTORY:03}/f{number:05}"
        yield name, _bytes(rng, name, length)
        number += 1


def _bytes(rng: random.Random, name: str, length: int) -> bytes:
    """Bytes that occur nowhere else."""
    if rng.random() < 0.5:
        return rng.randbytes(length)
    lines = (f"{name} {line * _LINE:012} ".ljust(_LINE - 1, "-") + "\n" for line in range(length // _LINE + 1))
    return "".join(lines).encode()[:length]
