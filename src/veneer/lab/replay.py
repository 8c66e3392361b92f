"""Reads again what a profile says that a start read, in its order and at its pace, without the container.

So policies and distances can be compared on one trace: nothing varies but what is compared. Reads follow one
another, as those of a starting program mostly do; what ran side by side when the profile was recorded runs one
after the other here. Every byte that is handed over went through the verification of whoever serves it.

Not for: what the kernel would read ahead by itself. Reads of a mount are exactly those of the profile.
"""

import hashlib
import os
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import trio

from veneer.errors import MountError, UsageError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.index.model import ImageIndex
from veneer.mount.filetable import FileTable
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile
from veneer.settings import Settings
from veneer.store.attached import AttachedDevice
from veneer.store.spanstore import SpanStore, open_store
from veneer.timing import Timing
from veneer.timing.gather import record_of
from veneer.timing.record import TimedDevice, TimingRecord

__all__ = [
    "FilePiece",
    "Replayed",
    "Step",
    "file_pieces",
    "replay_image",
    "replay_mount",
    "replay_store",
    "steps_of",
]

#: A read that took longer than this has waited for something: what is there takes some 10 microseconds.
WAITED_S = 0.001
#: Shorter pauses are put together. A sleep is late by some 0.1 ms, which is taken off the next one.
_LEAST_SLEEP_S = 0.002
#: The longest read: the kernel asks for no more at a time.
_MOST_READ = 128 << 10
#: Open files that are kept: a start opens some hundred.
_MOST_OPEN = 512


class Step(NamedTuple):
    """One read.

    Args:
        think_s: pause before it.
        layer: diffID.
        offset: in the device.
        length: in bytes.
    """

    think_s: float
    layer: Digest
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay went.

    Args:
        seconds: from the first think time to the last byte.
        think_s: of these, pauses that the profile says.
        wait_s: of these, in reads that took longer than a millisecond.
        reads: how many.
        waits: how many of them took longer than a millisecond.
        bytes_read: by all reads.
        unmapped: bytes of the profile that are in no file of the mount: headers, padding, what is hidden.
        longest_wait_s: of one read.
        sha256: of all bytes in the order read.
    """

    seconds: float
    think_s: float
    wait_s: float
    reads: int
    waits: int
    bytes_read: int
    unmapped: int
    longest_wait_s: float
    sha256: str

    def to_json(self) -> dict[str, object]:
        """The facts by name."""
        return asdict(self)


def steps_of(profile: Profile, image: Image, *, think: float = 1.0) -> list[Step]:
    """The reads of a profile.

    Think time is what passed between the end of one use's wait and the next first use: what the program did
    itself. The first one begins with the mount.

    Args:
        profile: of a start.
        image: its uses outside of this image's layers are an error.
        think: factor of all think times; 0 for reading as fast as can be.

    Raises:
        UsageError: the profile is about other layers, or ends behind them.
    """
    sizes = {device.diff_id: device.spans.size for device in image.devices}
    steps: list[Step] = []
    free_ms = 0.0
    for use in profile.uses:
        if (size := sizes.get(use.layer)) is None or use.end > size:
            raise UsageError(
                f"the profile reads {use.length} bytes at {use.offset} of {use.layer}, which {image.name} "
                "does not have",
                hint="replay it with the image that it was recorded of, or one that has the same layers",
            )
        pause_s = think * max(0.0, use.first_ms - free_ms) / 1e3
        free_ms = max(free_ms, use.first_ms + use.wait_ms)
        for at in range(use.offset, use.end, _MOST_READ):
            steps.append(Step(pause_s, use.layer, at, min(_MOST_READ, use.end - at)))
            pause_s = 0.0
    return steps


class _Tally:
    """Adds up one replay."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._hash = hashlib.sha256()
        self._think_s = self._wait_s = self._longest_s = self._owed_s = 0.0
        self._reads = self._waits = self._bytes = 0
        self.unmapped = 0

    def pause(self, seconds: float) -> float:
        """Count a pause; how long to sleep now for all that is owed, or 0 while that is too little."""
        self._think_s += seconds
        self._owed_s += seconds
        return self._owed_s if self._owed_s >= _LEAST_SLEEP_S else 0.0

    def slept(self, seconds: float) -> None:
        """Take note of a sleep, which may have been longer than it was to be."""
        self._owed_s -= seconds

    def read(self, took_s: float, data: bytes) -> None:
        self._reads += 1
        self._bytes += len(data)
        self._hash.update(data)
        if took_s > WAITED_S:
            self._waits += 1
            self._wait_s += took_s
            self._longest_s = max(self._longest_s, took_s)

    def result(self) -> Replayed:
        return Replayed(
            seconds=time.monotonic() - self._began,
            think_s=self._think_s,
            wait_s=self._wait_s,
            reads=self._reads,
            waits=self._waits,
            bytes_read=self._bytes,
            unmapped=self.unmapped,
            longest_wait_s=self._longest_s,
            sha256=self._hash.hexdigest(),
        )


async def replay_store(
    steps: Sequence[Step], image: Image, store: SpanStore, attached: Sequence[AttachedDevice]
) -> Replayed:
    """Read through a store alone, with the read-ahead of a mount. Raises what its reads do."""
    devices = {one.device.diff_id: one for one in attached}
    await image.load()
    files = FileTable(lambda: image.index)
    for one in image.devices:
        await trio.to_thread.run_sync(files.prepare, one.key)
    tally = _Tally()
    for step in steps:
        if pause_s := tally.pause(step.think_s):
            began = time.monotonic()
            await trio.sleep(pause_s)
            tally.slept(time.monotonic() - began)
        device = devices[step.layer]
        began = time.monotonic()
        data = store.cached(device, step.offset, step.length)
        if data is None:
            window = files.window(device.device.key, step.offset, step.length)
            data = await store.read(device, step.offset, step.length, window=window)
        tally.read(time.monotonic() - began, data)
    return tally.result()


async def replay_image(
    text: str, profile: Profile, settings: Settings, *, think: float = 1.0, report: Reporter = silent
) -> tuple[Replayed, Mapping[str, int], TimingRecord]:
    """Open an image and a store for it, and replay a profile there.

    Returns how it went, the store's counters, and when what happened. Raises VeneerError.
    """
    timing = Timing()
    async with (
        open_store(settings) as store,
        open_image(text, settings, report=report, timing=timing) as image,
    ):
        steps = steps_of(profile, image, think=think)
        with timing.phase("attach"):
            pairs = zip(image.devices, image.sources, strict=True)
            attached = [store.attach(device, source) for device, source in pairs]
        with timing.phase("replay"):
            replayed = await replay_store(steps, image, store, attached)
        devices = {
            one.device.key.hex: TimedDevice(
                str(one.device.blob.digest), "layer", one.size, one.device.blob.size
            )
            for one in attached
        }
        digest = str(image.manifest.digest)
        record = record_of(timing, store.log, devices, image=text, digest=digest, backend="store")
    return replayed, store.stats.to_json(), record


class FilePiece(NamedTuple):
    """A part of a file; ``path`` is from the root of the image, without a slash in front."""

    path: bytes
    offset: int
    length: int


def file_pieces(index: ImageIndex) -> Callable[[Step], Iterator[FilePiece]]:
    """What of the files of an image a read is of, in the order of the device."""
    tables: dict[Digest, list[tuple[int, int, int, bytes]]] = {}
    seen: set[int] = set()
    for path, node in index.walk():
        if node in seen or not stat.S_ISREG(index.mode[node]):
            continue
        seen.add(node)
        for extent in index.extents(node):
            layer = index.devices[extent.device].diff_id
            tables.setdefault(layer, []).append((extent.offset, extent.length, extent.file_offset, path))
    for table in tables.values():
        table.sort()
    starts = {layer: [row[0] for row in table] for layer, table in tables.items()}

    def pieces(step: Step) -> Iterator[FilePiece]:
        table = tables.get(step.layer, [])
        end = step.offset + step.length
        # Extents of one device do not overlap.
        for at in range(max(0, bisect_right(starts.get(step.layer, []), step.offset) - 1), len(table)):
            offset, length, file_offset, path = table[at]
            if offset >= end:
                break
            low, high = max(offset, step.offset), min(offset + length, end)
            if low < high:
                yield FilePiece(path, file_offset + low - offset, high - low)

    return pieces


def replay_mount(steps: Sequence[Step], index: ImageIndex, root: Path) -> Replayed:
    """Read through a mount of the image on ``root``; blocks.

    The kernel is told that reads are random, so that it reads nothing ahead.

    Raises MountError when a file cannot be read, which is what a program would have met.
    """
    pieces = file_pieces(index)
    files: dict[bytes, int] = {}
    tally = _Tally()
    try:
        for step in steps:
            if pause_s := tally.pause(step.think_s):
                began = time.monotonic()
                time.sleep(pause_s)
                tally.slept(time.monotonic() - began)
            found = 0
            for piece in pieces(step):
                began = time.monotonic()
                data = _read(files, os.fsencode(root), piece)
                tally.read(time.monotonic() - began, data)
                found += piece.length
            tally.unmapped += step.length - found
        return tally.result()
    finally:
        for fd in files.values():
            os.close(fd)


def _read(files: dict[bytes, int], root: bytes, piece: FilePiece) -> bytes:
    try:
        if (fd := files.get(piece.path)) is None:
            if len(files) >= _MOST_OPEN:
                os.close(files.pop(next(iter(files))))
            fd = files[piece.path] = os.open(
                os.path.join(root, piece.path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            )
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        data = os.pread(fd, piece.length, piece.offset)
    except OSError as error:
        shown = piece.path.decode(errors="backslashreplace")
        raise MountError(f"cannot read /{shown} at {piece.offset}: {error.strerror}") from error
    if len(data) != piece.length:
        raise MountError(f"/{piece.path.decode(errors='backslashreplace')} ends early at {piece.offset}")
    return data
