"""Looking after the cache, with and without live mounts, as a library and as ``veneer cache``."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from tests.cli.invoking import invoke
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.errors import CacheError
from veneer.events import Event, Notice, Progress
from veneer.store import presence
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile
from veneer.store.maintenance import check, clear, collect, list_devices, usage
from veneer.store.presence import Form, Layout
from veneer.store.spanstore import open_store


@pytest.fixture
def samples() -> list[Sample]:
    return [sample([50 * KIB] * 6, codecs=(RAW,), seed=i) for i in range(2)]


@pytest.fixture
async def cache_dir(tmp_path: Path, samples: list[Sample]) -> Path:
    """A cache with one complete device, and one that is half there and was used later."""
    async with open_store(store_settings(tmp_path)) as store:
        for one, part in zip(samples, (300 * KIB, 150 * KIB), strict=True):
            await store.read(store.attach(one.device, ScriptedSource(one.blob)), 0, part)
    return tmp_path / "cache"


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def corrupt(cache_dir: Path, one: Sample, name: str, at: int) -> None:
    with (cache_dir / "devices" / one.device.key.hex / name).open("r+b") as file:
        file.seek(at)
        file.write(b"corrupt")


async def test_listing_says_what_is_there_and_who_uses_it(
    tmp_path: Path, cache_dir: Path, samples: list[Sample]
) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        store.attach(samples[0].device, ScriptedSource(b""))
        second, first = list_devices(cache_dir)
        assert (first.key, second.key) == (samples[0].device.key.hex, samples[1].device.key.hex)
        assert (first.in_use, second.in_use) == (True, False)
    assert (first.present, first.size, first.present_spans, first.spans) == (300 * KIB, 300 * KIB, 6, 6)
    assert (second.present, second.present_spans) == (150 * KIB, 3)
    assert second.blob == str(samples[1].device.blob.digest)
    assert second.last_used_ns > first.last_used_ns > 0
    assert (usage(cache_dir).devices, usage(cache_dir).bytes) == (2, 450 * KIB)


async def test_collecting_evicts_what_is_oldest_and_removes_what_is_empty(
    cache_dir: Path, samples: list[Sample]
) -> None:
    (cache_dir / "devices" / ".trash-of-a-crash").mkdir()
    (cache_dir / "devices" / ("0" * 64)).mkdir()
    assert collect(cache_dir, 450 * KIB).bytes == 0
    assert collect(cache_dir, 400 * KIB).bytes == 50 * KIB
    assert collect(cache_dir, 160 * KIB).bytes == 250 * KIB
    assert [device.key for device in list_devices(cache_dir)] == [samples[1].device.key.hex]
    assert names_in(cache_dir / "devices") == {".collect", ".ledger", samples[1].device.key.hex}


async def test_checking_finds_and_drops_damage(
    tmp_path: Path, cache_dir: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(cache_dir).to_json() == {
        "spans": 9,
        "bytes": 450 * KIB,
        "damaged": 0,
        "discarded": 0,
        "mounted": 0,
    }
    corrupt(cache_dir, samples[0], "data", 120 * KIB)
    corrupt(cache_dir, samples[1], "map", 700)
    events: list[Event] = []
    checked = check(cache_dir, events.append)
    assert (checked.spans, checked.damaged, checked.discarded) == (5, 1, 1)
    assert sum(isinstance(event, Notice) for event in events) == 2
    assert [e.done for e in events if isinstance(e, Progress)] == [300 * KIB]
    assert [device.present for device in list_devices(cache_dir)] == [250 * KIB]
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    assert check(cache_dir).spans == 5
    source = ScriptedSource(samples[0].blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(samples[0].device, source)
        assert store.cached(attached, 0, 100 * KIB), "a check stands for the verification after a boot"
        assert await store.read(attached, 0, attached.size) == samples[0].plain
    assert source.requests == [(100 * KIB, 50 * KIB)]


async def test_clearing_spares_live_mounts_a_wrong_byte_but_not_a_fetch(
    tmp_path: Path, cache_dir: Path, samples: list[Sample]
) -> None:
    (cache_dir / "uppers" / "mine").mkdir(parents=True)
    (cache_dir / "blobs" / "sha256").mkdir(parents=True)
    one = samples[0]
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert store.cached(attached, 0, 10) == one.plain[:10]
        cleared = clear(cache_dir)
        assert (cleared.removed, cleared.emptied, cleared.bytes) == (1, 1, 450 * KIB)
        assert store.cached(attached, 0, 10) is None
        assert await store.read(attached, 0, attached.size) == one.plain
        assert store.cached(attached, 0, attached.size) == one.plain
        assert len(source.requests) == 1
    assert clear(cache_dir).removed == 1
    assert list_devices(cache_dir) == []
    assert names_in(cache_dir) == {"devices", "uppers"}


async def test_a_device_cleared_between_two_opens_is_made_anew(
    tmp_path: Path, cache_dir: Path, samples: list[Sample]
) -> None:
    clear(cache_dir)
    source = ScriptedSource(samples[0].blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(samples[0].device, source)
        assert await store.read(attached, 0, attached.size) == samples[0].plain


async def test_a_device_made_anew_while_it_is_removed_stays(
    cache_dir: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DeviceCache(cache_dir, 1 << 30)
    path = cache_dir / "devices" / samples[0].device.key.hex
    flock, made = fcntl.flock, list[DeviceFile]()

    def flock_late(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not made:
            shutil.rmtree(path)
            made.append(DeviceFile.open(path, Layout.of(samples[0].device, Form.PLAIN)))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    assert not cache.remove(path)
    assert names_in(path) == {"data", "lock", "map"}
    made[0].close()
    cache.close()


async def test_commands(cache_dir: Path, samples: list[Sample]) -> None:
    def run(*args: str) -> str:
        result = invoke("cache", *args, "--cache-dir", str(cache_dir))
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert [row["present"] for row in json.loads(run("ls", "--json"))] == [150 * KIB, 300 * KIB]
    assert str(samples[0].device.blob.digest) in run("ls")
    assert json.loads(run("du", "--json", "--cache-quota", "5G"))["quota"] == 5 << 30
    assert "450.0 KiB of" in run("du")
    assert json.loads(run("check", "--json"))["spans"] == 9
    assert "9 spans" in run("check")
    assert json.loads(run("gc", "--json", "--cache-quota", "200K"))["bytes"] == 250 * KIB
    assert "freed 200.0 KiB" in run("clear")
    assert run("ls") == ""
    assert json.loads(run("ls", "--json")) == []


def test_an_unusable_cache_has_its_exit_status(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError):
        list_devices(tmp_path / "file")
    result = invoke("cache", "ls", "--cache-dir", str(tmp_path / "file"))
    assert result.exit_code == CacheError.exit_code
