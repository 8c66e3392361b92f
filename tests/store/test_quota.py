"""The cache's bounds: a quota, a full disk, a disk that fails. None of them costs a reader."""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.rig import KIB, MIB, RAW, ScriptedSource, sample, store_settings
from veneer.errors import CacheError
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import Fill
from veneer.store.spanstore import Form, open_store


def on_disk(cache_dir: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in cache_dir.glob("devices/*/data"))


async def test_the_least_recently_used_spans_of_all_devices_make_room(tmp_path: Path) -> None:
    one, two = (sample([100 * KIB] * 20, codecs=(RAW,), seed=i) for i in range(2))
    settings = store_settings(tmp_path, quota=2 * MIB)
    async with open_store(settings) as store:
        first, second = (store.attach(s.device, ScriptedSource(s.blob)) for s in (one, two))
        for number in range(20):
            await store.read(first, number * 100 * KIB, 1)
        assert store.cached(first, 0, 1) is not None
        assert store.cached(first, 5 * 100 * KIB, 1) is not None
        for number in range(12):
            await store.read(second, number * 100 * KIB, 1)
            assert on_disk(settings.cache_dir) <= 2 * MIB
        assert store.stats.evicted >= 12
        present = [number for number in range(20) if store.cached(first, number * 100 * KIB, 1)]
        assert {0, 5} <= set(present), "used again since"
        assert not {1, 2, 3, 4} & set(present)
        assert store.cached(second, 11 * 100 * KIB, 100 * KIB) == two.plain[-9 * 100 * KIB :][: 100 * KIB]
        assert await store.read(first, 0, first.size) == one.plain


async def test_nobody_waits_behind_an_eviction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect, evictors = DeviceCache.collect, set[int]()

    def noted(cache: DeviceCache, target: int) -> int:
        evictors.add(threading.get_ident())
        return collect(cache, target)

    monkeypatch.setattr(DeviceCache, "collect", noted)
    one = sample([20 * KIB] * 20, codecs=(RAW,))
    async with open_store(store_settings(tmp_path, quota=100 * KIB)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        for number in range(20):
            await store.read(attached, number * 20 * KIB, 1)
        assert store.stats.evicted > 0
    assert evictors
    assert threading.get_ident() not in evictors


async def test_a_quota_below_one_span_leaves_reading_possible(tmp_path: Path) -> None:
    one = sample([100 * KIB] * 5)
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path, quota=10)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, attached.size) == one.plain
        assert store.cached(attached, 0, attached.size) == one.plain, "from memory"
        assert store.stats.uncached == 5
        asked = len(source.requests)
        assert await store.read(attached, 0, attached.size) == one.plain
    assert len(source.requests) == asked


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.root
async def test_a_full_disk_costs_the_cache_and_not_the_reader(
    tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = sample([60 * KIB] * 50, codecs=(RAW,))
    async with open_store(store_settings(tiny_disk)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        for offset in range(0, attached.size, 50_000):
            length = min(50_000, attached.size - offset)
            assert await store.read(attached, offset, length) == one.plain[offset : offset + length]
        assert store.stats.evicted > 0, "room was made once the disk was full"
        assert len(caplog.records) <= 1
        assert on_disk(tiny_disk / "cache") > 500 * KIB
        assert await store.read(attached, 0, attached.size) == one.plain


@pytest.mark.root
async def test_a_disk_that_others_filled_is_no_error_even_at_the_start(
    tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = sample([60 * KIB] * 50, codecs=(RAW,))
    filler = tiny_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines([bytes(4096)] * 1000)
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tiny_disk)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, attached.size) == one.plain
        for offset in range(0, attached.size, 60 * KIB):
            assert await store.read(attached, offset, 10) == one.plain[offset : offset + 10]
        assert len(caplog.records) == 1, "one warning, not a flood"
        assert len(source.requests) <= 8


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT])
async def test_a_cache_that_cannot_be_written_serves_from_memory_and_recovers(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_fd: int, _buffers: object, _offset: int) -> int:
        raise OSError(number, os.strerror(number))

    one = sample([30 * KIB] * 20, codecs=(RAW,))
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        monkeypatch.setattr(os, "pwritev", broken)
        for span in range(10):
            offset = span * 30 * KIB
            assert await store.read(attached, offset, 100) == one.plain[offset : offset + 100]
            assert store.cached(attached, offset, 100) == one.plain[offset : offset + 100]
        assert store.stats.uncached == 10
        assert len(caplog.records) == 1
        assert os.strerror(number) in caplog.text
        monkeypatch.undo()
        await store.read(attached, 10 * 30 * KIB, 1)
        assert store.stats.uncached == 11, "a pause, lest every span tries a full disk"
        monkeypatch.setattr("veneer.store.cache.time.monotonic", lambda: float("inf"))
        await store.read(attached, 11 * 30 * KIB, 1)
        assert store.stats.uncached == 11


async def test_a_cache_file_that_cannot_be_read_is_replaced_by_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample([30 * KIB] * 4)
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        await store.read(attached, 0, attached.size)
        assert attached.file is not None
        os.truncate(attached.file.directory / "data", 50 * KIB)
        assert await store.read(attached, 0, attached.size) == one.plain
        assert store.cached(attached, 0, attached.size) == one.plain
    assert len(source.requests) == 2


def test_an_unusable_directory_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be used") as caught:
        DeviceCache(tmp_path / "file" / "cache", 100)
    assert "VENEER_CACHE_DIR" in (caught.value.hint or "")


def test_the_ledger_is_set_right_after_a_crash(tmp_path: Path) -> None:
    one = sample([100 * KIB] * 4)
    cache = DeviceCache(tmp_path, MIB)
    file = cache.open(one.device, Form.PLAIN)
    assert file is not None
    cache.put(file, [Fill(0, one.plain[: 100 * KIB], bytes(32))])
    (tmp_path / "devices" / ".ledger").write_bytes((10 * MIB).to_bytes(8, "little"))
    assert not cache.has_room(1)
    again = DeviceCache(tmp_path, MIB)
    assert again.has_room(MIB - 100 * KIB)
    assert not again.has_room(MIB - 100 * KIB + 1)
    again.close()
    cache.close()
