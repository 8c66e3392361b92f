"""Devices that the kernel reads by itself: nobody but their owner changes them, for as long as it does."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.invoking import invoke
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample, sample_of, store_settings
from tests.store.test_processes import go, started
from veneer.erofs.writer import write_erofs
from veneer.errors import CacheError
from veneer.mount.erofs import erofs_over, nameless, one_file
from veneer.store import presence
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile, Evicted, Fill
from veneer.store.maintenance import check, clear, collect, list_devices
from veneer.store.pin import is_answered_for, is_pinned_for_good
from veneer.store.presence import PRESENT, Form, Layout
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store


def nothing() -> None:
    """Marks nothing."""


@pytest.fixture
async def attached(store: SpanStore, one: Sample) -> AttachedDevice:
    """Pinned, and half there."""
    attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, 300 * KIB)
    store.pin(attached, nothing)
    return attached


def fill_of(one: Sample, number: int) -> Fill:
    span = one.device.spans[number]
    return Fill(number, one.plain[span.offset : span.offset + span.length], span.digest)


def allocated(directory: Path) -> int:
    return (directory / "data").stat().st_blocks * 512


async def test_all_others_only_read_a_pinned_device(
    tmp_path: Path, store: SpanStore, attached: AttachedDevice, one: Sample, directory: Path
) -> None:
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as other:
        theirs = other.attach(one.device, source)
        assert other.cached(theirs, 0, 300 * KIB) == one.plain[: 300 * KIB]
        assert await other.read(theirs, 0, attached.size) == one.plain, "what is missing they keep in memory"
        assert other.cached(theirs, 0, attached.size) == one.plain
        assert theirs.file is not None
        assert theirs.file.evict(range(10)) == Evicted(0, 0)
        assert theirs.file.write([fill_of(one, 9)]) == 0
        assert list(theirs.file.states) == [PRESENT] * 5 + [0] * 5
        with pytest.raises(CacheError, match=f"mounted by another process already .pid {os.getpid()}"):
            other.pin(theirs, nothing)
        store.unpin(attached)
        assert theirs.file.write([fill_of(one, 9)]) == 60 * KIB
        assert theirs.file.evict([9]) == Evicted(1, 60 * KIB)
        other.pin(theirs, nothing)
        other.unpin(theirs)
    assert allocated(directory) == 300 * KIB


async def test_damage_that_others_find_is_left_to_the_owner(
    tmp_path: Path, attached: AttachedDevice, one: Sample
) -> None:
    assert attached.data_fd is not None
    os.pwrite(attached.data_fd, b"damage", 70 * KIB)
    async with open_store(store_settings(tmp_path)) as other:
        theirs = other.attach(one.device, ScriptedSource(one.blob)).file
        assert theirs is not None
        assert theirs.verify(range(10)).dropped == []
        assert attached.file is not None
        assert attached.file.verify(range(10)).dropped == [1]
        assert os.pread(attached.data_fd, 6, 70 * KIB) == b"damage", "never punched: it is fetched in its place"


async def test_what_a_device_has_that_others_have_mounted_is_not_copied_from_it(
    tmp_path: Path, attached: AttachedDevice, one: Sample
) -> None:
    """Reading its file would wait for whoever answers for it."""
    alike = sample_of([one.plain[: 60 * KIB], b"other"], codecs=(RAW,))
    source = ScriptedSource(alike.blob)
    async with open_store(store_settings(tmp_path)) as other:
        other.attach(one.device, ScriptedSource(b""))
        second = other.attach(alike.device, source)
        # Looks for twins from now on.
        assert await other.read(second, 60 * KIB, 5) == b"other"
        assert await other.read(second, 0, 60 * KIB) == one.plain[: 60 * KIB]
        assert other.stats.copied == 0
    assert len(source.requests) == 2


async def test_a_mounted_file_of_another_size_is_nobody_s_data(
    tmp_path: Path, attached: AttachedDevice, one: Sample, directory: Path
) -> None:
    os.truncate(directory / "data", 100 * KIB)
    async with open_store(store_settings(tmp_path)) as other:
        theirs = other.attach(one.device, ScriptedSource(one.blob))
        assert await other.read(theirs, 0, theirs.size) == one.plain
        assert theirs.file is not None
        assert theirs.file.map.on_disk() == []


async def test_maintenance_leaves_pinned_devices_alone_and_says_so(
    tmp_path: Path,
    store: SpanStore,
    attached: AttachedDevice,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = sample([60 * KIB] * 2, codecs=(RAW,), seed=1)
    await store.fill(store.attach(other.device, ScriptedSource(other.blob)), 0, 120 * KIB)
    real, touched = os.pread, list[str]()

    def pread(fd: int, length: int, offset: int) -> bytes:
        touched.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    cache_dir = tmp_path / "cache"
    checked = check(cache_dir)
    assert (checked.spans, checked.mounted) == (2, 1)
    assert [info.mounted for info in list_devices(cache_dir)] == [False, True]
    collected = collect(cache_dir, 0)
    assert (collected.bytes, collected.mounted) == (120 * KIB, 1)
    cleared = clear(cache_dir)
    assert (cleared.removed, cleared.emptied, cleared.mounted) == (0, 1, 1)
    assert os.fspath(directory / "map") in touched
    assert os.fspath(directory / "data") not in touched, "reading it would wait for the daemon"
    assert attached.holds(0, 300 * KIB)
    assert "left 1 mounted layers alone" in invoke("cache", "clear", "--cache-dir", str(cache_dir)).stdout


async def test_a_device_that_nobody_but_the_kernel_has_open_is_not_removed(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, 60 * KIB)
        store.pin(attached, nothing)
        cache = DeviceCache(tmp_path / "cache", 1 << 30)
        assert not cache.remove(directory)
    with (directory / "data").open("rb"):
        assert not cache.remove(directory), "mounted, between two owners"
        assert cache.collect(0) == 0
    assert cache.remove(directory)
    cache.close()


# Owners that die


async def test_a_pin_outlives_its_owner_as_long_as_anything_reads_the_file(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    with started("pin", tmp_path, 1, 0) as process:
        go(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "pinned\n"
        assert json.loads((directory / "mounted").read_bytes())["pid"] == process.pid
        assert collect(tmp_path / "cache", 0).mounted == 1
        process.kill()
        process.wait()
    # As the kernel has it.
    with (directory / "data").open("rb"):
        assert is_pinned_for_good(directory)
        async with open_store(store_settings(tmp_path)) as store:
            attached = store.attach(one.device, ScriptedSource(one.blob))
            assert attached.file is not None
            assert attached.file.write([fill_of(one, 9)]) == 0
            store.pin(attached, nothing)
            assert json.loads((directory / "mounted").read_bytes())["pid"] == os.getpid(), "the next owner"
            assert attached.file.write([fill_of(one, 9)]) == 60 * KIB
            assert attached.holds(0, 300 * KIB), "what the first one filled"
    assert (directory / "mounted").exists(), "ending is not unmounting"


async def test_a_stale_pin_goes_when_it_is_found(tmp_path: Path, one: Sample, directory: Path) -> None:
    with started("pin", tmp_path, 1, 0) as process:
        go(process)
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        assert not (directory / "mounted").exists()
        await store.fill(attached, 0, attached.size)
        assert attached.holds(0, attached.size)


async def test_while_a_process_has_the_device_open_a_pin_is_not_stale(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        with started("pin", tmp_path, 1, 0) as process:
            go(process)
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
            process.wait()
        assert is_pinned_for_good(directory), "this process may be the one that serves the mount next"
        assert attached.file is not None
        assert attached.file.write([fill_of(one, 9)]) == 0
    assert not is_pinned_for_good(directory)


async def test_who_only_asks_about_a_pin_is_not_taken_for_its_owner(
    tmp_path: Path, one: Sample, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        store.pin(store.attach(one.device, ScriptedSource(one.blob)), nothing)
        assert is_answered_for(directory)

    flock = fcntl.flock
    asked: list[int] = []

    def flock_and_ask(fd: int, kind: int) -> None:
        flock(fd, kind)
        if not asked:
            asked.append(fd)
            assert not is_answered_for(directory), "by another process that just asks"

    monkeypatch.setattr(fcntl, "flock", flock_and_ask)
    assert not is_answered_for(directory)
    assert asked


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        pytest.param(lambda _: b"", True, id="empty"),
        pytest.param(lambda _: b'["boot"', True, id="illegible"),
        pytest.param(lambda data: data, True, id="as it was"),
        pytest.param(lambda _: b'{"boot": "00", "pid": 1}', True, id="another boot"),
    ],
)
async def test_what_is_no_pin_is_as_good_as_that_of_a_dead_owner(
    tmp_path: Path, one: Sample, directory: Path, change: Callable[[bytes], bytes], stale: bool
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        store.pin(store.attach(one.device, ScriptedSource(one.blob)), nothing)
    path = directory / "mounted"
    path.write_bytes(change(path.read_bytes()))
    assert is_pinned_for_good(directory) is not stale


async def test_after_a_boot_a_pin_is_stale_whoever_has_the_device_open(
    tmp_path: Path, one: Sample, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        store.pin(store.attach(one.device, ScriptedSource(one.blob)), nothing)
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    file = DeviceFile.open(directory.with_name("0" * 64), Layout.of(one.device, Form.PLAIN))
    (directory / "mounted").rename(file.directory / "mounted")
    assert file.write([fill_of(one, 0)]) == 0
    assert not is_pinned_for_good(file.directory)
    assert file.write([fill_of(one, 0)]) == 60 * KIB
    file.close()


@pytest.mark.root
async def test_the_kernel_keeps_a_pin_alive_until_the_file_system_is_gone(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        store.pin(attached, nothing)
    image = write_erofs(one_file(one.plain)).data
    with nameless(image, tmp_path) as metadata, erofs_over(metadata, [directory / "data"]) as mount:
        assert is_pinned_for_good(directory)
        file = os.open("file", os.O_RDONLY, dir_fd=mount)
        assert os.pread(file, attached.size, 0) == one.plain
        os.close(file)
    assert not is_pinned_for_good(directory)


async def test_asking_for_a_lease_survives_that_somebody_opens_the_file_meanwhile(
    tmp_path: Path, one: Sample, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds a lease is told of that by a signal that ends a process, unless it is another one."""
    async with open_store(store_settings(tmp_path)) as store:
        store.pin(store.attach(one.device, ScriptedSource(one.blob)), nothing)
    real, broken = fcntl.fcntl, list[int]()
    opener = f"import os; os.open({os.fspath(directory / 'data')!r}, os.O_RDONLY | os.O_NONBLOCK)"

    def fcntl_slowly(fd: int, command: int, argument: int) -> int:
        result = real(fd, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_WRLCK):
            done = subprocess.run([sys.executable, "-c", opener], check=False, stderr=subprocess.DEVNULL)
            broken.append(done.returncode)
        return result

    monkeypatch.setattr(fcntl, "fcntl", fcntl_slowly)
    assert not is_pinned_for_good(directory)
    assert broken == [1], "it would have had to wait"


# Damage under a mount


async def test_a_damaged_map_costs_a_mounted_device_its_map_and_not_its_file(
    tmp_path: Path, one: Sample, directory: Path
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, 300 * KIB)
        store.pin(attached, nothing)
    inode = (directory / "data").stat().st_ino
    with (directory / "map").open("r+b") as file:
        file.write(b"X")
    with (directory / "data").open("rb"):
        async with open_store(store_settings(tmp_path)) as store:
            attached = store.attach(one.device, ScriptedSource(one.blob))
            store.pin(attached, nothing)
            assert (directory / "data").stat().st_ino == inode
            assert not attached.holds(0, 1), "its bytes are not trusted any more"
            await store.fill(attached, 0, attached.size)
            assert attached.holds(0, attached.size)
    assert (directory / "data").read_bytes() == one.plain
    with (directory / "map").open("r+b") as file:
        file.write(b"X")
    async with open_store(store_settings(tmp_path)) as store:
        store.attach(one.device, ScriptedSource(one.blob))
        assert (directory / "data").stat().st_ino != inode, "not mounted any more: both go"


async def test_a_file_that_was_replaced_cannot_be_mounted(
    store: SpanStore, one: Sample, directory: Path
) -> None:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    (directory / "data").rename(directory / "old")
    (directory / "data").touch()
    with pytest.raises(CacheError, match="cannot be mounted"):
        store.pin(attached, nothing)
