"""Filling a device's file for a reader that looks at the file alone."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.store.rig import KIB, RAW, ZSTD, Sample, ScriptedSource, sample, store_settings
from veneer.errors import CacheError, NotFound
from veneer.index.model import Codec
from veneer.store import presence
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.spanstore import AttachedDevice, Form, open_store


@pytest.fixture
def one() -> Sample:
    return sample([30 * KIB] * 10, codecs=(ZSTD, RAW))


def in_file(attached: AttachedDevice, offset: int, length: int) -> bytes:
    assert attached.data_fd is not None
    return os.pread(attached.data_fd, length, offset)


def refuse(_fd: int, _buffers: object, _offset: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_what_was_filled_is_in_the_file_and_held(tmp_path: Path, one: Sample) -> None:
    accesses: list[tuple[int, int]] = []
    source = ScriptedSource(one.blob)
    async with open_store(
        store_settings(tmp_path), on_access=lambda _key, offset, length, _s: accesses.append((offset, length))
    ) as store:
        attached = store.attach(one.device, source)
        assert not store.holds(attached, 0, 10)
        await store.fill(attached, 50 * KIB, 20 * KIB)
        assert store.holds(attached, 30 * KIB, 60 * KIB)
        assert not store.holds(attached, 30 * KIB, 60 * KIB + 1)
        assert in_file(attached, 30 * KIB, 60 * KIB) == one.plain[30 * KIB : 90 * KIB]
        assert len(source.requests) == 1
        await store.fill(attached, 30 * KIB, 60 * KIB)
        assert len(source.requests) == 1
        await store.fill(attached, 0, 10, window=(0, attached.size))
        await store.fill(attached, 0, attached.size)
        assert in_file(attached, 0, attached.size) == one.plain
        assert (attached.all_present, attached.complete) == (True, False)
        assert sum(length for _, length in source.requests) == len(one.blob), "nothing twice"
        assert accesses[:2] == [(50 * KIB, 20 * KIB), (30 * KIB, 60 * KIB)]
        assert (store.stats.misses, store.stats.hits) == (4, 1)


async def test_a_disk_that_is_full_is_an_error_until_it_has_room_and_what_came_is_not_fetched_again(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        store.pin(attached, lambda: None)
        monkeypatch.setattr(os, "pwritev", refuse)
        for _ in range(2):
            with pytest.raises(CacheError, match="No space left") as caught:
                await store.fill(attached, 40 * KIB, 100)
            assert caught.value.errno == errno.ENOSPC
            assert f"{source.name}: bytes {40 * KIB}+100" in caught.value.message
            assert store.cached(attached, 40 * KIB, 100) == one.plain[40 * KIB :][:100]
            assert not store.holds(attached, 40 * KIB, 100), "in memory only"
        asked = len(source.requests)
        monkeypatch.undo()
        await store.fill(attached, 40 * KIB, 100)
        assert store.holds(attached, 30 * KIB, 30 * KIB)
        assert in_file(attached, 30 * KIB, 30 * KIB) == one.plain[30 * KIB : 60 * KIB]
        assert len(source.requests) == asked
        assert store.stats.errors == 2


async def test_filling_verifies_after_a_boot_and_fetches_what_is_damaged(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        path = tmp_path / "cache" / "devices" / one.device.key.hex / "data"
    with path.open("r+b") as file:
        file.seek(70 * KIB)
        file.write(b"damage")
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert attached.all_present
        assert not store.holds(attached, 0, 10)
        await store.fill(attached, 0, attached.size)
        assert store.holds(attached, 0, attached.size)
        assert in_file(attached, 0, attached.size) == one.plain
        assert (store.stats.reverified, store.stats.dropped) == (9, 1)
    span = one.device.spans[2]
    assert source.requests == [(span.stored_offset, span.stored_length)]


async def test_filling_copies_what_another_device_has(tmp_path: Path, one: Sample) -> None:
    two = sample([30 * KIB] * 9 + [10], codecs=(ZSTD, RAW))
    source = ScriptedSource(two.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        other = store.attach(two.device, source)
        await store.fill(other, 270 * KIB, 10)
        await store.fill(other, 0, 270 * KIB)
        assert in_file(other, 0, other.size) == two.plain
        assert store.stats.copied == 9
    assert len(source.requests) == 1


async def test_errors_of_the_source_are_passed_on_and_not_remembered(tmp_path: Path, one: Sample) -> None:
    async def gone(_number: int, _offset: int, _length: int, _answer: bytes) -> bytes:
        raise NotFound("the blob is gone")

    source = ScriptedSource(one.blob, gone)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        with pytest.raises(NotFound):
            await store.fill(attached, 0, 10)
        assert not store.holds(attached, 0, 10)
        source.fault = None
        await store.fill(attached, 0, 10)
        assert store.holds(attached, 0, 10)


async def test_a_device_without_plain_bytes_on_disk_cannot_be_filled_or_pinned(tmp_path: Path) -> None:
    one = sample([10 * KIB], codecs=(Codec("zstd"),))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob), form=Form.STORED)
        assert attached.data_fd is None
        await store.read(attached, 0, 10)
        assert not store.holds(attached, 0, 10)
        with pytest.raises(CacheError):
            await store.fill(attached, 0, 10)
        with pytest.raises(CacheError, match="cannot be mounted"):
            store.pin(attached, lambda: None)
        assert (attached.all_present, attached.complete) == (False, False)
        assert not await store.prove(attached)


async def test_what_was_taken_away_as_soon_as_it_came_is_fetched_once_more(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, taken = DeviceFile.write, list[int]()

    def write_and_lose(file: DeviceFile, fills: Sequence[Fill]) -> int:
        gained = write(file, fills)
        if not taken:
            taken.append(file.evict([fill.number for fill in fills]).spans)
        return gained

    monkeypatch.setattr(DeviceFile, "write", write_and_lose)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, 10)
        assert store.holds(attached, 0, 10)
    assert taken[0] > 0
