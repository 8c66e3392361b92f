"""Sidecars, packs and local indexes count to the quota, and go when they have not been used for longest."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.invoking import invoke
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.image.packs import local_packs
from veneer.oci.digest import Digest
from veneer.store.kept import note_use
from veneer.store.maintenance import clear, collect, usage
from veneer.store.spanstore import open_store

HOUR_NS = 3600 * 10**9
MANIFEST = "5" * 64


@pytest.fixture
def one() -> Sample:
    return sample([50 * KIB] * 6, codecs=(RAW,), seed=1)


def put(path: Path, data: bytes, age_hours: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    at = time.time_ns() - int(age_hours * HOUR_NS)
    os.utime(path, ns=(at, at))
    return path


def descriptor(digest: str, size: int = 1) -> dict[str, object]:
    return {"mediaType": "application/x", "digest": digest, "size": size}


@pytest.fixture
async def cache_dir(tmp_path: Path, one: Sample) -> Path:
    """A device that was used just now, an older sidecar, a still older pack; an index with one, one without."""
    async with open_store(store_settings(tmp_path)) as store:
        await store.read(store.attach(one.device, ScriptedSource(one.blob)), 0, 300 * KIB)
    cache = tmp_path / "cache"
    index = f"sha256:{'1' * 64}"
    note = {"origin": "local", "index": descriptor(index), "windows": [], "packs": [], "seen": 1}
    put(cache / f"sidecars/sha256-{MANIFEST}.json", json.dumps(note).encode(), 2)
    put(cache / "sidecars/blobs/sha256" / index[7:], bytes(20 * KIB), 2)
    put(cache / "packs" / MANIFEST / "default/pack.json", b"{}", 3)
    put(cache / "packs" / MANIFEST / "default" / ("2" * 64), bytes(30 * KIB), 3)
    put(cache / "layers" / str(one.device.blob.digest).replace(":", "-"), bytes(5 * KIB), 9)
    put(cache / "layers" / f"sha256-{'3' * 64}", bytes(7 * KIB), 9)
    put(cache / "layers/checkpoints" / f"sha256-{'3' * 64}", bytes(KIB), 9)
    return cache


def kept(cache: Path) -> dict[str, int]:
    return {kind: count for kind, (count, _) in usage(cache).kept.items()}


async def test_they_are_counted_and_shown(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = usage(cache_dir)
    note_size = (cache_dir / f"sidecars/sha256-{MANIFEST}.json").stat().st_size
    assert used.kept == {
        "sidecar": (1, 20 * KIB + note_size),
        "pack": (1, 30 * KIB + 2),
        "index": (2, 13 * KIB),
    }
    assert used.bytes == 300 * KIB + sum(size for _, size in used.kept.values())
    monkeypatch.setenv("VENEER_CACHE_DIR", str(cache_dir))
    status, out, _ = invoke("cache", "du", "--json")
    assert status == 0
    assert json.loads(out)["kept"]["pack"] == {"count": 1, "bytes": 30 * KIB + 2}


def packs(cache: Path) -> object:
    return local_packs(cache, Digest("sha256", MANIFEST))


@pytest.mark.parametrize(
    ("deleted", "look_for"),
    [
        ("packs", usage),
        (f"packs/{MANIFEST}", usage),
        (f"packs/{MANIFEST}/default", usage),
        ("blobs/sha256", usage),
        (f"packs/{MANIFEST}", packs),
    ],
)
async def test_what_somebody_deletes_while_it_is_looked_for_is_not_there(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, deleted: str, look_for: Callable[[Path], object]
) -> None:
    put(cache_dir / "blobs/sha256" / MANIFEST, b"{}", 1)
    look = os.scandir
    gone: list[Path] = []

    def look_at_what_goes(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(os.fsdecode(path)) == cache_dir / deleted and not gone:
            gone.append(cache_dir / deleted)
            shutil.rmtree(cache_dir / deleted)
        return look(path)

    monkeypatch.setattr(os, "scandir", look_at_what_goes)
    look_for(cache_dir)
    assert gone
    assert kept(cache_dir) == {"sidecar": 1, "pack": "packs" not in deleted, "index": 2}


async def test_what_was_not_used_for_longest_goes_first_and_spans_are_among_it(cache_dir: Path) -> None:
    held = usage(cache_dir).bytes
    # An index without its device is of no use to anybody.
    assert collect(cache_dir, held).bytes == 8 * KIB
    assert kept(cache_dir) == {"sidecar": 1, "pack": 1, "index": 1}
    collect(cache_dir, held - 8 * KIB - 1)
    assert kept(cache_dir) == {"sidecar": 1, "pack": 0, "index": 1}
    collect(cache_dir, usage(cache_dir).bytes - 1)
    assert kept(cache_dir) == {"sidecar": 0, "pack": 0, "index": 1}
    assert usage(cache_dir).bytes == 305 * KIB
    assert not list((cache_dir / "sidecars").rglob("*1111"))
    collect(cache_dir, 100 * KIB)
    assert usage(cache_dir).bytes <= 100 * KIB


async def test_a_use_is_noted_and_what_is_used_now_stays(cache_dir: Path) -> None:
    note_use(cache_dir / "packs" / MANIFEST / "default/pack.json")
    collect(cache_dir, 0)
    assert kept(cache_dir) == {"sidecar": 0, "pack": 1, "index": 0}


@pytest.mark.parametrize("what", ["layer of the image", "pack"])
async def test_what_a_mount_may_need_stays(tmp_path: Path, cache_dir: Path, one: Sample, what: str) -> None:
    digest = str(one.device.blob.digest)
    if what == "pack":
        put(cache_dir / "packs" / MANIFEST / "default" / digest[7:], b"", 3)
    else:
        put(cache_dir / "blobs/sha256" / MANIFEST, json.dumps({"layers": [descriptor(digest)]}).encode(), 5)
    async with open_store(store_settings(tmp_path)) as store:
        store.attach(one.device, ScriptedSource(one.blob))
        collect(cache_dir, 0)
        stays = "pack" if what == "pack" else "sidecar"
        assert kept(cache_dir) == {"sidecar": 0, "pack": 0, "index": 1} | {stays: 1}
    collect(cache_dir, 0)
    assert kept(cache_dir) == {"sidecar": 0, "pack": 0, "index": 0}


async def test_what_no_note_names_goes_but_not_while_its_note_may_be_about_to_be_written(
    cache_dir: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [
        put(cache_dir / "sidecars/blobs/sha256" / ("6" * 64), bytes(40 * KIB), 9),
        put(cache_dir / "packs" / MANIFEST / "killed" / ("7" * 64), bytes(50 * KIB), 9),
        put(cache_dir / "packs" / MANIFEST / "killed" / ".pack.json", b"{}", 9),
    ]
    named = cache_dir / "sidecars/blobs/sha256" / ("1" * 64)
    collect(cache_dir, 0)
    assert all(path.exists() for path in left), "as new as if they had just been written"
    assert not named.exists()
    monkeypatch.setattr("veneer.store.kept._GRACE_NS", 0)
    collect(cache_dir, 0)
    assert not any(path.exists() for path in left)
    assert not (cache_dir / "packs" / MANIFEST).exists()
    assert usage(cache_dir).bytes == 0


async def test_a_store_makes_room_by_what_is_older_than_its_spans(
    tmp_path: Path, cache_dir: Path, one: Sample
) -> None:
    other = sample([50 * KIB] * 2, codecs=(RAW,), seed=2)
    quota = usage(cache_dir).bytes
    async with open_store(store_settings(tmp_path, quota=quota)) as store:
        await store.read(store.attach(other.device, ScriptedSource(other.blob)), 0, 100 * KIB)
        assert kept(cache_dir)["pack"] == 0
        assert usage(cache_dir).bytes <= quota


async def test_clearing_leaves_what_was_made_here_and_cannot_be_fetched(cache_dir: Path) -> None:
    clear(cache_dir)
    assert kept(cache_dir) == {"sidecar": 1, "pack": 1, "index": 0}
    assert usage(cache_dir).devices == 0
