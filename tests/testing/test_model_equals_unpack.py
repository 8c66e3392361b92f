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


def test_links_into_lower_layers_opaque_roots_and_paths_at_the_limit() -> None:
    deep = b"d/" * 500 + b"n" * 255
    long = b"/".join([b"n" * 254] * 14)
    layers = [
        (
            TarItem(b"./", "dir", mode=0o700, mtime_ns=9),
            TarItem(b"d/kept", content=b"k"),
            TarItem(b"d/also", "link", link=b"d/kept"),
            TarItem(b"s", "symlink", link=b"d"),
            TarItem(b"d/dev", "char", rdev=(1, 3)),
            TarItem(b"sub/hidden", content=b"h"),
        ),
        (
            TarItem(b"third name", "link", link=b"d/kept", mode=0o777, uid=9),
            TarItem(b"of the link", "link", link=b"s"),
            TarItem(deep, content=b"deep", xattrs=((b"user.a", b"b"),)),
            TarItem(long, content=b"long"),
            TarItem(b"d/kept", content=b"another file now"),
            # Takes the place of a device and of a symlink, which it does not follow.
            TarItem(b"d/dev/null", content=b""),
            TarItem(b"s/inside", content=b"i"),
            whiteout(b"sub"),
            TarItem(b"sub/new", content=b"n"),
        ),
    ]
    for devices in ("drop", "keep"):
        assert differences(layers, devices) == []
        assert differences([*layers, (opaque(b""), TarItem(b"only", content=b"o"))], devices) == []


def test_a_large_directory_and_a_huge_sparse_file() -> None:
    names = [TarItem(b"many/%05d" % (number * 7919 % 20_000)) for number in range(20_000)]
    huge = (5 << 30, 1 << 40)
    files = [
        TarItem(
            b"huge-%d" % size,
            pieces=((0, b"a" * 5000), (size - 3, b"end")),
            size=size,
            form=form,
            sparse=sparse,
        )
        for size in huge
        for form, sparse in (("pax", "1.0"), ("gnu", "old"))
    ]
    layers = [
        (*names, *files[::2]),
        (*files[1::2], *map(whiteout, (b"many/%05d" % n for n in range(0, 20_000, 3)))),
    ]
    assert differences(layers, "drop") == []


def test_a_directory_in_place_of_a_file_of_its_layer_shows_what_is_below() -> None:
    """As in overlayfs, which never sees the file; a plain unpacker would have removed ``old``."""
    tars = [
        tar([TarItem(b"d/old")]),
        tar([TarItem(b"d"), TarItem(b"d/", "dir", mode=0o700), TarItem(b"d/new")]),
    ]
    facts = facts_of(index_of(tars, "drop"), tars)
    assert list(facts) == [b"", b"d", b"d/new", b"d/old"]
    assert facts[b"d"].mode == 0o700
