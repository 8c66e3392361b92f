"""The golden vectors: what was once written stays what is written, and keeps its meaning."""

import json
from pathlib import Path

import pytest

from tests.index.trees import unpack_index
from tests.index.vectors import make
from veneer.index.dump import dump_image, dump_layer
from veneer.index.merge import merge
from veneer.index.model import LayerTree
from veneer.index.wire import decode_section, parse_header

VECTORS = Path(__file__).parent / "vectors"


def vector(name: str) -> bytes:
    return bytes.fromhex((VECTORS / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", make.vectors())
def test_plain_sections_are_the_same_for_ever(name: str) -> None:
    assert make.vectors()[name].hex() == vector(name).hex()


def test_the_artifact_holds_these_sections() -> None:
    artifact = vector("artifact")
    header = parse_header(artifact)
    plain = [decode_section(ref, artifact[ref.offset :][: ref.stored_length]) for ref in header.sections()]
    names = ("lower-tree", "lower-spans", "upper-tree", "upper-spans", "gzip-tree", "gzip-spans", "gzip-aux")
    assert plain == [vector(name) for name in ("policy", *names)]


def test_the_artifact_means_the_same_for_ever() -> None:
    unpacked, policy = unpack_index(vector("artifact"))
    assert policy == make.POLICY
    for layer, expected in zip(unpacked, make.layers(), strict=True):
        assert layer.device.key == expected.device.key
        for name in LayerTree.__slots__:
            assert getattr(layer.tree, name) == getattr(expected.tree, name)
    assert [dump_layer(layer) for layer in unpacked] == json.loads((VECTORS / "layers.json").read_text())
    assert dump_image(merge(unpacked, policy)) == json.loads((VECTORS / "image.json").read_text())
