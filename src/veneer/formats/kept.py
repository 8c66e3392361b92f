"""What this host knows of an image's sidecar: one that it made for itself, or the one that it found last.

One small file an image, named after the manifest, says which blobs a sidecar has. Blobs that this host has made
lie beside it, under their digests; those of a sidecar in a registry are found there.

Invariant: a sidecar of this host is told of only while all of its blobs are here. Writes are atomic. Not for:
deciding whether a sidecar is believed.
"""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer.errors import CacheError, IntegrityError
from veneer.formats.local import read_file, replace_file
from veneer.oci.canonical import Json, canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.source.layout_file import FileBlob

__all__ = ["KeptSidecars", "Sidecar"]

_log = logging.getLogger(__name__)

#: A thousand layers and some hundred packs.
_MAX_NOTE: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The index of an unmodified image, and what belongs to it.

    Args:
        origin: ``local`` (this host made it) or ``referrer``.
        index: the index blob.
        windows: the blobs of the layers' windows.
        packs: indexes of packs, one a workload, with the annotation that says which.
        seen_s: when it was made or found, in seconds since the epoch.
    """

    origin: str
    index: Descriptor
    windows: tuple[Descriptor, ...]
    packs: tuple[Descriptor, ...]
    seen_s: int

    def to_json(self) -> dict[str, Json]:
        """As a JSON object."""
        return {
            "origin": self.origin,
            "index": self.index.to_json(),
            "windows": [blob.to_json() for blob in self.windows],
            "packs": [blob.to_json() for blob in self.packs],
            "seen": self.seen_s,
        }

    @classmethod
    def from_json(cls, value: object) -> "Sidecar":
        """Read what :meth:`to_json` wrote. Raises IntegrityError."""
        match value:
            case {
                "origin": ("local" | "referrer") as origin,
                "index": index,
                "windows": list(windows),
                "packs": list(packs),
                "seen": int(seen_s),
            }:
                return cls(
                    origin,
                    Descriptor.from_json(index, "index of a sidecar"),
                    tuple(Descriptor.from_json(blob, "windows of a sidecar") for blob in windows),
                    tuple(Descriptor.from_json(blob, "pack of a sidecar") for blob in packs),
                    seen_s,
                )
        raise IntegrityError("this is no note of a sidecar")


class KeptSidecars:
    """The sidecars of one cache directory. Everything blocks; any thread, and several processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, manifest: Digest) -> Sidecar | None:
        """The sidecar of an image, or None."""
        path = self.note(manifest)
        if (data := read_file(path, _MAX_NOTE)) is None:
            return None
        try:
            sidecar = Sidecar.from_json(parse_json(data, str(path), limit=_MAX_NOTE))
        except IntegrityError as error:
            _log.warning("cannot use %s: %s", path, error)
            return None
        if sidecar.origin == "local" and not all(map(self._has, (sidecar.index, *sidecar.windows))):
            return None
        with suppress(OSError):
            os.utime(path)  # who evicts takes the oldest
        return sidecar

    def keep(self, manifest: Digest, sidecar: Sidecar) -> None:
        """Note the sidecar of an image, in place of an earlier one. Raises CacheError."""
        self._write(self.note(manifest), canonical_json(sidecar.to_json()))

    def forget(self, manifest: Digest) -> None:
        """Have no sidecar of an image any more."""
        with suppress(OSError):
            self.note(manifest).unlink()

    def add(self, descriptor: Descriptor, data: bytes) -> None:
        """Put a blob of this host here. Raises CacheError."""
        self._write(self._path(descriptor), data)

    def adopt(self, descriptor: Descriptor, path: Path) -> None:
        """The same with a file of the same file system, which is moved. Raises CacheError."""
        target = self._path(descriptor)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        except OSError as error:
            raise self._refused(error) from error

    def blob(self, descriptor: Descriptor) -> FileBlob | None:
        """A blob that is here, unverified."""
        path = self._path(descriptor)
        return (
            FileBlob(path, f"local/index@{descriptor.digest}", descriptor.size)
            if self._has(descriptor)
            else None
        )

    def _has(self, descriptor: Descriptor) -> bool:
        with suppress(OSError):
            return self._path(descriptor).stat().st_size == descriptor.size
        return False

    def note(self, manifest: Digest) -> Path:
        """The file that says which sidecar an image has, if it exists."""
        return self._directory / f"{manifest.algorithm}-{manifest.hex}.json"

    def _path(self, descriptor: Descriptor) -> Path:
        return self._directory / "blobs" / descriptor.digest.algorithm / descriptor.digest.hex

    def _write(self, path: Path, data: bytes) -> None:
        try:
            replace_file(path, data)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot keep an index in {self._directory}: {error.strerror}",
            hint="make room on the disk of the cache, or choose another with --cache-dir or VENEER_CACHE_DIR",
        )
