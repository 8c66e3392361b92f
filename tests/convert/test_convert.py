"""Whole conversions between layouts: what comes out, and what is refused."""

import gzip
import hashlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from tests.convert.layouts import INDEX_TYPE, Layout
from veneer.convert.convert import convert
from veneer.errors import IntegrityError, UnsupportedFormat, UsageError
from veneer.events import Event, Notice, Progress
from veneer.image import open_image
from veneer.oci.descriptor import Platform
from veneer.settings import Settings
from veneer.testing.images import Layer, random_layers, write_image
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import difference, facts_of, node_at, scan
from veneer.testing.unpack import unpack_layers
from veneer.verify import verify_image

OCI_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"


@pytest.fixture
def source(tmp_path: Path, layers: list[Layer]) -> Layout:
    write_image(layers, tmp_path / "source", "v1", config={"Cmd": ["/bin/true"]})
    return Layout(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "target")


def plain(layout: Layout, digest: str) -> bytes:
    reader = zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO(layout.file(digest).read_bytes()), read_across_frames=True
    )
    return reader.read()


async def test_the_result_is_an_ordinary_image_with_the_same_config_and_diff_ids(
    source: Layout, target: Layout, settings: Settings
) -> None:
    source.change("v1", "v2", annotations={"org.example": "kept"})
    events: list[Event] = []
    result = await convert(source.ref("v2"), target.ref("v2"), settings, report=events.append)

    old, new = source.manifest("v2"), target.manifest("v2")
    assert new["config"] == old["config"]
    assert (
        target.file(new["config"]["digest"]).read_bytes() == source.file(old["config"]["digest"]).read_bytes()
    )
    config = target.document(new["config"]["digest"])
    assert [layer["mediaType"] for layer in new["layers"]] == [OCI_ZSTD, OCI_ZSTD]
    for layer, diff_id in zip(new["layers"], config["rootfs"]["diff_ids"], strict=True):
        assert f"sha256:{hashlib.sha256(plain(target, layer['digest'])).hexdigest()}" == diff_id
    assert new["annotations"]["org.example"] == "kept"
    index = json.loads(new["annotations"]["dev.veneer.index"])
    assert target.file(index["digest"]).stat().st_size == index["size"]

    assert str(result.manifest) == target.tags()["v2"]["digest"]
    assert result.destination == f"{target.ref('v2')}@{result.manifest}"
    (image,) = result.images
    assert [str(layer.source.digest) for layer in image.layers] == [layer["digest"] for layer in old["layers"]]
    assert [layer.size for layer in image.layers] == [
        len(gzip.decompress(source.file(layer["digest"]).read_bytes())) for layer in old["layers"]
    ]
    assert all(layer.spans >= 1 for layer in image.layers)
    assert image.dropped == {"device node": 1}
    for layer in old["layers"]:
        item = layer["digest"].removeprefix("sha256:")[:12]
        of_layer = [e for e in events if isinstance(e, Progress) and (e.task, e.item) == ("convert", item)]
        assert [e.done for e in of_layer if e.done == layer["size"]] == [layer["size"]]
    assert not list((settings.cache_dir / "convert").iterdir())


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_the_same_tars_give_the_same_digests_however_they_were_stored(
    compression: str, tmp_path: Path, layers: list[Layer], settings: Settings, target: Layout
) -> None:
    digests = []
    for number, how in enumerate(["gzip", compression]):
        layout = Layout(tmp_path / f"source-{number}")
        write_image(layers, layout.path, "v1", compression=how)
        mine = replace(settings, cache_dir=tmp_path / f"cache-{number}")
        digests.append((await convert(layout.ref("v1"), target.ref(f"v{number}"), mine)).manifest)
    assert digests[0] == digests[1]


@pytest.mark.root
@hypothesis_settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(random_layers(most_layers=3))
def test_random_images_open_as_what_unpacking_gives(layers: list[Layer]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        source, target = Layout(root / "source"), Layout(root / "target")
        write_image(layers, source.path, "v1", compression="zstd")
        settings = Settings(root / "cache", root / "run", 1 << 30, 30, Platform("linux", "amd64"))
        unpacked = root / "unpacked"
        unpacked.mkdir()
        unpack_layers([tar(layer) for layer in layers], unpacked, "keep")

        async def check() -> None:
            await convert(source.ref("v1"), target.ref("v1"), settings, devices="keep")
            async with open_image(target.ref("v1"), settings) as image:
                assert (await verify_image(image)).ok
                devices = [plain(target, str(layer.digest)) for layer in image.manifest.layers]
                assert difference(scan(unpacked), facts_of(image.index, devices)) == []

        trio.run(check)


async def test_docker_types_become_oci_types(source: Layout, target: Layout, settings: Settings) -> None:
    old = source.manifest("v1")
    docker = "application/vnd.docker."
    source.change(
        "v1",
        "docker",
        mediaType=docker + "distribution.manifest.v2+json",
        config={**old["config"], "mediaType": docker + "container.image.v1+json"},
        layers=[{**layer, "mediaType": docker + "image.rootfs.diff.tar.gzip"} for layer in old["layers"]],
    )
    await convert(source.ref("docker"), target.ref("docker"), settings)
    await convert(source.ref("v1"), target.ref("oci"), settings)
    assert target.tags()["docker"]["digest"] == target.tags()["oci"]["digest"]


async def test_annotations_about_the_old_bytes_go(source: Layout, target: Layout, settings: Settings) -> None:
    layers = source.manifest("v1")["layers"]
    notes = {"containerd.io/snapshot/stargz/toc.digest": "sha256:00", "org.example.note": "stays"}
    source.change("v1", "noted", layers=[{**layer, "annotations": notes} for layer in layers])
    await convert(source.ref("noted"), target.ref("noted"), settings)
    for layer in target.manifest("noted")["layers"]:
        assert layer["annotations"] == {"org.example.note": "stays"}


async def test_all_platforms_are_converted_or_the_one_that_is_named(
    source: Layout, target: Layout, settings: Settings
) -> None:
    write_image([(TarItem(b"arm"),)], source.path, "arm")
    amd, arm = ({**source.tags()[tag], "annotations": {}} for tag in ("v1", "arm"))
    entries = [
        {**amd, "platform": {"os": "linux", "architecture": "amd64"}},
        {**arm, "platform": {"os": "linux", "architecture": "arm64"}},
        {**amd, "platform": {"os": "unknown", "architecture": "unknown"}},
    ]
    inner = source.store(
        INDEX_TYPE, json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()
    )
    source.tag("multi", inner)
    events: list[Event] = []
    result = await convert(source.ref("multi"), target.ref("multi"), settings, report=events.append)
    index = target.manifest("multi")
    assert [entry["platform"]["architecture"] for entry in index["manifests"]] == ["amd64", "arm64"]
    assert len(result.images) == 2
    assert any(isinstance(event, Notice) and "left out" in event.message for event in events)
    async with open_image(target.ref("multi"), replace(settings, platform=Platform("linux", "arm64"))) as image:
        assert node_at(image.index, b"arm") is not None

    one = await convert(source.ref("multi"), target.ref("one"), settings, platform=Platform("linux", "arm64"))
    assert str(one.manifest) == index["manifests"][1]["digest"]


async def test_a_converted_image_is_copied_as_it_is(
    source: Layout, target: Layout, settings: Settings, tmp_path: Path
) -> None:
    first = await convert(source.ref("v1"), target.ref("v1"), settings)
    copy = Layout(tmp_path / "copy")
    events: list[Event] = []
    second = await convert(target.ref("v1"), copy.ref("v1"), settings, report=events.append)
    assert second.manifest == first.manifest
    assert second.images[0].copied
    assert any(isinstance(event, Notice) and "copied as it is" in event.message for event in events)
    async with open_image(copy.ref("v1"), replace(settings, cache_dir=tmp_path / "fresh")) as image:
        assert (await verify_image(image)).ok
    # Other device policy, other index.
    kept = await convert(target.ref("v1"), copy.ref("kept"), settings, devices="keep")
    assert kept.manifest != first.manifest


async def test_an_image_that_lost_its_index_gets_it_back(
    source: Layout, target: Layout, settings: Settings, tmp_path: Path
) -> None:
    first = await convert(source.ref("v1"), target.ref("v1"), settings)
    target.file(str(first.images[0].index.digest)).unlink()
    fresh = replace(settings, cache_dir=tmp_path / "fresh")
    again = await convert(target.ref("v1"), target.ref("v1"), fresh)
    assert again.manifest == first.manifest
    assert not again.images[0].copied
    async with open_image(target.ref("v1"), fresh) as image:
        assert (await verify_image(image)).ok


async def test_wrong_diff_ids_are_refused_and_no_tag_appears(
    source: Layout, target: Layout, settings: Settings
) -> None:
    manifest = source.manifest("v1")
    config = source.document(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"].reverse()
    source.change(
        "v1", "bad", config=source.store(manifest["config"]["mediaType"], json.dumps(config).encode())
    )
    with pytest.raises(IntegrityError, match="diffID"):
        await convert(source.ref("bad"), target.ref("bad"), settings)
    assert target.tags() == {}

    config["rootfs"]["diff_ids"].pop()
    source.change(
        "v1", "few", config=source.store(manifest["config"]["mediaType"], json.dumps(config).encode())
    )
    with pytest.raises(IntegrityError, match="names 1 layers"):
        await convert(source.ref("few"), target.ref("few"), settings)


async def test_damaged_layers_are_named(source: Layout, target: Layout, settings: Settings) -> None:
    digest = source.manifest("v1")["layers"][0]["digest"]
    source.flip(digest, 1_000)
    with pytest.raises(IntegrityError, match=f"{digest}.*expected {digest}"):
        await convert(source.ref("v1"), target.ref("v1"), settings)
    assert target.tags() == {}
    # What is left of it are finished layers and nothing else.
    assert all(blob.with_name("record.json").exists() for blob in settings.cache_dir.glob("convert/*/blob"))


async def test_a_tar_that_is_none_is_refused(tmp_path: Path, target: Layout, settings: Settings) -> None:
    write_image([b"not a tar" * 1000], tmp_path / "odd", "v1")
    with pytest.raises(IntegrityError, match="layer sha256:"):
        await convert(Layout(tmp_path / "odd").ref("v1"), target.ref("v1"), settings)


async def test_foreign_and_encrypted_layers_and_artifacts_are_refused(
    source: Layout, target: Layout, settings: Settings
) -> None:
    layer, config = source.manifest("v1")["layers"][0], source.manifest("v1")["config"]
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    source.change("v1", "foreign", layers=[{**layer, "mediaType": foreign}])
    source.change("v1", "sealed", layers=[{**layer, "mediaType": OCI_ZSTD + "+encrypted"}])
    source.change("v1", "artifact", config={**config, "mediaType": "application/vnd.example.config+json"})
    for tag, why in (("foreign", "not in the registry"), ("sealed", "unknown type"), ("artifact", "artifact")):
        with pytest.raises(UnsupportedFormat, match=why):
            await convert(source.ref(tag), target.ref(tag), settings)
    assert target.tags() == {}


async def test_a_destination_has_no_digest(source: Layout, target: Layout, settings: Settings) -> None:
    with pytest.raises(UsageError, match="digest"):
        await convert(source.ref("v1"), f"{target.ref('v1')}@sha256:{'0' * 64}", settings)


async def test_skopeo_copies_the_result_and_unpacks_the_same_tars(
    source: Layout, target: Layout, settings: Settings, tmp_path: Path
) -> None:
    result = await convert(source.ref("v1"), target.ref("v1"), settings)
    copy, opened = tmp_path / "copy", tmp_path / "opened"
    for options, destination in (([], f"oci:{copy}:v1"), (["--dest-decompress"], f"dir:{opened}")):
        argv = ["skopeo", "copy", "--quiet", *options, target.ref("v1"), destination]
        await trio.run_process(argv, capture_stdout=True)
    assert Layout(copy).tags()["v1"]["digest"] == str(result.manifest)
    config = target.document(target.manifest("v1")["config"]["digest"])
    for diff_id in config["rootfs"]["diff_ids"]:
        tar_file = opened / diff_id.removeprefix("sha256:")
        assert f"sha256:{hashlib.sha256(tar_file.read_bytes()).hexdigest()}" == diff_id
