"""Look after the device cache of a machine, whether or not something is mounted.

Everything here goes through the same maps and locks as live mounts do, so that nothing it does can give a mount
a wrong byte: a span that is taken away is a miss there, and fetched again. Only devices that the kernel reads
by itself are left alone, and counted: who has them mounted looks after them (:mod:`veneer.store.owned`). Not
even their bytes are read, since that would wait for a daemon that may be busy, or gone.

Not for: the small blobs of images (:mod:`veneer.formats.local`), which :func:`clear` merely deletes, and
writable layers, which are no cache.

All functions raise CacheError when the cache directory cannot be used.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.errors import CacheError
from veneer.events import Notice, Progress, Reporter, silent
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile
from veneer.store.kept import kept_items
from veneer.store.pin import is_in_use, is_pinned_for_good
from veneer.store.presence import MapMismatch

__all__ = [
    "Checked",
    "Cleared",
    "Collected",
    "DeviceInfo",
    "Usage",
    "check",
    "clear",
    "collect",
    "list_devices",
    "usage",
]

#: Verified copies of manifests, configs, indexes and their sections, EROFS images made of them, and notes of
#: indexes that are wrong: safe to delete at any time, and not counted.
_METADATA = ("blobs", "tags", "sections", "erofs", "refuted")
#: Spans verified between two reports.
_CHECK_BATCH = 64


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device of the cache.

    Args:
        key: names it.
        blob: digest of the layer.
        form: ``plain`` or ``stored``; "" when its map is damaged.
        size: bytes when complete.
        present: bytes on disk.
        spans: in all.
        present_spans: on disk.
        last_used_ns: when a span of it was last used, since the epoch; 0 if never.
        in_use: whether a process has it open.
        mounted: whether the kernel reads it by itself.
    """

    key: str
    blob: str
    form: str
    size: int
    present: int
    spans: int
    present_spans: int
    last_used_ns: int
    in_use: bool
    mounted: bool

    def to_json(self) -> dict[str, str | int | bool]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that the cache takes.

    Args:
        devices: how many there are.
        bytes: within the quota, in all.
        kept: by kind (``sidecar``, ``pack``, ``index``), what is kept besides devices: how many, and bytes.
        metadata_bytes: of the small blobs that describe images, which do not count.
    """

    devices: int
    bytes: int
    kept: Mapping[str, tuple[int, int]]
    metadata_bytes: int

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        kept = {kind: {"count": count, "bytes": size} for kind, (count, size) in self.kept.items()}
        return asdict(self) | {"kept": kept}


@dataclass(slots=True)
class Checked:
    """What :func:`check` did. ``damaged`` and ``discarded`` are gone from the cache, and no loss.

    ``mounted`` is how many devices the kernel reads by itself, which were left alone.
    """

    spans: int = 0
    bytes: int = 0
    damaged: int = 0
    discarded: int = 0
    mounted: int = 0

    def to_json(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Collected:
    """What :func:`collect` did: bytes freed, and how many devices the kernel reads, which were left alone."""

    bytes: int
    mounted: int

    def to_json(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)


@dataclass(slots=True)
class Cleared:
    """What :func:`clear` did: devices deleted, devices in use that were emptied, and bytes freed.

    ``mounted`` is how many devices the kernel reads by itself, which were left alone.
    """

    removed: int = 0
    emptied: int = 0
    bytes: int = 0
    mounted: int = 0

    def to_json(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)


def list_devices(cache_dir: Path) -> list[DeviceInfo]:
    """Every device, most recently used first."""
    with _opened(cache_dir) as cache:
        return sorted(
            (info for path in cache.paths() if (info := _describe(cache, path))),
            key=lambda info: info.last_used_ns,
            reverse=True,
        )


def usage(cache_dir: Path) -> Usage:
    """How much there is."""
    with _opened(cache_dir) as cache:
        kept = dict.fromkeys(("sidecar", "pack", "index"), (0, 0))
        for item in kept_items(cache_dir):
            count, size = kept[item.kind]
            kept[item.kind] = count + 1, size + item.size
        return Usage(len(cache.paths()), cache.count(), kept, sum(map(_tree_size, _metadata(cache_dir))))


def collect(cache_dir: Path, quota: int) -> Collected:
    """Evict what was not used for longest until at most ``quota`` bytes are left.

    Also removes what a crash left behind.
    """
    with _opened(cache_dir) as cache:
        return Collected(cache.collect(quota), sum(map(is_pinned_for_good, cache.paths())))


def check(cache_dir: Path, report: Reporter = silent) -> Checked:
    """Hash every span on disk again and drop what is not what it was when it was verified."""
    checked = Checked()
    with _opened(cache_dir) as cache:
        for path in cache.paths():
            if is_pinned_for_good(path):
                checked.mounted += 1
                continue
            try:
                with cache.visit(path) as file:
                    _check_device(cache, file, checked, report)
            except FileNotFoundError:
                continue
            except MapMismatch as error:
                report(Notice(f"device {path.name}: {error}"))
                checked.discarded += cache.remove(path)
    return checked


def _check_device(cache: DeviceCache, file: DeviceFile, checked: Checked, report: Reporter) -> None:
    name = file.directory.name
    numbers = file.map.on_disk()
    sizes = [file.map.lengths[number] for number in numbers]
    total, done = sum(sizes), 0
    for first in range(0, len(numbers), _CHECK_BATCH):
        past = first + _CHECK_BATCH
        result = cache.verify(file, numbers[first:past])
        size = sum(sizes[first:past])
        done += size
        checked.spans += result.right
        checked.bytes += size - result.freed
        checked.damaged += len(result.dropped)
        if result.dropped:
            report(Notice(f"device {name}: dropped damaged spans {result.dropped}"))
        report(Progress("check", name[:12], done, total))


def clear(cache_dir: Path) -> Cleared:
    """Delete every device that nobody has open, empty those that somebody has, and delete the metadata.

    Mounts go on: they fetch again what they read.
    """
    cleared = Cleared()
    with _opened(cache_dir) as cache:
        before = cache.count()
        for path in cache.paths():
            if cache.remove(path):
                cleared.removed += 1
            elif is_pinned_for_good(path):
                cleared.mounted += 1
            else:
                cleared.emptied += 1
        cache.empty()
        cleared.bytes = max(0, before - cache.count())
    for directory in (*_metadata(cache_dir), cache_dir / "layers"):
        shutil.rmtree(directory, ignore_errors=True)
    return cleared


@contextmanager
def _opened(cache_dir: Path) -> Iterator[DeviceCache]:
    cache = DeviceCache(cache_dir, 0)
    try:
        yield cache
    except OSError as error:
        raise CacheError(f"the cache in {cache_dir} cannot be read or changed: {error}") from error
    finally:
        cache.close()


def _describe(cache: DeviceCache, path: Path) -> DeviceInfo | None:
    mounted, in_use = is_pinned_for_good(path), is_in_use(path)
    try:
        with cache.visit(path) as file:
            held = list(file.held())
            size = sum(file.map.lengths)
            used = max((used for _, used, _ in held), default=0)
            present = file.map.present_bytes
            blob, form, spans = file.map.blob, file.map.form, file.map.count
            return DeviceInfo(path.name, blob, form, size, present, spans, len(held), used, in_use, mounted)
    except FileNotFoundError:
        return None
    except MapMismatch:
        return DeviceInfo(path.name, "", "", 0, 0, 0, 0, 0, in_use, mounted)


def _metadata(cache_dir: Path) -> list[Path]:
    return [cache_dir / name for name in _METADATA]


def _tree_size(directory: Path) -> int:
    total = 0
    # Not Path.rglob, which raises for a directory that is deleted meanwhile.
    for where, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(where, name)).st_size
    return total
