"""What a cache keeps besides devices and counts to its quota: sidecars and packs of this host, local indexes.

    sidecars/ALGORITHM-HEX.json        of an image's manifest; blobs/ALGORITHM/HEX beside it
    packs/MANIFEST-HEX/WORKLOAD/       a pack: its note, its index, its bytes
    layers/ALGORITHM-HEX               of a streamed layer; checkpoints/ALGORITHM-HEX beside it

Sidecars and packs are as old as their last use, which whoever looks at them notes with :func:`note_use`, and
may be evicted like spans. So may what no note names, as its writer was killed before that, or the note names
others by now. An index of a layer is of use together with its device alone, and goes when that has gone.

Invariant: nothing is evicted that was used within the last minute, or that is of an image or of blobs whose
devices somebody has open. Everything here tolerates that others delete at the same time.

Not for: what the files say (:mod:`veneer.formats`, :mod:`veneer.image`), or for documents of images, which are
kilobytes and stay until the cache is cleared.
"""

import glob
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer.errors import IntegrityError
from veneer.oci.canonical import Json, parse_json

__all__ = ["KeptItem", "kept_bytes", "kept_items", "note_use", "remove_stray_indexes"]

#: Between finding a sidecar or a pack and having its devices open less time passes.
_GRACE_NS: Final = 60 * 10**9
_MAX_DOCUMENT: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class KeptItem:
    """A sidecar, a pack or a local index.

    Args:
        kind: ``sidecar``, ``pack`` or ``index``.
        path: names it.
        used_ns: when it was used last, since the epoch.
        size: bytes of all files.
        files: all of them; that without which the others mean nothing comes first.
        blobs: digests of blobs, a device of which needs it.
    """

    kind: str
    path: Path
    used_ns: int
    size: int
    files: tuple[Path, ...]
    blobs: frozenset[str]

    def may_go(self, in_use: Collection[str], now_ns: int | None = None) -> bool:
        """Whether no mount needs it; ``in_use`` are the blobs whose devices somebody has open."""
        now = time.time_ns() if now_ns is None else now_ns
        return now - self.used_ns >= _GRACE_NS and self.blobs.isdisjoint(in_use)

    def remove(self) -> int:
        """Delete it. Returns bytes freed."""
        for path in self.files:
            with suppress(OSError):
                path.unlink()
        if self.kind == "pack":
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self.path.parent.rmdir()
        return self.size


def note_use(path: Path) -> None:
    """Note that a sidecar or a pack is used now; ``path`` is its note."""
    with suppress(OSError):
        os.utime(path)


def kept_bytes(cache_dir: Path) -> int:
    """Bytes of everything that is kept."""
    patterns = "sidecars/*.json", "sidecars/blobs/*/*", "packs/*/*/*", "layers/*", "layers/checkpoints/*"
    return sum(_size(path) for pattern in patterns for path in _found(cache_dir, pattern))


def kept_items(cache_dir: Path) -> list[KeptItem]:
    """Everything that is kept."""
    return [*_sidecars(cache_dir), *_packs(cache_dir), *_indexes(cache_dir)]


def remove_stray_indexes(cache_dir: Path, blobs: Callable[[], Collection[str]]) -> int:
    """Delete indexes of layers that have no device. Returns bytes freed.

    ``blobs`` gives those of all devices; it is called only if there are indexes.
    """
    items = list(_indexes(cache_dir))
    there = blobs() if items else ()
    return sum(item.remove() for item in items if item.may_go(there))


def _sidecars(cache_dir: Path) -> Iterator[KeptItem]:
    directory = cache_dir / "sidecars"
    found = []
    for note in _found(directory, "*.json"):
        digests = _digests_of_sidecar(note)
        files = [
            path for text in digests if (path := directory / "blobs" / Path(*text.split(":", 1))).is_file()
        ]
        found.append((note, digests, files))
    # What several sidecars name is the newest one's.
    found.sort(key=lambda one: _used_ns(one[0]), reverse=True)
    taken: set[Path] = set()
    for note, digests, files in found:
        own = tuple(path for path in files if path not in taken)
        taken.update(own)
        blobs = {*digests, *_layers_of(cache_dir, note.stem)}
        yield _item("sidecar", note, (note, *own), blobs)
    for path in _found(directory / "blobs", "*/*"):
        if path not in taken:
            yield _nameless("sidecar", path, (path,), {f"{path.parent.name}:{path.name}"})


def _packs(cache_dir: Path) -> Iterator[KeptItem]:
    for directory in _found(cache_dir, "packs/*/*/"):
        note = directory / "pack.json"
        files = tuple(path for path in _found(directory, "*") if path != note)
        # By whichever image it is used, its device is open then.
        blobs = {f"sha256:{path.name}" for path in files}
        if note.is_file():
            yield _item("pack", directory, (note, *files), blobs)
        elif files:
            yield _nameless("pack", directory, files, blobs)


def _indexes(cache_dir: Path) -> Iterator[KeptItem]:
    directory = cache_dir / "layers"
    for path in _found(directory, "*-*"):
        files = (path, *(one for one in (directory / "checkpoints" / path.name,) if one.is_file()))
        yield _item("index", path, files, {path.name.replace("-", ":", 1)})


def _found(directory: Path, pattern: str) -> list[Path]:
    """What there is. :meth:`Path.glob` would raise for a directory that is deleted while it looks."""
    return [directory / name for name in glob.glob(pattern, root_dir=directory, include_hidden=True)]


def _item(kind: str, path: Path, files: tuple[Path, ...], blobs: set[str]) -> KeptItem:
    return KeptItem(kind, path, _used_ns(files[0]), sum(map(_size, files)), files, frozenset(blobs))


def _nameless(kind: str, path: Path, files: tuple[Path, ...], blobs: set[str]) -> KeptItem:
    """What no note names, or not yet."""
    # Of their names, not of their bytes: a file that is moved here may have been written long ago.
    used = max(_status_ns(file) for file in files)
    return KeptItem(kind, path, used, sum(map(_size, files)), files, frozenset(blobs))


def _digests_of_sidecar(note: Path) -> list[str]:
    match _document(note):
        case {"index": index, "windows": list(windows), "packs": list(packs)}:
            return _digests([index, *windows, *packs])
    return []


def _layers_of(cache_dir: Path, name: str) -> list[str]:
    """The layers of the manifest ``ALGORITHM-HEX``, if the cache has that."""
    match _document(cache_dir / "blobs" / Path(*name.split("-", 1))):
        case {"layers": list(layers)}:
            return _digests(layers)
    return []


def _digests(descriptors: list[Json]) -> list[str]:
    texts = [one.get("digest") for one in descriptors if isinstance(one, dict)]
    return [text for text in texts if isinstance(text, str) and "/" not in text and ":" in text]


def _document(path: Path) -> Json:
    try:
        with path.open("rb") as file:
            return parse_json(file.read(_MAX_DOCUMENT + 1), str(path), limit=_MAX_DOCUMENT)
    except (OSError, IntegrityError):
        return None


def _used_ns(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _status_ns(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_ctime_ns
    return 0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0
