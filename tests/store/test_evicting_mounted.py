"""What the owner of a mounted device takes away from under the kernel, and when."""

import errno
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.owning import Clock, owning_store
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample
from veneer.errors import CacheError
from veneer.store import extents
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile
from veneer.store.maintenance import list_devices
from veneer.store.presence import Form, Layout, PresenceMap
from veneer.store.spanstore import AttachedDevice, SpanStore

SPAN = 60 * KIB


class Mark:
    """What the owner does before anything is punched: notes what there is at that moment."""

    def __init__(self) -> None:
        self.attached: AttachedDevice | None = None
        self.error: OSError | None = None
        #: Each time: spans that the map had, and bytes of the file.
        self.calls: list[tuple[int, bytes]] = []
        #: Each time: whether the device counted as complete.
        self.complete: list[bool] = []

    def __call__(self) -> None:
        assert self.attached is not None
        assert self.attached.file is not None
        assert self.attached.data_fd is not None
        on_disk = len(self.attached.file.map.on_disk())
        self.calls.append((on_disk, os.pread(self.attached.data_fd, self.attached.size, 0)))
        self.complete.append(self.attached.complete)
        if self.error is not None:
            raise self.error


@pytest.fixture
def one() -> Sample:
    return sample([SPAN] * 10, codecs=(RAW,))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mark() -> Mark:
    return Mark()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[SpanStore]:
    async with owning_store(tmp_path, clock, quota=20 * SPAN) as store:
        yield store


@pytest.fixture
async def attached(store: SpanStore, one: Sample, mark: Mark) -> AttachedDevice:
    """All there, and pinned."""
    attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    store.pin(attached, mark)
    return attached


@pytest.fixture
def cache(store: SpanStore) -> DeviceCache:
    return store._cache


def held(store: SpanStore, attached: AttachedDevice) -> set[int]:
    assert attached.file is not None
    return set(attached.file.map.on_disk())


def content(attached: AttachedDevice) -> bytes:
    assert attached.data_fd is not None
    return os.pread(attached.data_fd, attached.size, 0)


async def test_only_idle_spans_go_and_only_after_the_mark(
    store: SpanStore, attached: AttachedDevice, one: Sample, clock: Clock, mark: Mark, cache: DeviceCache
) -> None:
    assert cache.collect(0) == 0, "it may have been read by the owner before us"
    clock.advance(59)
    assert cache.collect(0) == 0
    assert store.holds(attached, 3 * SPAN, 2 * SPAN)
    clock.advance(1)
    assert mark.calls == []
    assert cache.collect(0) == 8 * SPAN
    assert held(store, attached) == {3, 4}
    assert mark.calls == [(2, one.plain)], "absent in the map, then marked, then punched"
    assert content(attached)[3 * SPAN : 5 * SPAN] == one.plain[3 * SPAN : 5 * SPAN]
    assert content(attached)[: 3 * SPAN] == bytes(3 * SPAN)
    assert not store.holds(attached, 0, 1)
    await store.fill(attached, 0, attached.size)
    assert content(attached) == one.plain
    clock.advance(59)
    assert cache.collect(0) == 0, "what was just filled counts as used"
    clock.advance(1)
    assert cache.collect(0) == 10 * SPAN
    assert store.stats.evicted == 18


async def test_a_span_that_is_used_while_it_is_being_taken_stays(
    store: SpanStore,
    attached: AttachedDevice,
    one: Sample,
    clock: Clock,
    cache: DeviceCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clear, told = PresenceMap.clear, list[bool]()

    def clear_late(this: PresenceMap, numbers: Iterable[int]) -> int:
        told.append(store.holds(attached, 2 * SPAN, 10))
        lost = clear(this, numbers)
        told.append(store.holds(attached, 5 * SPAN, 10))
        return lost

    monkeypatch.setattr(PresenceMap, "clear", clear_late)
    clock.advance()
    assert cache.collect(0) == 8 * SPAN
    assert told == [True, False]
    assert {2} <= held(store, attached) <= {2, 5}
    assert content(attached)[2 * SPAN : 3 * SPAN] == one.plain[2 * SPAN : 3 * SPAN]
    assert store.holds(attached, 2 * SPAN, SPAN)


async def test_a_span_that_is_used_just_when_somebody_looks_for_it_stays(
    store: SpanStore, attached: AttachedDevice, clock: Clock, cache: DeviceCache
) -> None:
    file, taken = attached.file, list[int]()
    assert file is not None

    class Looked(bytes):
        """The states, which change as soon as somebody has seen them."""

        def __getitem__(self, key: Any) -> Any:
            seen = super().__getitem__(key)
            if not taken:
                taken.append(0)
                taken[0] = cache.collect(0)
            return seen

    clock.advance()
    states, file.states = file.states, Looked(file.states)
    told = store.holds(attached, 2 * SPAN, 10)
    file.states = states
    assert taken == [9 * SPAN]
    assert (told, held(store, attached)) == (True, {2})


async def test_what_was_just_fetched_stays_until_the_kernel_can_be_told(
    store: SpanStore, one: Sample, clock: Clock, mark: Mark, cache: DeviceCache
) -> None:
    attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
    store.pin(attached, mark)
    clock.advance()
    await store.read(attached, 0, SPAN)
    assert cache.collect(0) == 0
    clock.advance()
    assert cache.collect(0) == SPAN


@pytest.mark.parametrize("proven_first", [False, True])
async def test_a_complete_device_that_loses_a_damaged_span_is_watched_before_more_goes(
    store: SpanStore, one: Sample, clock: Clock, mark: Mark, cache: DeviceCache, proven_first: bool
) -> None:
    attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    if proven_first:
        assert await store.prove(attached)
    store.pin(attached, mark)
    assert await store.prove(attached)
    assert attached.file is not None
    os.pwrite(attached.file.fd, b"damage", 3 * SPAN)
    assert cache.verify(attached.file, range(10)).dropped == [3]
    clock.advance()
    assert cache.collect(0) == 0
    assert len(mark.calls) == 1
    clock.advance()
    assert cache.collect(0) == 9 * SPAN


async def test_what_cannot_be_marked_is_not_punched(
    store: SpanStore,
    attached: AttachedDevice,
    one: Sample,
    clock: Clock,
    mark: Mark,
    cache: DeviceCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mark.error = OSError(errno.ENOSPC, "No space left on device")
    clock.advance()
    assert cache.collect(0) == 0
    assert store.holds(attached, 0, attached.size)
    assert content(attached) == one.plain
    assert cache.has_room(10 * SPAN)
    assert not cache.has_room(10 * SPAN + 1)
    assert "nothing of the device" in caplog.text
    mark.error = None
    clock.advance()
    assert cache.collect(0) == 10 * SPAN


@pytest.mark.parametrize("proven_first", [False, True])
async def test_a_complete_device_is_watched_for_as_long_before_anything_of_it_goes(
    store: SpanStore, one: Sample, clock: Clock, mark: Mark, cache: DeviceCache, proven_first: bool
) -> None:
    attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    if proven_first:
        assert await store.prove(attached)
    store.pin(attached, mark)
    assert await store.prove(attached)
    clock.advance(1000)
    assert cache.collect(0) == 0
    assert (attached.complete, attached.all_present) == (False, True)
    assert mark.calls == [(10, one.plain)]
    assert mark.complete == [False], "or it could be unmarked once more"
    assert not await store.prove(attached), "else it would be unmarked again"
    clock.advance(59)
    assert cache.collect(0) == 0
    assert store.holds(attached, 7 * SPAN, SPAN)
    clock.advance(1)
    assert cache.collect(0) == 9 * SPAN
    assert held(store, attached) == {7}
    assert len(mark.calls) == 2
    await store.fill(attached, 0, attached.size)
    assert await store.prove(attached)


async def test_a_complete_device_that_cannot_be_watched_keeps_everything(
    store: SpanStore, attached: AttachedDevice, one: Sample, clock: Clock, mark: Mark, cache: DeviceCache
) -> None:
    assert await store.prove(attached)
    mark.error = OSError(errno.ENOMEM, "Cannot allocate memory")
    for _ in range(3):
        clock.advance(1000)
        assert cache.collect(0) == 0
    mark.error = None
    assert cache.collect(0) == 0, "watched from now on"
    clock.advance(59)
    assert cache.collect(0) == 0
    assert content(attached) == one.plain
    clock.advance(1)
    assert cache.collect(0) == 10 * SPAN


async def test_a_complete_device_stays_so_while_nothing_has_to_go(
    store: SpanStore, attached: AttachedDevice, clock: Clock, mark: Mark, cache: DeviceCache
) -> None:
    assert await store.prove(attached)
    clock.advance(1000)
    assert cache.collect(10 * SPAN) == 0
    assert attached.complete
    assert mark.calls == []


async def test_the_next_owner_takes_all_spans_for_used(
    tmp_path: Path, one: Sample, clock: Clock, mark: Mark
) -> None:
    for _ in range(2):
        async with owning_store(tmp_path, clock) as store:
            attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
            await store.fill(attached, 0, attached.size)
            clock.advance(1000)
            store.pin(attached, mark)
            clock.advance(59)
            assert store._cache.collect(0) == 0
            assert held(store, attached) == set(range(10))


class Died(BaseException):
    """The process ended here."""


async def test_dying_between_clearing_and_punching_costs_a_fetch(
    tmp_path: Path, one: Sample, clock: Clock, mark: Mark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_fd: int, _offset: int, _length: int) -> None:
        raise Died

    async with owning_store(tmp_path, clock) as store:
        attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        store.pin(attached, mark)
        clock.advance()
        assert store.holds(attached, 0, SPAN)
        with monkeypatch.context() as patch:
            patch.setattr(extents, "punch", die)
            with pytest.raises(Died):
                store._cache.collect(0)
    source = ScriptedSource(one.blob)
    path = tmp_path / "cache" / "devices" / one.device.key.hex
    with (path / "data").open("rb"):
        async with owning_store(tmp_path, clock) as store:
            attached = mark.attached = store.attach(one.device, source)
            store.pin(attached, mark)
            assert held(store, attached) == {0}
            await store.fill(attached, 0, attached.size)
            assert content(attached) == one.plain
    assert sum(length for _, length in source.requests) == 9 * SPAN


# The quota, and the disk


async def test_mounted_devices_exceed_the_quota_rather_than_fail(
    tmp_path: Path, one: Sample, clock: Clock, mark: Mark, caplog: pytest.LogCaptureFixture
) -> None:
    async with owning_store(tmp_path, clock, quota=3 * SPAN) as store:
        cache = store._cache
        attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
        store.pin(attached, mark)
        for number in range(6):
            await store.fill(attached, number * SPAN, SPAN)
        assert held(store, attached) == set(range(6))
        assert store.stats.over_quota == 3
        assert len(caplog.records) == 1
        assert "quota" in caplog.text
        other = sample([SPAN] * 3, codecs=(RAW,), seed=1)
        theirs = store.attach(other.device, ScriptedSource(other.blob))
        assert await store.read(theirs, 0, SPAN) == other.plain[:SPAN]
        assert not theirs.holds(0, 1), "others keep within it"
        clock.advance()
        assert store.holds(attached, 5 * SPAN, SPAN)
        await store.fill(attached, 9 * SPAN, SPAN)
        assert held(store, attached) <= {5, 9}
        assert {5, 9} <= held(store, attached)
        assert store.stats.over_quota == 3
        assert cache.has_room(SPAN)


async def test_a_hopeless_eviction_is_not_repeated_for_every_write(
    tmp_path: Path, one: Sample, clock: Clock, mark: Mark, monkeypatch: pytest.MonkeyPatch
) -> None:
    collections = 0
    collect = DeviceCache.collect

    def counted(this: DeviceCache, target: int) -> int:
        nonlocal collections
        collections += 1
        return collect(this, target)

    monkeypatch.setattr(DeviceCache, "collect", counted)
    other = sample([100], codecs=(RAW,), seed=1)
    async with owning_store(tmp_path, clock, quota=SPAN) as store:
        attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
        store.pin(attached, mark)
        for number in range(10):
            await store.fill(attached, number * SPAN, SPAN)
        assert collections == 1
        clock.advance(10)
        await store.read(store.attach(other.device, ScriptedSource(other.blob)), 0, 1)
        assert collections == 2


async def test_what_can_go_at_once_goes_before_a_complete_device_is_waited_for(
    tmp_path: Path, one: Sample, clock: Clock, mark: Mark
) -> None:
    async with owning_store(tmp_path, clock, quota=20 * SPAN) as store:
        attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        store.pin(attached, mark)
        assert await store.prove(attached)
        other = sample([SPAN] * 10, codecs=(RAW,), seed=1)
        theirs = store.attach(other.device, ScriptedSource(other.blob))
        await store.read(theirs, 0, theirs.size)
        assert store._cache.collect(15 * SPAN) == 5 * SPAN, "used later, but not mounted"
        assert not attached.complete, "its turn will come"
        assert len(held(store, theirs)) == 5
        clock.advance()
        assert store._cache.collect(10 * SPAN) == 5 * SPAN
        assert len(held(store, attached)) == 5


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.root
async def test_on_a_full_disk_mounted_devices_get_what_can_be_evicted_and_then_an_error(
    tiny_disk: Path, clock: Clock, mark: Mark, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (sample([SPAN] * 30, codecs=(RAW,), seed=seed) for seed in range(2))
    async with owning_store(tiny_disk, clock) as store:
        theirs = store.attach(other.device, ScriptedSource(other.blob))
        await store.read(theirs, 0, 6 * SPAN)
        attached = mark.attached = store.attach(one.device, ScriptedSource(one.blob))
        store.pin(attached, mark)
        filled, failed = 0, list[CacheError]()
        while not failed:
            try:
                await store.fill(attached, filled * SPAN, SPAN)
                filled += 1
            except CacheError as error:
                failed.append(error)
        assert failed[0].errno == errno.ENOSPC
        assert "No space left" in failed[0].message
        assert filled >= 12, "what was not mounted made room"
        assert held(store, theirs) == set()
        assert content(attached)[: filled * SPAN] == one.plain[: filled * SPAN]
        assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
        with pytest.raises(CacheError, match="No space left"):
            await store.fill(attached, 29 * SPAN, SPAN)
        clock.advance()
        for number in range(30):
            await store.fill(attached, number * SPAN, SPAN)
            assert store.holds(attached, number * SPAN, SPAN)
            assert content(attached)[number * SPAN :][:SPAN] == one.plain[number * SPAN :][:SPAN]
            clock.advance(10)


@pytest.mark.root
async def test_a_cache_that_began_on_a_full_disk_is_used_once_there_is_room(
    tiny_disk: Path, one: Sample, clock: Clock
) -> None:
    filler = tiny_disk / "filler"
    (tiny_disk / "cache" / "devices").mkdir(parents=True)
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines([bytes(4096)] * 1000)
    async with owning_store(tiny_disk, clock) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        with pytest.raises(CacheError, match="cannot be mounted"):
            store.pin(attached, lambda: None)
        store.detach(attached)
        filler.unlink()
        attached = store.attach(one.device, ScriptedSource(one.blob))
        store.pin(attached, lambda: None)
        await store.fill(attached, 0, attached.size)
        assert store.holds(attached, 0, attached.size)


async def test_another_process_sees_what_is_left(
    tmp_path: Path, store: SpanStore, attached: AttachedDevice, one: Sample, clock: Clock, cache: DeviceCache
) -> None:
    other = DeviceFile.open(
        tmp_path / "cache" / "devices" / one.device.key.hex, Layout.of(one.device, Form.PLAIN)
    )
    assert other.read(0, attached.size) == one.plain
    clock.advance()
    assert store.holds(attached, 0, SPAN)
    cache.collect(0)
    assert other.read(0, SPAN) == one.plain[:SPAN]
    assert other.read(SPAN, 1) is None
    other.close()
    assert [info.present for info in list_devices(tmp_path / "cache")] == [SPAN]
