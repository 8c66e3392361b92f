"""Images without any index: streamed once, right or not at all, and here from then on."""

import errno
import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.convert.layouts import Layout
from tests.image.conftest import BASE, BIG, TOP
from tests.test_codec_boundaries import program
from veneer.errors import CacheError, IntegrityError, NotFound, Unavailable, UnsupportedFormat, VeneerError
from veneer.events import Event, Notice, Progress
from veneer.formats import checkpoints, records
from veneer.image import Image, open_image
from veneer.image.files import read_file
from veneer.image.inspect import inspect_image
from veneer.image.open import load_image, resolve_image
from veneer.image.pinned import PinnedIndex
from veneer.settings import Settings
from veneer.source import parallel
from veneer.store.spanstore import SpanStore, open_store
from veneer.testing.actions import Action, FlipBit, Hold, IgnoreRange, Reset, Truncate
from veneer.testing.images import write_image
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at
from veneer.verify import verify_image

pytestmark = pytest.mark.network

#: Bytes that no compression makes less of: several parts, and several spans.
LARGE = random.Random(3).randbytes(5_300_000)


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image, compressed in several ways, and one that shares a layer with it; to be copied."""
    path = tmp_path_factory.mktemp("plain") / "source"
    large = tar([TarItem(b"large", content=LARGE), TarItem(b"after", content=b"the large one")])
    for compression in ("gzip", "zstd", "none"):
        write_image([BASE, TOP, large], path, compression, compression)
    write_image([BASE, tar([TarItem(b"other", content=b"another image")])], path, "shared", "gzip")
    return path


@pytest.fixture
def layers(tmp_path: Path, layout: Path) -> Layout:
    """What the registry serves as ``source``: gzip, and nothing that says how it can be read lazily."""
    return Layout(shutil.copytree(layout, tmp_path / "registry/source"))


@pytest.fixture
async def registry(tmp_path: Path, layers: Layout) -> AsyncIterator[ScriptedRegistry]:
    """Serves it."""
    async with scripted_registry(tmp_path / "registry") as registry:
        yield registry


@asynccontextmanager
async def opened(
    reference: str, settings: Settings, report: Callable[[Event], None] = lambda _event: None
) -> AsyncIterator[tuple[Image, SpanStore]]:
    async with (
        open_store(settings) as store,
        open_image(reference, settings, keeper=store, report=report) as image,
    ):
        yield image, store


async def content(image: Image, store: SpanStore, path: bytes) -> bytes:
    return b"".join([piece async for piece in read_file(image, store, path)])


def remains(settings: Settings) -> list[str]:
    """Names of all files in the cache that hold, or would hold, something of layers."""
    found = [*(settings.cache_dir / "devices").rglob("*"), *(settings.cache_dir / "layers").glob("sha256-*")]
    return sorted(path.name for path in found if path.name not in (".ledger", ".collect"))


def data_requests(registry: ScriptedRegistry, layers: Layout, tag: str) -> list[str]:
    digests = [layer["digest"] for layer in layers.manifest(tag)["layers"]]
    return [record.path for record in registry.asked("GET", "/blobs/") if record.path.endswith(tuple(digests))]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_it_is_streamed_once_and_then_opened_without_a_request_for_data(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, compression: str
) -> None:
    reference = f"{registry.host}/source:{compression}"
    events: list[Event] = []
    async with opened(reference, settings, events.append) as (image, store):
        assert image.index_origin == "streamed"
        assert await content(image, store, b"large") == LARGE
        assert await content(image, store, b"big") == BIG
        assert await content(image, store, b"tool") == b"#!tool"
        assert await content(image, store, b"release") == b"ID=test\n"
        assert store.stats.requests == 0
    (notice,) = [event.message for event in events if isinstance(event, Notice)]
    size = sum(layer["size"] for layer in layers.manifest(compression)["layers"])
    assert f"has no index: 3 of its 3 layers are downloaded whole, {size / (1 << 20):.1f} MiB" in notice
    done = [
        (event.item, event.total)
        for event in events
        if isinstance(event, Progress) and event.done == event.total
    ]
    assert len(done) == 3

    del registry.requests[:]
    async with opened(reference, settings, events.append) as (image, store):
        assert image.index_origin == "local"
        assert await content(image, store, b"large") == LARGE
        attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
        assert all(device.complete for device in attached)
    assert [record.method for record in registry.requests] == ["GET"]
    assert "/manifests/" in registry.requests[0].path
    async with (
        registry.down(),
        opened(f"{registry.host}/source@{image.manifest.digest}", settings) as (image, store),
    ):
        assert await content(image, store, b"after") == b"the large one"


@pytest.mark.parametrize("most_requests", [1, 16])
async def test_a_download_is_part_of_what_its_link_carries(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, most_requests: int
) -> None:
    # Several parts, for each of several layers.
    with pytest.MonkeyPatch.context() as patch, trio.fail_after(60):
        patch.setattr(parallel, "PART_SIZE", 200_000)
        async with opened(f"{registry.host}/source:gzip", replace(settings, most_requests=most_requests)) as (
            _,
            store,
        ):
            entries = layers.manifest("gzip")["layers"]
            classes: Any = store.links()[registry.host]["classes"]
    size = sum(layer["size"] for layer in entries)
    # The first request of a layer ends with the chunk in which it comes to where others have begun.
    assert size <= classes["stream"]["bytes"] < 1.1 * size
    assert classes["stream"]["running"] == classes["stream"]["queued_spans"] == 0
    assert classes["stream"]["requests"] > len(entries)
    ranges, _ = store.log.since(0.0, {layer["digest"] for layer in entries})
    assert sum(times.length for times in ranges) == classes["stream"]["bytes"]


async def test_a_layer_that_another_image_brought_is_not_downloaded(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    async with opened(f"{registry.host}/source:gzip", settings):
        pass
    del registry.requests[:]
    events: list[Event] = []
    async with opened(f"{registry.host}/source:shared", settings, events.append) as (image, store):
        assert await content(image, store, b"big") == BIG
        assert await content(image, store, b"other") == b"another image"
    assert len(data_requests(registry, layers, "shared")) == 1
    assert any("1 of its 2 layers" in event.message for event in events if isinstance(event, Notice))


async def test_images_opened_at_once_share_one_download(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    async def look(reference: str) -> None:
        # Each has a store of its own, as processes have.
        async with opened(reference, settings) as (image, store):
            assert await content(image, store, b"big") == BIG

    async with trio.open_nursery() as nursery:
        for tag in ("gzip", "gzip", "shared"):
            nursery.start_soon(look, f"{registry.host}/source:{tag}")
    everything = data_requests(registry, layers, "gzip") + data_requests(registry, layers, "shared")
    assert len(everything) == len(set(everything)) + 1  # the base layer is of both images


async def test_the_registry_need_not_do_ranges(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PART_SIZE", 300_000)
    monkeypatch.setattr("veneer.registry.blob.SKIP_LIMIT", 600_000)
    rule = registry.faults.add(IgnoreRange(), count=None)
    async with opened(f"{registry.host}/source:gzip", settings) as (image, store):
        assert await content(image, store, b"large") == LARGE
    assert rule.hits


@pytest.mark.parametrize("fault", [Reset(after=700_000), Truncate(after=700_000)])
async def test_a_transfer_that_breaks_off_goes_on(
    registry: ScriptedRegistry,
    layers: Layout,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fault: Action,
) -> None:
    monkeypatch.setattr(parallel, "PART_SIZE", 1_000_000)
    rule = registry.faults.add(fault, path=layers.manifest("gzip")["layers"][2]["digest"], count=3)
    async with opened(f"{registry.host}/source:gzip", settings) as (image, store):
        assert await content(image, store, b"large") == LARGE
    assert rule.hits == 3


@pytest.mark.parametrize(
    ("compression", "at"), [("gzip", 2_000_000), ("gzip", 3), ("zstd", 3), ("none", 2_000_000), ("none", 257)]
)
async def test_damage_on_the_way_is_fetched_again_once(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, compression: str, at: int
) -> None:
    events: list[Event] = []
    digest = layers.manifest(compression)["layers"][2]["digest"]
    registry.faults.add(FlipBit(at), path=digest)
    async with opened(f"{registry.host}/source:{compression}", settings, events.append) as (image, store):
        assert await content(image, store, b"large") == LARGE
    assert any("fetching it again" in event.message for event in events if isinstance(event, Notice))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("at", [3, 2_000_000, -5])
async def test_wrong_bytes_are_an_error_and_nothing_of_them_remains(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, compression: str, at: int
) -> None:
    layer = layers.manifest(compression)["layers"][2]
    registry.faults.add(FlipBit(at % layer["size"]), path=layer["digest"], count=None)
    with pytest.raises(IntegrityError, match=layer["digest"]):
        async with opened(f"{registry.host}/source:{compression}", settings):
            pass
    # What came whole before is kept; nothing is of the layer that did not.
    kept = remains(settings)
    assert f"sha256-{layer['digest'][7:]}" not in kept
    assert not any(name.startswith(".arriving") for name in kept)
    registry.faults.clear()
    async with opened(f"{registry.host}/source:{compression}", settings) as (image, store):
        assert await content(image, store, b"large") == LARGE


def with_layer(layers: Layout, stored: bytes, plain: bytes, tag: str) -> str:
    """An image of one gzip layer that the config says unpacks to ``plain``; the layer's digest."""
    manifest = layers.manifest("gzip")
    config = layers.document(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"] = [f"sha256:{hashlib.sha256(plain).hexdigest()}"]
    described = layers.store(manifest["config"]["mediaType"], json.dumps(config).encode())
    layer = layers.store(manifest["layers"][0]["mediaType"], stored)
    layers.change("gzip", tag, config=described, layers=[layer])
    return str(layer["digest"])


GOOD = tar([TarItem(b"a", content=b"x" * 100_000)])


@pytest.mark.parametrize(
    ("stored", "plain", "reason"),
    [
        (gzip.compress(GOOD), GOOD + b"\0", "diffID"),
        (gzip.compress(GOOD)[:-1], GOOD, "ends early"),
        (gzip.compress(GOOD)[:-100], GOOD, "ends early|malformed"),
        (gzip.compress(GOOD) + b"garbage", GOOD, "gzip"),
        (gzip.compress(GOOD[:-2000]), GOOD[:-2000], "truncated"),
        (GOOD, GOOD, "gzip"),
        (b"", b"", "gzip"),
    ],
)
async def test_a_layer_that_is_not_what_is_stated_is_refused(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, stored: bytes, plain: bytes, reason: str
) -> None:
    digest = with_layer(layers, stored, plain, "bad")
    with pytest.raises(IntegrityError, match=reason) as caught:
        async with opened(f"{registry.host}/source:bad", settings):
            pass
    assert digest in caught.value.message
    assert remains(settings) == []


async def test_a_bomb_ends_at_the_quota(registry: ScriptedRegistry, layers: Layout, settings: Settings) -> None:
    with_layer(layers, gzip.compress(bytes(40 << 20)), b"", "bomb")
    with pytest.raises(CacheError, match="more than the cache quota"):
        async with opened(f"{registry.host}/source:bomb", replace(settings, cache_quota=20 << 20)):
            pass
    assert remains(settings) == []


async def test_a_full_disk_is_told_and_nothing_remains(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 100_000 and offset > 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="No space left") as caught:
        async with opened(f"{registry.host}/source:gzip", settings):
            pass
    assert caught.value.hint
    assert not any(name.startswith(".arriving") for name in remains(settings))


async def test_giving_up_in_the_middle_leaves_nothing(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    hold = Hold()
    registry.faults.add(hold, path=layers.manifest("gzip")["layers"][2]["digest"])
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            async with opened(f"{registry.host}/source:gzip", settings):
                raise AssertionError("it cannot be open yet")

        nursery.start_soon(look)
        with trio.fail_after(20):
            await hold.arrived.wait()
        nursery.cancel_scope.cancel()
    assert not any(name.startswith(".arriving") for name in remains(settings))


async def test_a_registry_that_goes_away_is_an_error_in_time(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    registry.faults.add(Reset(), path="/blobs/", count=None)
    with pytest.raises(Unavailable):
        async with opened(f"{registry.host}/source:gzip", replace(settings, read_deadline_s=2)):
            pass
    assert not any(name.startswith(".arriving") for name in remains(settings))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_what_has_been_evicted_since_is_read_again(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, compression: str
) -> None:
    async with opened(f"{registry.host}/source:{compression}", settings) as (image, store):
        (large,) = [device for device in image.devices if device.spans.size > 5_000_000]
        attached = store.attach(large, image.sources[2])
        file = attached.file
        assert file is not None
        for evicted in ([0], [4, 2], range(len(large.spans))):
            file.evict(evicted)
            assert not attached.complete
            assert await content(image, store, b"large") == LARGE
        file.evict([1, 3])
        # Backwards, which no decompressor can.
        for start in (4 << 20, 1 << 20):
            expected = LARGE[start : start + 1000]
            (extent,) = image.index.extents(node_at(image.index, b"large") or 0, start, 1000)
            assert await store.read(attached, extent.offset, 1000) == expected


async def test_what_is_evicted_of_gzip_comes_back_in_a_small_range(
    registry: ScriptedRegistry, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SPACING", 512 << 10)
    content_of_it = program(9, 8 << 20)
    layout = Layout(tmp_path / "registry/source")
    write_image([tar([TarItem(b"large", content=content_of_it)])], layout.path, "latest", "gzip")
    reference, size = f"{registry.host}/source:latest", layout.manifest("latest")["layers"][0]["size"]
    async with opened(reference, settings):
        pass
    # As another process would find it.
    async with opened(reference, settings) as (image, store):
        assert image.index_origin == "local"
        attached = store.attach(image.devices[0], image.sources[0])
        file = attached.file
        assert file is not None
        for number in (6, 2, 7, 0):
            file.evict([number])
            del registry.requests[:]
            assert await store.read(attached, (number << 20) + 5000, 1000)
            ranges = [record.header("range") for record in registry.asked("GET", "/blobs/")]
            assert len(ranges) == 1
            assert _bytes_of(ranges) < size / 3
        assert await content(image, store, b"large") == content_of_it


def _bytes_of(ranges: list[str | None]) -> int:
    total = 0
    for text in ranges:
        assert text is not None
        first, last = text.removeprefix("bytes=").split("-")
        total += int(last) + 1 - int(first)
    return total


async def test_what_has_been_evicted_before_it_is_opened_is_streamed_again(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    async with opened(f"{registry.host}/source:gzip", settings) as (image, store):
        attached = store.attach(image.devices[2], image.sources[2])
        assert attached.file is not None
        attached.file.evict([1])
    del registry.requests[:]
    async with opened(f"{registry.host}/source:gzip", settings) as (image, store):
        assert image.index_origin == "streamed"
        assert await store.prove(store.attach(image.devices[2], image.sources[2]))
        assert await content(image, store, b"large") == LARGE
    assert set(data_requests(registry, layers, "gzip")) == {
        f"/v2/source/blobs/{layers.manifest('gzip')['layers'][2]['digest']}"
    }


async def test_what_is_mounted_is_never_streamed_again(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    async with opened(f"{registry.host}/source:gzip", settings) as (image, store):
        attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
        assert attached[2].file is not None
        attached[2].file.evict([1])
        for device in attached:
            store.pin(device, lambda: None)
        pinned = f"{registry.host}/source@{image.manifest.digest}"
        # As a worker that takes the place of another one finds it.
        async with registry.down(), opened(pinned, settings) as (again, _):
            assert again.index_origin == "local"
            assert again.devices[2].key == attached[2].device.key
        for device in attached:
            store.unpin(device)


async def test_wrong_bytes_after_eviction_never_reach_a_reader(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    configured = replace(settings, read_deadline_s=2)
    async with opened(f"{registry.host}/source:gzip", configured) as (image, store):
        attached = store.attach(image.devices[2], image.sources[2])
        assert attached.file is not None
        attached.file.evict(range(len(image.devices[2].spans)))
        digest = layers.manifest("gzip")["layers"][2]["digest"]
        registry.faults.add(FlipBit(2_000_000), path=digest, count=None)
        with pytest.raises(VeneerError):
            await content(image, store, b"large")


async def test_a_damaged_record_is_made_again(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    reference = f"{registry.host}/source:gzip"
    async with opened(reference, settings):
        pass
    for damage in (lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda _data: b""):
        for record in (settings.cache_dir / "layers").glob("sha256-*"):
            record.write_bytes(damage(record.read_bytes()))
        async with opened(reference, settings) as (image, store):
            assert image.index_origin == "streamed"
            assert await content(image, store, b"large") == LARGE


@pytest.mark.parametrize("version", [0, 2])
async def test_a_record_of_another_version_is_made_again(
    registry: ScriptedRegistry,
    layers: Layout,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
) -> None:
    with monkeypatch.context() as other:
        other.setattr(records, "_VERSION", version)
        async with opened(f"{registry.host}/source:shared", settings) as (image, store):
            assert await content(image, store, b"big") == BIG
    async with opened(f"{registry.host}/source:shared", settings) as (image, store):
        assert image.index_origin == "streamed"
        assert await content(image, store, b"big") == BIG


async def test_who_has_it_mounted_is_served_by_the_index_that_it_was_mounted_with_or_not_at_all(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    """The kernel has made up its mind where files are on the devices."""
    name = f"{registry.host}/source:shared"
    async with open_store(settings) as store, resolve_image(name, settings) as (resolved, stats):
        pinned = PinnedIndex.of(await load_image(resolved, settings, stats, keeper=store))
        pinned = PinnedIndex.from_json(json.loads(json.dumps(pinned.to_json())))
        again = await load_image(resolved, settings, stats, keeper=store, pinned=pinned)
        assert again.index_origin == "local"
        kept = records.LayerRecords(settings.cache_dir / "layers")
        one, other = (
            kept.load(*pair) for pair in zip(resolved.manifest.layers, again.config.diff_ids, strict=True)
        )
        assert one is not None
        assert other is not None
        kept.save(replace(one, tree_section=other.tree_section))
        with pytest.raises(IntegrityError, match="was mounted with index"):
            await load_image(resolved, settings, stats, keeper=store, pinned=pinned)


async def test_a_record_is_for_the_layer_as_the_manifest_and_the_config_state_it(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    """The blob may be known: what it is said to be besides has to be right, too."""
    with_layer(layers, gzip.compress(GOOD), GOOD, "good")
    async with opened(f"{registry.host}/source:good", settings):
        pass
    with_layer(layers, gzip.compress(GOOD), GOOD + b"\0", "rediffed")
    (layer,) = layers.manifest("good")["layers"]
    layers.change("good", "resized", layers=[{**layer, "size": layer["size"] + 1}])
    layers.change(
        "good", "retyped", layers=[{**layer, "mediaType": layer["mediaType"].replace("gzip", "zstd")}]
    )
    layers.change("good", "twice", layers=[layer, layer])
    for tag in ("rediffed", "resized", "retyped", "twice"):
        with pytest.raises(IntegrityError):
            async with opened(f"{registry.host}/source:{tag}", settings):
                pass


async def test_looking_at_an_image_downloads_no_layer(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    reference = f"{registry.host}/source:gzip"
    before = await inspect_image(reference, settings)
    assert not before.lazy
    assert "has no index" in before.reason
    assert data_requests(registry, layers, "gzip") == []
    with pytest.raises(UnsupportedFormat, match="has no index"):
        async with open_image(reference, settings):
            pass
    async with opened(reference, settings):
        pass
    after = await inspect_image(reference, settings)
    assert after.lazy
    assert after.index_origin == "local"
    assert after.files["files"] > 5
    assert after.size == sum(layer.size or 0 for layer in after.layers)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_it_can_be_verified_like_any_other_image(
    registry: ScriptedRegistry, layers: Layout, settings: Settings, compression: str
) -> None:
    async with opened(f"{registry.host}/source:{compression}", settings) as (image, _):
        verdict = await verify_image(image)
        assert verdict.ok, verdict.to_json()
        digest = layers.manifest(compression)["layers"][2]["digest"]
        registry.faults.add(FlipBit(2_000_000), path=digest, count=None)
        verdict = await verify_image(image)
        assert [layer.problem_count > 0 for layer in verdict.layers] == [False, False, True]


async def test_a_layer_that_is_missing_says_so(
    registry: ScriptedRegistry, layers: Layout, settings: Settings
) -> None:
    layers.file(layers.manifest("gzip")["layers"][1]["digest"]).unlink()
    with pytest.raises(NotFound):
        async with opened(f"{registry.host}/source:gzip", settings):
            pass
