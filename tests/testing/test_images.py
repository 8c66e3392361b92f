"""Random images have in them what they promise, and written ones are images."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings

from veneer.oci.config import ImageConfig
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.source.layout import OCILayout
from veneer.testing.images import Layer, random_layers, write_image
from veneer.testing.tars import TarItem, tar

FEATURES = {
    "several layers",
    "whiteout",
    "opaque",
    "hard link",
    "one name in two layers",
    "bytes that are not text",
    "deep",
    "sparse",
    "more than 4 GiB",
    "capability",
    "device",
    "nanoseconds",
    "before 1970",
    *("pax", "gnu", "ustar", "v7"),
}


def features_of(layers: list[Layer]) -> set[str]:
    found = {"several layers"} if len(layers) > 1 else set()
    names = [{item.path.strip(b"./") for item in layer} for layer in layers]
    if any(a & b for number, a in enumerate(names) for b in names[:number]):
        found.add("one name in two layers")
    for item in (item for layer in layers for item in layer):
        tests = {
            "whiteout": b".wh." in item.path,
            "opaque": item.path.endswith(b".wh..wh..opq"),
            "hard link": item.kind == "link",
            "bytes that are not text": b"\xff\xfe" in item.path,
            "deep": item.path.count(b"/") > 9,
            "sparse": item.pieces is not None,
            "more than 4 GiB": item.size > 1 << 32,
            "capability": any(name == b"security.capability" for name, _ in item.xattrs),
            "device": item.kind in ("char", "block"),
            "nanoseconds": item.mtime_ns % 1000 > 0,
            "before 1970": item.mtime_ns < 0,
        }
        found |= {item.form, *(name for name, there in tests.items() if there)}
    return found


def test_random_layers_have_all_there_is() -> None:
    found: set[str] = set()

    @given(random_layers())
    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def collect(layers: list[Layer]) -> None:
        found.update(features_of(layers))

    collect()
    assert found >= FEATURES


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_a_written_image_is_one(tmp_path: Path, compression: str) -> None:
    layers = [tar([TarItem(b"a", content=b"1" * 1000)]), tar([TarItem(b"b", content=b"2")])]
    write_image(layers[:1], tmp_path, "old", compression)
    write_image([(TarItem(b"replaced"),)], tmp_path, "new", compression)
    write_image(layers, tmp_path, "new", compression, {"Cmd": ["/a"]})

    layout = OCILayout(tmp_path)
    manifest = Manifest.parse((await layout.manifest("new")).data)
    config = await layout.blob(manifest.config).read(0, manifest.config.size)
    decoders: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "zstd": zstandard.ZstdDecompressor().decompress,
        "none": bytes,
    }
    decode = decoders[compression]
    stored = [await layout.blob(layer).read(0, layer.size) for layer in manifest.layers]
    assert [decode(blob) for blob in stored] == layers
    assert ImageConfig.parse(config).diff_ids == tuple(map(Digest.of, layers))
    assert ImageConfig.parse(config).cmd == ("/a",)
    assert len(Manifest.parse((await layout.manifest("old")).data).layers) == 1
