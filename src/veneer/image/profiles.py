"""Profiles by image: where those made on this machine are kept, and which files of an image one is about.

Kept in ``cache_dir/profiles/MANIFEST DIGEST/WORKLOAD.json``, and found by layer (:mod:`veneer.image.by_layer`).
They cannot be fetched again, so ``veneer cache clear`` leaves them alone. Everything here blocks.
"""

import stat
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import CacheError, IntegrityError, NotFound, UnsupportedFormat
from veneer.formats.local import replace_file
from veneer.image.by_layer import note_layers
from veneer.index.model import Extent, ImageIndex
from veneer.oci.digest import Digest
from veneer.prefetch.profile import MAX_PROFILE_SIZE, Profile, Use, check_workload
from veneer.prefetch.recorder import PAGE

__all__ = ["FileUse", "files_used", "keep_profile", "kept_profile", "kept_workloads", "read_profile"]

_SUFFIX = ".json"


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        OSError: it cannot be read.
        IntegrityError: it is no profile.
        UnsupportedFormat: it is of another version.
    """
    with path.open("rb") as file:
        data = file.read(MAX_PROFILE_SIZE + 1)
    try:
        return Profile.parse(data)
    except (IntegrityError, UnsupportedFormat) as error:
        raise type(error)(f"{path}: {error.message}") from error


def kept_workloads(cache_dir: Path, image: Digest) -> list[str]:
    """Of which workloads of an image there are profiles here."""
    return sorted(path.stem for path in _directory(cache_dir, image).glob(f"[!.]*{_SUFFIX}"))


def kept_profile(cache_dir: Path, image: Digest, workload: str) -> Profile:
    """The profile of one workload of an image. Raises NotFound when there is none, or what reading it does."""
    check_workload(workload)
    path = _directory(cache_dir, image) / f"{workload}{_SUFFIX}"
    try:
        return read_profile(path)
    except FileNotFoundError as error:
        names = ", ".join(kept_workloads(cache_dir, image))
        raise NotFound(
            f"there is no profile of the workload {workload} of {image} here",
            hint=f"there are: {names}" if names else "make one: veneer profile record IMAGE -- CMD",
        ) from error
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}") from error


def keep_profile(cache_dir: Path, image: Digest, profile: Profile) -> Path:
    """Put a profile in the place of the one of the same workload, at once. Raises CacheError."""
    path = _directory(cache_dir, image) / f"{profile.workload}{_SUFFIX}"
    try:
        replace_file(path, profile.to_json())
        note_layers(cache_dir / "profiles", profile.layers, profile.workload, image)
    except OSError as error:
        raise CacheError(f"cannot keep the profile {path}: {error.strerror}") from error
    return path


def _directory(cache_dir: Path, image: Digest) -> Path:
    return cache_dir / "profiles" / str(image)


@dataclass(frozen=True, slots=True)
class FileUse:
    """A file of which a profile has something.

    Args:
        path: from the root of the image, without a slash in front; one of its names.
        size: of the file.
        used: how many of its bytes, in pages of the file.
        first_ms: when the first of them was used.
    """

    path: bytes
    size: int
    used: int
    first_ms: float


def files_used(index: ImageIndex, profile: Profile) -> list[FileUse]:
    """The files that a profile is about, in order of first use.

    Ranges are aligned outward to pages of the device, which files are not: a page of a file counts when all of
    it is in the profile. Small files that share a page with what was read cannot be told from it.
    """
    layers = _by_layer(profile)
    wanted = [layers.get(device.diff_id) for device in index.devices]
    files: list[FileUse] = []
    seen: set[int] = set()
    for path, node in index.walk():
        layer = wanted[index.device_of(node)]
        if layer is None or node in seen or not stat.S_ISREG(index.mode[node]):
            continue
        seen.add(node)
        ranges = [found for extent in index.extents(node) for found in layer.pages(extent)]
        if ranges:
            first_ms = min(layer.first_ms(start, end) for start, end in ranges)
            used = sum(end - start for start, end in ranges)
            files.append(FileUse(path, index.size[node], used, first_ms))
    return sorted(files, key=lambda use: (use.first_ms, use.path))


class _Layer:
    """The uses of one layer, by place."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self._uses = sorted(uses, key=lambda use: use.offset)
        self._offsets = [use.offset for use in self._uses]
        #: Uses that touch are one range.
        self._starts: list[int] = []
        self._ends: list[int] = []
        for use in self._uses:
            if self._ends and self._ends[-1] == use.offset:
                self._ends[-1] = use.end
            else:
                self._starts.append(use.offset)
                self._ends.append(use.end)

    def pages(self, extent: Extent) -> Iterator[tuple[int, int]]:
        """The ranges of the device that hold whole pages of a file, or all that the extent has of a page."""
        base, end = extent.offset - extent.file_offset, extent.offset + extent.length
        place = bisect_right(self._ends, extent.offset)
        while place < len(self._starts) and self._starts[place] < end:
            low, high = self._starts[place], self._ends[place]
            low = extent.offset if low <= extent.offset else base + -(-(low - base) // PAGE) * PAGE
            high = end if high >= end else base + (high - base) // PAGE * PAGE
            if low < high:
                yield low, high
            place += 1

    def first_ms(self, start: int, end: int) -> float:
        """When something of a range was used first."""
        low = bisect_right(self._offsets, start) - 1
        return min(use.first_ms for use in self._uses[low : bisect_left(self._offsets, end)])


def _by_layer(profile: Profile) -> dict[Digest, _Layer]:
    uses: defaultdict[Digest, list[Use]] = defaultdict(list)
    for use in profile.uses:
        uses[use.layer].append(use)
    return {layer: _Layer(found) for layer, found in uses.items()}
