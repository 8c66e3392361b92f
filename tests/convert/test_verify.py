"""What verification finds: damage at every level, and indexes that lie."""

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.convert.layouts import Layout
from tests.index.trees import unpack_index
from veneer.convert.convert import convert
from veneer.image import open_image
from veneer.index.model import LayerIndex, LayerTree, MetadataPolicy
from veneer.index.wire import pack_index
from veneer.settings import Settings
from veneer.testing.images import Layer, write_image
from veneer.verify import VerifyReport, verify_image


@pytest.fixture
async def lazy(tmp_path: Path, layers: list[Layer], settings: Settings) -> Layout:
    write_image(layers, tmp_path / "source", "v1")
    await convert(f"oci:{tmp_path / 'source'}:v1", f"oci:{tmp_path / 'lazy'}:v1", settings)
    return Layout(tmp_path / "lazy")


async def verdict(layout: Layout, tag: str, settings: Settings) -> VerifyReport:
    async with open_image(layout.ref(tag), settings) as image:
        return await verify_image(image)


async def test_a_whole_image_is_ok(lazy: Layout, settings: Settings) -> None:
    report = await verdict(lazy, "v1", settings)
    assert report.ok
    assert report.exit_code == 0
    async with open_image(lazy.ref("v1"), settings) as image:
        assert [layer.spans for layer in report.layers] == [len(device.spans) for device in image.index.devices]


async def test_every_damaged_span_is_named_and_other_layers_are_still_judged(
    lazy: Layout, settings: Settings
) -> None:
    async with open_image(lazy.ref("v1"), settings) as image:
        spans = image.index.devices[0].spans
        blob = image.manifest.layers[0]
    damaged = [0, len(spans) - 1]
    for number in damaged:
        lazy.flip(str(blob.digest), spans[number].stored_offset + 5)
    report = await verdict(lazy, "v1", settings)
    assert not report.ok
    assert report.exit_code == 20
    problems = report.layers[0].problems
    assert len(problems) == report.layers[0].problem_count == len(damaged) + 1
    for number, problem in zip(damaged, problems, strict=False):
        assert f"span {number}:" in problem
    assert str(blob.digest) in problems[-1]
    assert report.layers[1].problem_count == 0
    assert not report.problems


async def test_a_blob_of_another_size_or_none_is_a_problem_of_its_layer(
    lazy: Layout, settings: Settings
) -> None:
    digest = lazy.manifest("v1")["layers"][0]["digest"]
    path = lazy.file(digest)
    whole = path.read_bytes()
    for change in (lambda: path.write_bytes(whole[:-10]), lambda: path.write_bytes(whole + b"x"), path.unlink):
        change()
        report = await verdict(lazy, "v1", settings)
        assert not report.ok
        assert report.layers[0].problem_count == 1
        assert report.layers[1].problem_count == 0


Change = Callable[[LayerTree], LayerTree]


def bigger_mode(tree: LayerTree) -> LayerTree:
    row = tree.names.index(b"large")
    mode = array("q", tree.mode)
    mode[row] |= 0o4000
    return replace(tree, mode=mode)


def other_place(tree: LayerTree) -> LayerTree:
    """A file's bytes are taken from another file."""
    row, other = tree.names.index(b"small-1"), tree.names.index(b"small-2")
    data = array("q", tree.data)
    data[row] = data[other]
    return replace(tree, data=data)


@pytest.mark.parametrize("change", [bigger_mode, other_place])
async def test_an_index_that_does_not_describe_its_layer_is_found_out(
    change: Change, lazy: Layout, settings: Settings
) -> None:
    annotation = json.loads(lazy.manifest("v1")["annotations"]["dev.veneer.index"])
    layers, policy = unpack_index(lazy.file(annotation["digest"]).read_bytes())
    lie = [LayerIndex(change(layers[0].tree), layers[0].device), layers[1]]
    descriptor = lazy.store(annotation["mediaType"], pack_index(lie, policy))
    lazy.change("v1", "lie", annotations={"dev.veneer.index": json.dumps(descriptor)})
    report = await verdict(lazy, "lie", settings)
    (problem,) = report.layers[0].problems
    assert "the index does not describe this layer" in problem
    assert ("large" if change is bigger_mode else "small-1") in problem


async def test_a_policy_that_does_not_tell_what_was_left_out_is_found_out(
    lazy: Layout, settings: Settings
) -> None:
    annotation = json.loads(lazy.manifest("v1")["annotations"]["dev.veneer.index"])
    layers, _ = unpack_index(lazy.file(annotation["digest"]).read_bytes())
    descriptor = lazy.store(annotation["mediaType"], pack_index(layers, MetadataPolicy("drop", {})))
    lazy.change("v1", "lie", annotations={"dev.veneer.index": json.dumps(descriptor)})
    report = await verdict(lazy, "lie", settings)
    assert not report.ok
    assert "device node" in report.problems[0]


async def test_a_diff_id_that_index_and_config_agree_on_is_still_checked(
    lazy: Layout, settings: Settings
) -> None:
    manifest = lazy.manifest("v1")
    config = lazy.document(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"].reverse()
    annotation = json.loads(manifest["annotations"]["dev.veneer.index"])
    layers, policy = unpack_index(lazy.file(annotation["digest"]).read_bytes())
    swapped = [
        LayerIndex(layer.tree, replace(layer.device, diff_id=other.device.diff_id))
        for layer, other in zip(layers, layers[::-1], strict=True)
    ]
    lazy.change(
        "v1",
        "swapped",
        config=lazy.store(manifest["config"]["mediaType"], json.dumps(config).encode()),
        annotations={
            "dev.veneer.index": json.dumps(lazy.store(annotation["mediaType"], pack_index(swapped, policy)))
        },
    )
    report = await verdict(lazy, "swapped", settings)
    assert [layer.problem_count for layer in report.layers] == [1, 1]
    assert all("diffID" in layer.problems[0] for layer in report.layers)
