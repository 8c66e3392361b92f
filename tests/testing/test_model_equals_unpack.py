"""The tree that veneer makes of an image is the one that an unpacker leaves on disk."""

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import Codec, Device, ImageIndex, LayerIndex, SpanTable
from veneer.index.tar import TarParser
from veneer.index.wire_tree import decode_tree, encode_tree
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import TarItem, opaque, tar, whiteout
from veneer.testing.trees import difference, facts_of, scan
from veneer.testing.unpack import unpack_layers

pytestmark = pytest.mark.root


def index_of(layers: Sequence[bytes], devices: str) -> ImageIndex:
    """The layers parsed, built, taken through the wire format and merged."""
    indexes = []
    for layer in layers:
        parser, builder = TarParser(), TreeBuilder(devices)
        for entry in [*parser.feed(layer), *parser.finish()]:
            builder.add(entry)
        tree = decode_tree(encode_tree(builder.finish(), len(layer)), len(layer))
        digest = Digest.of(layer)
        spans = SpanTable(
            array("q", [0, len(layer)]), array("q", [0]), array("q", [len(layer)]), digest.raw, (Codec("raw"),)
        )
        indexes.append(
            LayerIndex(tree, Device(Descriptor(OCI_LAYER, digest, len(layer)), digest, spans, digest))
        )
    return merge(indexes)


def differences(layers: Sequence[Layer], devices: str) -> list[str]:
    tars = [tar(layer) for layer in layers]
    with tempfile.TemporaryDirectory() as directory:
        unpack_layers(tars, Path(directory), devices)
        return difference(scan(Path(directory)), facts_of(index_of(tars, devices), tars))


@given(random_layers(), st.sampled_from(("drop", "keep")))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_random_images(layers: list[Layer], devices: str) -> None:
    assert differences(layers, devices) == []
