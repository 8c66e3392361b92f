"""Complete devices that the kernel reads and nobody answers for: nothing of them is taken away."""

import errno
import os
from pathlib import Path

import pytest

from tests.store.owning import Clock, owning_store
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample, store_settings
from tests.store.test_processes import go, started
from veneer.errors import CacheError
from veneer.store import presence
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import Evicted
from veneer.store.maintenance import check, clear, collect, list_devices
from veneer.store.pin import Freeze, is_pinned_for_good
from veneer.store.presence import PRESENT
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store

SIZE = 600 * KIB


async def complete(store: SpanStore, one: Sample) -> AttachedDevice:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    assert await store.prove(attached)
    return attached


def frozen(store: SpanStore, attached: AttachedDevice) -> Freeze:
    found = store.freeze(attached)
    assert found is not None
    return found


def assert_whole(directory: Path, one: Sample) -> None:
    assert (directory / "data").read_bytes() == one.plain
    assert (directory / "data").stat().st_blocks * 512 >= SIZE, "no hole"


async def test_only_what_was_proven_to_be_complete_is_frozen(
    store: SpanStore, one: Sample, directory: Path
) -> None:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    assert store.freeze(attached) is None
    await store.fill(attached, 0, attached.size)
    assert store.freeze(attached) is None, "nobody has compared it with its diffID"
    assert attached.file is not None
    assert attached.file.freeze() is None, "nor does it help to have looked before"
    assert await store.prove(attached)
    held = frozen(store, attached)
    assert held.data.read_bytes() == one.plain
    assert is_pinned_for_good(directory)
    held.release()
    assert not (directory / "frozen").exists()
    attached.file.evict([3])
    assert store.freeze(attached) is None


async def test_nobody_takes_anything_from_a_frozen_device(
    tmp_path: Path, store: SpanStore, one: Sample, directory: Path
) -> None:
    attached = await complete(store, one)
    first, second = frozen(store, attached), frozen(store, attached)
    cache_dir = tmp_path / "cache"
    for held in (first, second):
        assert attached.file is not None
        assert attached.file.evict(range(10)) == Evicted(0, 0)
        async with open_store(store_settings(tmp_path)) as other:
            theirs = other.attach(one.device, ScriptedSource(one.blob))
            assert theirs.file is not None
            assert theirs.file.evict(range(10)) == Evicted(0, 0)
            assert list(theirs.file.evictable()) == []
        assert collect(cache_dir, 0).mounted == 1
        assert check(cache_dir).mounted == 1
        assert clear(cache_dir).mounted == 1
        assert [info.mounted for info in list_devices(cache_dir)] == [True]
        assert_whole(directory, one)
        held.release()
    assert clear(cache_dir).bytes == SIZE, "not mounted any more"


async def test_eviction_goes_to_others_and_a_quota_costs_the_cache_only(tmp_path: Path, one: Sample) -> None:
    other = sample([60 * KIB] * 10, codecs=(RAW,), seed=1)
    async with open_store(store_settings(tmp_path, quota=SIZE + 120 * KIB)) as store:
        held = frozen(store, await complete(store, one))
        attached = store.attach(other.device, ScriptedSource(other.blob))
        for offset in range(0, SIZE, 60 * KIB):
            assert await store.read(attached, offset, 60 * KIB) == other.plain[offset : offset + 60 * KIB]
        assert attached.file is not None
        assert 0 < attached.file.map.present_bytes <= 120 * KIB
        assert held.data.read_bytes() == one.plain
        held.release()


async def test_the_owner_of_a_mount_leaves_a_frozen_device_as_it_is(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    """What was opened while the device was complete and unmarked never asks, whatever the owner marks."""
    clock, marked = Clock(), list[bool]()
    async with owning_store(tmp_path, clock) as store:
        attached = await complete(store, one)
        store.pin(attached, lambda: marked.append(True))
        held, file = frozen(store, attached), attached.file
        assert file is not None
        cache = DeviceCache(tmp_path / "cache", 1)
        for _ in range(3):
            assert file.evict(range(10)) == Evicted(0, 0)
            assert cache.collect(0) == 0
            clock.advance()
        cache.close()
        assert marked == []
        assert attached.complete
        assert_whole(directory, one)
        held.release()
        file.evict(range(10))
        clock.advance()
        assert file.evict(range(10)) == Evicted(10, SIZE)
        store.unpin(attached)


async def test_what_its_owner_cannot_write_again_is_not_punched_out_of_a_frozen_device(
    tmp_path: Path, store: SpanStore, one: Sample, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_fd: int, _buffers: object, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    attached = await complete(store, one)
    store.pin(attached, lambda: None)
    held = frozen(store, attached)
    assert attached.file is not None
    damaged = one.plain[: 60 * KIB] + b"damage" + one.plain[60 * KIB + 6 :]
    os.pwrite(attached.file.fd, b"damage", 60 * KIB)
    assert attached.file.verify(range(10)).dropped == [1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", no_space)
        with pytest.raises(CacheError):
            await store.fill(attached, 60 * KIB, 1)
    assert (directory / "data").read_bytes() == damaged, "whoever reads it by himself is not given zeros"
    held.release()
    store.unpin(attached)


async def test_eviction_that_has_begun_is_in_the_way(tmp_path: Path, one: Sample) -> None:
    """The owner watches a complete device before it evicts: from then on it is not complete."""
    async with owning_store(tmp_path, Clock()) as store:
        attached = await complete(store, one)
        store.pin(attached, lambda: None)
        assert attached.file is not None
        attached.file.evict(range(10))
        assert store.freeze(attached) is None
        store.unpin(attached)


async def test_it_stays_frozen_after_its_process_was_killed_as_long_as_anything_reads_it(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    with started("freeze", tmp_path, 1, 0) as process:
        go(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "frozen\n"
        process.kill()
        process.wait()
    # As the kernel has it.
    with (directory / "data").open("rb"):
        assert is_pinned_for_good(directory)
        assert clear(tmp_path / "cache").mounted == 1
        assert_whole(directory, one)
    assert not is_pinned_for_good(directory)
    assert not (directory / "frozen").exists()
    assert clear(tmp_path / "cache").removed == 1


async def test_of_two_that_froze_it_the_dead_one_is_still_there(
    tmp_path: Path, store: SpanStore, one: Sample, directory: Path
) -> None:
    attached = await complete(store, one)
    held = frozen(store, attached)
    with started("freeze", tmp_path, 1, 0) as process:
        go(process)
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
    held.release()
    assert is_pinned_for_good(directory), "its mount may go on"
    assert attached.file is not None
    assert attached.file.evict(range(10)) == Evicted(0, 0)


async def test_after_a_boot_nothing_is_frozen(
    store: SpanStore, one: Sample, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = frozen(store, await complete(store, one))
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    assert not is_pinned_for_good(directory)
    held.close()


async def test_a_damaged_map_costs_a_frozen_device_its_map_and_not_its_file(
    tmp_path: Path, store: SpanStore, one: Sample, directory: Path
) -> None:
    before = await complete(store, one)
    held = frozen(store, before)
    inode = (directory / "data").stat().st_ino
    with (directory / "map").open("r+b") as file:
        file.write(b"X")
    async with open_store(store_settings(tmp_path)) as other:
        attached = other.attach(one.device, ScriptedSource(one.blob))
        assert (directory / "data").stat().st_ino == inode
        assert store.freeze(before) is None, "what it looked at is not the device's map any more"
        assert await other.read(attached, 0, SIZE) == one.plain, "from the source"
        assert attached.file is not None
        assert list(attached.file.states) == [0] * 10, "nobody writes to it"
        other.pin(attached, lambda: None)
        await other.fill(attached, 0, 60 * KIB)
        assert attached.file.states[0] == PRESENT, "but the owner of a mount, the same bytes as before"
        assert attached.file.evict(range(10)) == Evicted(0, 0)
        other.unpin(attached)
    assert_whole(directory, one)
    held.release()
