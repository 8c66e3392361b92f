"""Mounts by erofs-fanotify in the test's own process, over a store in memory that does as it is told.

Reads of a mount are done in threads or other processes, never by the task that serves it.
"""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import trio

from tests.mount.images import digest
from veneer.errors import VeneerError
from veneer.index.model import Device, ImageIndex, SpanTable
from veneer.mount import fanotify, kernel
from veneer.mount.erofs_fanotify import mount_guarded, tail_file
from veneer.mount.filetable import FileTable
from veneer.mount.metadata import metadata_image
from veneer.mount.precontent import GuardedDevices
from veneer.mount.resident import Guards
from veneer.mount.superblocks import Superblocks
from veneer.store.presence import Form
from veneer.store.punch import punch
from veneer.store.spanstore import AttachedDevice, SpanStore

T = TypeVar("T")

#: What is filled at a time.
SPAN = 128 << 10


class FakeDevice:
    """An attached device, as far as it is asked about."""

    def __init__(self, device: Device, data: bytes, path: Path) -> None:
        self.device = device
        self.spans: SpanTable = device.spans
        self.size = len(data)
        self.data = data
        self.path = path
        self.form = Form.PLAIN
        self.there: set[int] = set()
        self.complete = False
        self.pinned = False
        self.data_fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if not os.fstat(self.data_fd).st_size:
            os.ftruncate(self.data_fd, self.size)

    @property
    def all_present(self) -> bool:
        return len(self.there) == -(-self.size // SPAN)

    @property
    def real(self) -> AttachedDevice:
        return cast("AttachedDevice", self)

    def forget_cached_pages(self) -> None:
        assert self.data_fd is not None
        os.fsync(self.data_fd)
        os.posix_fadvise(self.data_fd, 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class FakeStore:
    """Fills whole spans of the range and, like a store, of as much of the window as is asked for.

    ``failure`` ends fills, ``blocked`` keeps them waiting, ``crash`` is a bug.
    """

    failure: VeneerError | None = None
    blocked: trio.Event | None = None
    crash: Exception | None = None
    lie: bool = False
    proof: VeneerError | bool = True
    fills: list[tuple[int, int, tuple[int, int] | None]] = field(default_factory=list)
    #: Spans that had to be fetched.
    fetched: list[int] = field(default_factory=list)
    proofs: int = 0
    #: Set and made anew by each fill.
    filling: trio.Event = field(default_factory=trio.Event)
    before_punch: dict[int, object] = field(default_factory=dict)

    @property
    def real(self) -> SpanStore:
        return cast("SpanStore", self)

    def holds(self, attached: FakeDevice, offset: int, length: int) -> bool:
        assert length > 0
        assert 0 <= offset < offset + length <= attached.size
        return attached.there.issuperset(_spans(offset, offset + length))

    async def fill(
        self, attached: FakeDevice, offset: int, length: int, *, window: tuple[int, int] | None = None
    ) -> None:
        self.fills.append((offset, length, window))
        self.filling.set()
        self.filling = trio.Event()
        if self.blocked is not None:
            await self.blocked.wait()
        await trio.lowlevel.checkpoint()
        if self.crash is not None:
            raise self.crash
        if self.failure is not None:
            raise self.failure
        if self.lie:
            return
        start, end = window or (offset, offset + length)
        assert start <= offset
        assert offset + length <= end <= attached.size
        assert attached.data_fd is not None
        for number in _spans(start, end):
            if number not in attached.there:
                attached.there.add(number)
                self.fetched.append(number)
                at = number * SPAN
                os.pwrite(attached.data_fd, attached.data[at : at + SPAN], at)

    async def prove(self, attached: FakeDevice) -> bool:
        self.proofs += 1
        await trio.lowlevel.checkpoint()
        if isinstance(self.proof, VeneerError):
            raise self.proof
        attached.complete = self.proof and attached.all_present
        return attached.complete

    def pin(self, attached: FakeDevice, before_punch: object) -> None:
        assert not attached.pinned
        attached.pinned = True
        self.before_punch[id(attached)] = before_punch

    def unpin(self, attached: FakeDevice) -> None:
        assert attached.pinned
        attached.pinned = False

    async def evict(self, attached: FakeDevice) -> None:
        """All of a device: clear, mark, punch."""
        attached.there.clear()
        attached.complete = False
        mark = self.before_punch[id(attached)]
        assert callable(mark)
        await trio.to_thread.run_sync(mark)
        assert attached.data_fd is not None
        # ftruncate(2) asks even through a descriptor that does not.
        punch(attached.data_fd, 0, attached.size)


async def in_thread(function: Callable[[], T]) -> T:
    """What may touch the mount. Given up when the test fails, so that it ends."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


async def run(*command: str | Path) -> bytes:
    """What a program prints."""
    done = await trio.run_process([os.fspath(part) for part in command], capture_stdout=True)
    assert isinstance(done.stdout, bytes)
    return done.stdout


def _spans(start: int, end: int) -> range:
    return range(start // SPAN, -(-end // SPAN))


@dataclass
class Guarded:
    """What serves mounts, and one image for it."""

    directory: Path
    group: int
    devices: GuardedDevices
    superblocks: Superblocks
    store: FakeStore
    index: ImageIndex
    device: FakeDevice

    async def mount(self, name: str = "mnt", *, settle: bool = True) -> tuple[Path, trio.Event]:
        """Hold the device and mount the image on a new directory."""
        target = self.directory / name
        target.mkdir()
        files = FileTable(lambda: self.index)
        files.prepare(self.device.device.key)
        await self.devices.hold(self.store.real, self.device.real, files, "test")
        metadata = metadata_image(lambda: self.index, digest(os.urandom(16)), 1, self.directory / "cache")
        tail = await tail_file(metadata, _Reader(self.device.data), [0])
        attached: Sequence[AttachedDevice] = [self.device.real]
        gone, _ = await trio.to_thread.run_sync(
            mount_guarded, metadata, attached, tail, target, self.superblocks
        )
        if settle:
            self.devices.opened(self.device.real)
        return target, gone

    async def unmount(self, target: Path, gone: trio.Event, *, lazy: bool = False) -> None:
        await trio.to_thread.run_sync(lambda: kernel.unmount_ours(target, lazy=lazy))
        await gone.wait()
        await self.devices.release(self.device.real)


@asynccontextmanager
async def guards() -> AsyncIterator[Guards]:
    """What a daemon has for its mounts."""
    group = fanotify.open_group()
    both = Guards(GuardedDevices(group), Superblocks())
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(both.devices.serve)
            await nursery.start(both.superblocks.serve)
            yield both
            nursery.cancel_scope.cancel()
    finally:
        os.close(group)


@dataclass
class _Reader:
    data: bytes

    async def read(self, attached: int, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.data[offset : offset + length]


@asynccontextmanager
async def guarding(
    directory: Path,
    index: ImageIndex,
    data: bytes,
    *,
    group: int | None = None,
    most_pending: int | None = None,
) -> AsyncIterator[Guarded]:
    """Everything is served, nothing is mounted yet. A group that is given stays open afterwards."""
    own = fanotify.open_group() if group is None else group
    devices = GuardedDevices(own, most_pending=most_pending, restoring=group is not None)
    superblocks = Superblocks()
    device = FakeDevice(index.devices[0], data, directory / "device")
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(devices.serve)
            await nursery.start(superblocks.serve)
            yield Guarded(directory, own, devices, superblocks, FakeStore(), index, device)
            nursery.cancel_scope.cancel()
    finally:
        for entry in reversed(kernel.mount_table()):
            if directory in entry.mountpoint.parents:
                kernel.unmount_ours(entry.mountpoint, lazy=True)
        assert device.data_fd is not None
        os.close(device.data_fd)
        if group is None:
            os.close(own)
