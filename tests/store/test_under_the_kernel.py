"""A mounted device through its life, read by the kernel: filled, complete, watched, evicted, filled again."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.store.owning import Clock, owning_store
from tests.store.rig import KIB, ZSTD, ScriptedSource, sample
from veneer.erofs.writer import write_erofs
from veneer.index.model import ImageIndex
from veneer.mount import fanotify
from veneer.mount.erofs import erofs_over, nameless, one_file
from veneer.mount.filetable import FileTable
from veneer.mount.precontent import GuardedDevices
from veneer.store.maintenance import collect
from veneer.store.pin import is_pinned_for_good
from veneer.store.spanstore import AttachedDevice, SpanStore

SPAN = 64 * KIB


@contextmanager
def opened(mount: int) -> Iterator[int]:
    file = os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
    try:
        yield file
    finally:
        os.close(file)


def read(mount: int, offset: int, length: int) -> bytes:
    """What is on disk, not what the kernel remembers of the file."""
    with opened(mount) as file:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file, length, offset)


def marked(devices: GuardedDevices) -> int:
    """How many devices ask before they are read."""
    return devices.stats.marked


@asynccontextmanager
async def owner(
    directory: Path,
    clock: Clock,
    group: int,
    index: ImageIndex,
    source: ScriptedSource,
    *,
    restoring: bool = False,
) -> AsyncIterator[tuple[SpanStore, GuardedDevices, AttachedDevice]]:
    """A process that answers for the first device of the index, which is held."""
    devices = GuardedDevices(group, restoring=restoring)
    async with owning_store(directory, clock) as store, trio.open_nursery() as nursery:
        await nursery.start(devices.serve)
        attached = store.attach(index.devices[0], source)
        await devices.hold(store, attached, FileTable(lambda: index), "test")
        yield store, devices, attached
        nursery.cancel_scope.cancel()


@pytest.mark.root
async def test_the_next_owner_goes_on_where_the_last_one_died(tmp_path: Path) -> None:
    # More than one miss brings, so that it is not complete by the time that something is to be evicted.
    one, clock = sample([SPAN] * 64, codecs=(ZSTD,)), Clock()
    source, size = ScriptedSource(one.blob), len(one.plain)
    index = replace(one_file(one.plain), devices=(one.device,))
    image, group = write_erofs(one_file(one.plain)).data, fanotify.open_group()
    with trio.fail_after(60), ExitStack() as stack:
        stack.callback(os.close, group)
        async with owner(tmp_path, clock, group, index, source) as (store, devices, attached):
            path = f"/proc/self/fd/{attached.data_fd}"
            metadata = stack.enter_context(nameless(image, tmp_path))
            mount = stack.enter_context(erofs_over(metadata, [Path(path)]))
            devices.opened(attached)
            assert await trio.to_thread.run_sync(read, mount, 0, SPAN) == one.plain[:SPAN]
            requests = len(source.requests)
        collected = collect(tmp_path / "cache", 0)
        assert (collected.bytes, collected.mounted) == (0, 1), "nobody owns it, and the kernel has it"
        async with owner(tmp_path, clock, group, index, source, restoring=True) as (store, devices, attached):
            devices.restored()
            devices.opened(attached)
            assert devices.stats.adopted == 1
            assert await trio.to_thread.run_sync(read, mount, 0, SPAN) == one.plain[:SPAN]
            assert len(source.requests) == requests
            clock.advance()
            # Through the descriptor that was adopted: another one would wait for itself.
            assert await trio.to_thread.run_sync(store._cache.collect, 0) > 0
            assert await trio.to_thread.run_sync(read, mount, 0, size) == one.plain
            assert len(source.requests) > requests


@pytest.mark.root
async def test_a_device_is_evicted_under_its_readers_and_comes_back(tmp_path: Path) -> None:
    one, clock = sample([SPAN] * 16, codecs=(ZSTD,)), Clock()
    source, size = ScriptedSource(one.blob), len(one.plain)
    index = replace(one_file(one.plain), devices=(one.device,))
    image, group = write_erofs(one_file(one.plain)).data, fanotify.open_group()
    with trio.fail_after(60), ExitStack() as stack:
        stack.callback(os.close, group)
        async with owner(tmp_path, clock, group, index, source) as (store, devices, attached):
            cache, directory = store._cache, tmp_path / "cache" / "devices" / one.device.key.hex
            with nameless(image, tmp_path) as metadata, erofs_over(metadata, [directory / "data"]) as mount:
                devices.opened(attached)
                assert await trio.to_thread.run_sync(read, mount, 0, size) == one.plain
                while marked(devices):
                    await trio.lowlevel.checkpoint()
                assert attached.complete
                events, requests = devices.stats.events, len(source.requests)
                assert await trio.to_thread.run_sync(read, mount, 0, size) == one.plain
                assert devices.stats.events == events, "a complete device does not ask"

                assert await trio.to_thread.run_sync(cache.collect, 0) == 0
                assert marked(devices) == 1
                clock.advance(59)
                assert await trio.to_thread.run_sync(read, mount, 5 * SPAN, 100) == one.plain[5 * SPAN :][:100]
                assert devices.stats.events > events, "it asks again"
                clock.advance(1)
                freed = await trio.to_thread.run_sync(cache.collect, 0)
                assert 12 * SPAN <= freed <= 15 * SPAN
                assert store.holds(attached, 5 * SPAN, SPAN)
                assert (directory / "data").stat().st_blocks * 512 == size - freed

                assert await trio.to_thread.run_sync(read, mount, 0, size) == one.plain
                assert len(source.requests) > requests
                while marked(devices):
                    await trio.lowlevel.checkpoint()
                assert attached.complete
                assert is_pinned_for_good(directory)
            await devices.release(attached)
            assert not is_pinned_for_good(directory)
            store.detach(attached)
