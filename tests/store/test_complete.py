"""Devices that are complete: when that is noted, and what takes it back."""

import errno
import logging
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.store.rig import KIB, MIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.errors import CacheError, IntegrityError
from veneer.index.model import Device
from veneer.oci.digest import Digest, Hasher
from veneer.store import presence
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.hashing import HashAhead
from veneer.store.maintenance import check, collect
from veneer.store.presence import Form, Layout
from veneer.store.proof import hash_ahead
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store
from veneer.store.threads import Threads


@pytest.fixture
def one() -> Sample:
    # More than is hashed in one go.
    return sample([900 * KIB] * 10, codecs=(RAW,))


@pytest.fixture
async def attached(store: SpanStore, one: Sample) -> AttachedDevice:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    return attached


def damage(attached: AttachedDevice, at: int) -> None:
    assert attached.data_fd is not None
    os.pwrite(attached.data_fd, b"damage", at)


async def test_a_device_is_complete_once_all_of_it_is_there_and_was_proven(
    tmp_path: Path, store: SpanStore, one: Sample
) -> None:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size - 1000 * KIB)
    assert not await store.prove(attached)
    await store.fill(attached, 0, attached.size)
    assert (attached.all_present, attached.complete) == (True, False)
    assert await store.prove(attached)
    assert attached.complete
    async with open_store(store_settings(tmp_path)) as other:
        again = other.attach(one.device, ScriptedSource(b""))
        assert again.complete, "the next process need not prove it again"
        assert await other.prove(again)


async def test_a_map_from_before_there_were_complete_devices_has_none(
    store: SpanStore, attached: AttachedDevice
) -> None:
    await store.prove(attached)
    assert attached.file is not None
    path = attached.file.directory / "map"
    with path.open("r+b") as file:
        file.seek(352)
        file.write(bytes(8))
    assert not attached.complete
    assert await store.prove(attached)


async def test_whatever_is_taken_away_takes_completeness_with_it(
    tmp_path: Path, store: SpanStore, attached: AttachedDevice
) -> None:
    cache_dir = tmp_path / "cache"
    assert await store.prove(attached)
    assert collect(cache_dir, 8 * MIB).bytes > 0
    assert not attached.complete
    await store.fill(attached, 0, attached.size)
    assert not attached.complete, "nobody has hashed it since"
    assert await store.prove(attached)
    damage(attached, 3 * MIB)
    assert check(cache_dir).damaged == 1
    assert not attached.complete


async def test_after_a_boot_one_pass_over_the_file_verifies_it_all(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        assert await store.prove(attached)
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(b""))
        assert not attached.complete
        assert not store.holds(attached, 0, 10)
        assert await store.prove(attached)
        assert store.holds(attached, 0, attached.size)
        assert attached.complete


@pytest.mark.parametrize("refilled", [False, True])
async def test_an_eviction_while_it_is_hashed_is_noticed(
    store: SpanStore, attached: AttachedDevice, monkeypatch: pytest.MonkeyPatch, refilled: bool, one: Sample
) -> None:
    hash_range, file = DeviceFile.hash_range, attached.file
    assert file is not None

    def evict_after(this: DeviceFile, hasher: Hasher, offset: int, length: int) -> bool:
        result = hash_range(this, hasher, offset, length)
        if offset == 0:
            file.evict([0])
            if refilled:
                attached.decode_now([one.device.spans[0]], 0, one.blob)
        return result

    monkeypatch.setattr(DeviceFile, "hash_range", evict_after)
    assert not await store.prove(attached)
    assert attached.all_present is refilled
    assert not attached.complete
    monkeypatch.undo()
    await store.fill(attached, 0, 10)
    assert await store.prove(attached)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are hashed from now on."""
    ranges = []
    hash_range = DeviceFile.hash_range

    def note(this: DeviceFile, hasher: Hasher, offset: int, length: int) -> bool:
        ranges.append((offset, length))
        return hash_range(this, hasher, offset, length)

    monkeypatch.setattr(DeviceFile, "hash_range", note)
    return ranges


async def test_what_is_mounted_is_hashed_while_the_rest_comes(
    store: SpanStore, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = store.attach(one.device, ScriptedSource(one.blob))
    store.pin(attached, lambda: None)
    # It begins in the middle.
    await store.fill(attached, 4000 * KIB, 10)
    ranges = hashed(monkeypatch)
    assert await store.fetch_rest(attached)
    before = list(ranges)
    assert before, "hashing has begun"
    assert await store.prove(attached)
    assert attached.complete
    assert ranges[: len(before)] == before
    assert [offset for offset, _ in ranges] == [0, *accumulate(length for _, length in ranges)][:-1]
    assert sum(length for _, length in ranges) == attached.size, "and nothing is hashed twice"


async def test_what_was_hashed_before_something_was_taken_away_is_hashed_again(
    store: SpanStore, attached: AttachedDevice, monkeypatch: pytest.MonkeyPatch, one: Sample
) -> None:
    file = attached.file
    assert file is not None
    file.evict([9])
    store.pin(attached, lambda: None)
    await hash_ahead(attached, Threads())
    file.unpin()
    file.evict([0])
    attached.decode_now([one.device.spans[0], one.device.spans[9]], 0, one.blob)
    damage(attached, at=100)
    ranges = hashed(monkeypatch)
    assert not await store.prove(attached), "what the disk had then counts no more"
    assert sum(length for _, length in ranges) == attached.size
    assert not attached.complete


async def test_a_span_that_is_replaced_while_it_is_hashed_is_noticed(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    hash_range = DeviceFile.hash_range
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(b""))

        def replace(this: DeviceFile, hasher: Hasher, offset: int, length: int) -> bool:
            attached.decode_now([one.device.spans[0]], 0, one.blob)
            return hash_range(this, hasher, offset, length)

        monkeypatch.setattr(DeviceFile, "hash_range", replace)
        assert not await store.prove(attached), "what was hashed may be a mixture"
        assert await store.prove(attached)


def test_whenever_the_owner_dies_an_incomplete_device_is_not_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample([5 * KIB] * 3, codecs=(RAW,))
    fills = [Fill(n, one.plain[n * 5 * KIB :][: 5 * KIB], bytes(32)) for n in range(3)]
    deaths = 0
    for deadline in range(1, 50):
        file = DeviceFile.open(tmp_path / str(deadline), Layout.of(one.device, Form.PLAIN))
        file.write(fills)
        assert file.confirm(file.map.generation[0], bytes(file.states))
        real, calls = os.pwrite, 0

        def mortal(*args: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == deadline:  # noqa: B023 - called in this round
                raise KeyboardInterrupt
            return real(*args)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", mortal)
            try:
                file.evict([0, 2])
            except KeyboardInterrupt:
                deaths += 1
        # Looked at as it was left, before anybody opens it and mends it.
        assert file.map.complete is False or file.holds(0, 15 * KIB)
        whole = file.holds(0, 15 * KIB)
        file.close()
        if calls < deadline:
            assert not whole
            break
    assert deaths > 4


@pytest.mark.parametrize("pinned", [False, True])
async def test_what_was_damaged_on_disk_is_fetched_again_and_then_it_is_complete(
    store: SpanStore, attached: AttachedDevice, one: Sample, pinned: bool
) -> None:
    if pinned:
        store.pin(attached, lambda: None)
    damage(attached, 2 * MIB)
    assert not await store.prove(attached)
    assert not store.holds(attached, 2 * MIB, 1)
    assert store.holds(attached, 0, MIB), "the rest stays"
    await store.fill(attached, 0, attached.size)
    assert await store.prove(attached)
    assert attached.data_fd is not None
    assert os.pread(attached.data_fd, attached.size, 0) == one.plain


@pytest.mark.parametrize("pinned", [False, True])
async def test_spans_that_do_not_make_up_the_layer_are_never_complete(
    store: SpanStore, one: Sample, pinned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(one.device.blob, Digest.of(b"another layer"), one.device.spans, one.device.key)
    attached = store.attach(device, ScriptedSource(one.blob))
    await store.fill(attached, 0, attached.size)
    if pinned:
        store.pin(attached, lambda: None)
    with pytest.raises(IntegrityError, match="contents of layer"):
        await store.prove(attached)
    assert not attached.complete
    assert attached.all_present is pinned, "what the kernel may be reading stays"
    for read in (store.read, store.fill):
        with pytest.raises(IntegrityError, match="contents of layer"):
            await read(attached, 0, 1000)
    assert not store.holds(attached, 0, 1000), "the kernel may not read on either"
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_a_disk_that_cannot_note_completeness_is_an_error_and_nothing_else(
    store: SpanStore, attached: AttachedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_map: presence.PresenceMap) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(presence.PresenceMap, "mark_complete", read_only)
        with pytest.raises(CacheError, match="Read-only file system"):
            await store.prove(attached)
    assert not attached.complete
    assert store.holds(attached, 0, attached.size)
    assert await store.prove(attached)


async def test_a_hash_that_was_kept_from_its_next_step_is_begun_anew(
    store: SpanStore, attached: AttachedDevice
) -> None:
    assert attached.file is not None
    threads = Threads()
    threads.limiter.total_tokens = 1
    attached.ahead = HashAhead(attached.file, attached.device.diff_id.hasher(), threads)
    async with trio.open_nursery() as nursery, threads.limiter:
        nursery.start_soon(attached.ahead.follow)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await store.prove(attached)


async def test_a_hash_is_handed_over_when_the_step_under_way_has_ended(
    store: SpanStore, attached: AttachedDevice
) -> None:
    assert attached.file is not None
    threads = Threads()
    threads.limiter.total_tokens = 1
    ahead = HashAhead(attached.file, attached.device.diff_id.hasher(), threads)
    ends: list[int] = []

    async def end() -> None:
        ends.append((await ahead.end())[1])

    async with trio.open_nursery() as nursery, threads.limiter:
        nursery.start_soon(ahead.follow)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked()
        assert ends == []
    assert 0 < ends[0] < attached.size, "and no step is begun after that"
