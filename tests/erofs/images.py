"""Indexes to write images of: from tars, by the way that real layers take."""

from array import array
from collections.abc import Sequence

from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import Codec, Device, ImageIndex, LayerIndex, SpanTable
from veneer.index.tar import TarParser
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER


def device_of(data: bytes) -> Device:
    digest = Digest.of(data)
    spans = SpanTable(
        array("q", [0, len(data)]), array("q", [0]), array("q", [len(data)]), digest.raw, (Codec("raw"),)
    )
    return Device(Descriptor(OCI_LAYER, digest, len(data)), digest, spans, digest)


def index_of(layers: Sequence[bytes], devices: str = "keep") -> ImageIndex:
    """The index of uncompressed tars, lowest first."""
    indexes = []
    for layer in layers:
        parser, builder = TarParser(), TreeBuilder(devices)
        for entry in [*parser.feed(layer), *parser.finish()]:
            builder.add(entry)
        indexes.append(LayerIndex(builder.finish(), device_of(layer)))
    return merge(indexes)
