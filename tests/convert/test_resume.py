"""Conversions that were interrupted, and conversions between registries."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.convert.layouts import Layout
from veneer.convert import layer as layer_module
from veneer.convert.convert import convert
from veneer.convert.layer import Capacity
from veneer.errors import IntegrityError, NotFound, RegistryError
from veneer.events import Event, Notice
from veneer.image import open_image
from veneer.settings import Settings
from veneer.testing.actions import FlipBit, Status
from veneer.testing.images import Layer, write_image
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.verify import verify_image

KILLED_AFTER_THE_FIRST_LAYER = """
import os, signal, sys, trio
from veneer.convert.convert import convert
from veneer.convert.push import Pusher
from veneer.settings import Settings
async def killed(self, descriptor, path):
    os.kill(os.getpid(), signal.SIGKILL)
Pusher.file = killed
trio.run(convert, sys.argv[1], sys.argv[2], Settings.from_environment())
"""


@pytest.fixture
def source(tmp_path: Path, layers: list[Layer]) -> Layout:
    write_image(layers, tmp_path / "registry/source", "v1")
    return Layout(tmp_path / "registry/source")


def gets(registry: ScriptedRegistry, digest: str) -> int:
    return len(registry.asked("GET", digest))


async def test_kill_9_costs_the_layers_that_were_not_finished(
    source: Layout, settings: Settings, tmp_path: Path
) -> None:
    target = Layout(tmp_path / "target")
    process = await trio.run_process(
        [sys.executable, "-c", KILLED_AFTER_THE_FIRST_LAYER, source.ref("v1"), target.ref("v1")],
        check=False,
        capture_stderr=True,
        env={"VENEER_CACHE_DIR": str(settings.cache_dir), "VENEER_PLATFORM": "linux/amd64"},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert target.tags() == {}
    done = list((settings.cache_dir / "convert").glob("*/record.json"))
    assert done
    again = await convert(source.ref("v1"), target.ref("v1"), settings)
    assert sum(layer.reused for layer in again.images[0].layers) == len(done)
    fresh = replace(settings, cache_dir=tmp_path / "fresh")
    assert (await convert(source.ref("v1"), target.ref("v2"), fresh)).manifest == again.manifest


@pytest.mark.network
async def test_a_failure_keeps_finished_layers_and_pushes_no_tag(
    source: Layout, settings: Settings, tmp_path: Path
) -> None:
    first, second = (layer["digest"] for layer in source.manifest("v1")["layers"])
    async with scripted_registry(tmp_path / "registry") as registry:
        image, result = f"{registry.host}/source:v1", f"{registry.host}/target:v1"
        rule = registry.faults.add(Status(403), path=second, method="GET", count=None)
        with pytest.raises(RegistryError):
            await convert(image, result, settings)
        assert rule.hits
        assert not registry.asked("PUT", "/manifests/")
        with pytest.raises(NotFound):
            async with open_image(result, settings):
                pass
        registry.faults.clear()
        # The first layer is small enough to have been finished before the second failed, or it is made again.
        finished = len(list((settings.cache_dir / "convert").glob("*/record.json")))
        before = gets(registry, first)
        again = await convert(image, result, settings)
        assert sum(layer.reused for layer in again.images[0].layers) == finished
        assert gets(registry, first) == before + (not finished)
        assert not list((settings.cache_dir / "convert").iterdir())


@pytest.mark.network
async def test_within_a_registry_blobs_are_mounted_the_tag_comes_last_and_again_nothing_is_sent(
    source: Layout, settings: Settings, tmp_path: Path
) -> None:
    async with scripted_registry(tmp_path / "registry") as registry:
        image, result = f"{registry.host}/source:v1", f"{registry.host}/target:v1"
        first = await convert(image, result, settings)
        puts = registry.asked("PUT", "/manifests/")
        assert puts[-1].path.endswith("/manifests/v1")
        assert registry.requests.index(puts[-1]) > max(
            registry.requests.index(record) for record in registry.requests if "/blobs/uploads" in record.path
        )
        # The config, which both images share, is mounted: 201 in answer to the first request of an upload.
        assert [record.status for record in registry.asked("POST", "/blobs/uploads")].count(201) == 1
        uploads = registry.asked("PUT", "/blobs/uploads")
        assert len(uploads) == len(first.images[0].layers) + len(["index", "empty config"])

        async with open_image(result, settings) as opened:
            assert opened.index_origin == "annotation"
            assert (await verify_image(opened)).ok
            referrers = await opened.repository.referrers(opened.manifest.digest)
        assert [referrer.artifact_type for referrer in referrers] == ["application/vnd.veneer.index.v1"]

        del registry.requests[:]
        fresh = replace(settings, cache_dir=tmp_path / "fresh")
        second = await convert(image, result, fresh)
        assert second.manifest == first.manifest
        assert not registry.asked("PATCH")
        assert not registry.asked("PUT", "/blobs/uploads")


@pytest.mark.network
async def test_a_registry_that_refuses_artifacts_still_gets_the_image(
    source: Layout, settings: Settings, tmp_path: Path
) -> None:
    events: list[Event] = []
    async with scripted_registry(tmp_path / "registry") as registry:
        registry.faults.add(Status(400), method="PUT", path="/manifests/sha256:", count=None)
        result = f"{registry.host}/target:v1"
        await convert(f"{registry.host}/source:v1", result, settings, report=events.append)
        assert any(isinstance(event, Notice) and "takes no artifact" in event.message for event in events)
        async with open_image(result, settings) as opened:
            assert opened.index_origin == "annotation"


@pytest.mark.network
async def test_a_layer_damaged_on_its_way_is_fetched_again_once(
    source: Layout, settings: Settings, tmp_path: Path
) -> None:
    digest = source.manifest("v1")["layers"][0]["digest"]
    target = Layout(tmp_path / "target")
    events: list[Event] = []
    async with scripted_registry(tmp_path / "registry") as registry:
        image = f"{registry.host}/source:v1"
        registry.faults.add(FlipBit(500), method="GET", path=digest)
        await convert(image, target.ref("v1"), settings, report=events.append)
        assert [event for event in events if isinstance(event, Notice) and "fetching it again" in event.message]
        assert gets(registry, digest) == 2

        registry.faults.add(FlipBit(500), method="GET", path=digest, count=None)
        with pytest.raises(IntegrityError, match=f"expected {digest}"):
            await convert(image, target.ref("v2"), settings)
    assert "v2" not in target.tags()


async def test_an_attempt_that_failed_gives_its_memory_back(
    source: Layout, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities: list[Capacity] = []

    class Watched(Capacity):
        def __init__(self, cores: int) -> None:
            super().__init__(cores)
            self.whole = self.batches.value
            capacities.append(self)

    def fail(_spans: list[bytes]) -> None:
        raise IntegrityError("not today")

    monkeypatch.setattr("veneer.convert.image.Capacity", Watched)
    monkeypatch.setattr(layer_module, "compress", fail)
    with pytest.raises(IntegrityError, match="not today"):
        await convert(source.ref("v1"), f"oci:{tmp_path / 'target'}:v1", settings)
    (capacity,) = capacities
    assert isinstance(capacity, Watched)
    assert capacity.batches.value == capacity.whole


def test_the_job_depends_on_all_that_its_result_depends_on(
    source: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.oci.descriptor import Descriptor
    from veneer.oci.digest import Digest

    manifest = source.manifest("v1")
    diff_ids = source.document(manifest["config"]["digest"])["rootfs"]["diff_ids"]
    one, two = (Descriptor.from_json(json.loads(json.dumps(layer))) for layer in manifest["layers"])

    def key(layer: Descriptor, diff_id: str, devices: str = "drop") -> str:
        return layer_module.LayerTask(layer, Digest.parse(diff_id), devices).key

    keys = [key(one, diff_ids[0]), key(two, diff_ids[0]), key(one, diff_ids[1]), key(one, diff_ids[0], "keep")]
    for name, value in (("CONVERTER_VERSION", 99), ("LEVEL", 1), ("FRAME_SIZE", 1), ("SMALL_FILE", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(layer_module, name, value)
            keys.append(key(one, diff_ids[0]))
    assert len(set(keys)) == len(keys)
    assert key(one, diff_ids[0]) == keys[0]
