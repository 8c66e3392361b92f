"""Packs by themselves: the index as a blob, hostile ones, and which chunks of which files are where."""

import hashlib
import random
import stat
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import Codec, Device, ImageIndex, LayerIndex, SpanTable
from veneer.index.paths import find
from veneer.index.tar import TarParser
from veneer.index.wire_spans import encode_spans
from veneer.mount.hot import hot_files
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER, VENEER_INDEX, VENEER_PACK, VENEER_PACK_INDEX
from veneer.prefetch.pack import (
    BLOCK,
    MAX_PACK_SPAN,
    PackIndex,
    Place,
    decode_pack_index,
    encode_pack_index,
    in_order,
)
from veneer.prefetch.placement import Range, chunk_size, hot_ranges, placements
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at

LAYERS = [Digest.of(b"%d" % number) for number in range(3)]


def device_of(data: bytes, media_type: str = VENEER_PACK, span: int = 64 << 10) -> Device:
    starts = array("q", [*range(0, len(data), span), len(data)])
    pieces = [data[start:end] for start, end in pairwise(starts)]
    lengths = array("q", map(len, pieces))
    digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    spans = SpanTable(starts, array("q", starts[:-1]), lengths, digests, (Codec("raw"),) if pieces else ())
    blob = Descriptor(media_type, Digest.of(data), len(data))
    diff_id = Digest.of(data)
    return Device(blob, diff_id, spans, Digest.of(encode_spans(blob, diff_id, spans)))


@st.composite
def indexes(draw: st.DrawFn) -> PackIndex:
    """Places on up to three layers, in any order in the pack."""
    rows = []
    for layer in sorted(draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True))):
        end = 0
        for gap, length in draw(
            st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=9)
        ):
            rows.append(Range(layer, (end + gap) * BLOCK, length * BLOCK))
            end += gap + length
    order = draw(st.permutations(range(len(rows))))
    ats = dict(zip(order, accumulate((rows[i].length for i in order), initial=0), strict=False))
    places = tuple(Place(*row, ats[number]) for number, row in enumerate(rows))
    return PackIndex(device_of(bytes(sum(row.length for row in rows))), places)


def described(data: bytes) -> Descriptor:
    return Descriptor(VENEER_PACK_INDEX, Digest.of(data), len(data))


@given(indexes())
def test_an_index_is_what_was_written(index: PackIndex) -> None:
    data = encode_pack_index(index)
    read = decode_pack_index(data, described(data))
    assert read.places == index.places
    assert read.device.key == index.device.key
    assert encode_pack_index(read) == data
    for place in index.places:
        assert read.find(place.layer, place.offset, place.length) == place.at
        assert read.find(place.layer, place.offset + BLOCK, place.length) is None
        assert read.find(place.layer, place.offset - BLOCK, BLOCK) in (
            None,
            *(p.at + p.length - BLOCK for p in index.places if p.offset + p.length == place.offset),
        )


@settings(max_examples=300, deadline=None)
@given(indexes(), st.data())
def test_a_damaged_index_is_refused_or_an_index(index: PackIndex, data: st.DataObject) -> None:
    """The digest would tell; here it is the attacker's own."""
    whole = encode_pack_index(index)
    plain = bytearray(zstandard.ZstdDecompressor().decompress(whole[16:]))
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    bad = whole[:12] + len(plain).to_bytes(4, "little") + zstandard.ZstdCompressor().compress(bytes(plain))
    try:
        read = decode_pack_index(bad, described(bad))
    except (IntegrityError, UnsupportedFormat):
        return
    again = encode_pack_index(read)
    assert zstandard.ZstdDecompressor().decompress(again[16:]) == plain, "there is one spelling of an index"
    end = 0
    for place in in_order(read.places):
        assert place.at == end
        end += place.length
    assert end == read.device.spans.size


@given(st.binary(max_size=200))
def test_bytes_that_are_no_index(data: bytes) -> None:
    for text in (data, b"\x89VPACK\r\n\x01\0\0\0" + data):
        with pytest.raises((IntegrityError, UnsupportedFormat)):
            decode_pack_index(text, described(text))


def test_an_index_that_expands_to_more_than_any_pack_needs_is_not_expanded() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes((16 << 20) + 1))
    data = encode_pack_index(some_index())[:12] + ((16 << 20) + 1).to_bytes(4, "little") + frame
    with pytest.raises(IntegrityError, match="plain bytes, more than"):
        decode_pack_index(data, described(data))


def some_index() -> PackIndex:
    places = (Place(LAYERS[0], 512, 1024, 512), Place(LAYERS[0], 4096, 512, 0))
    return PackIndex(device_of(bytes(1536)), tuple(sorted(places)))


@pytest.mark.parametrize(
    "places",
    [
        (),
        (Place(LAYERS[0], 512, 1024, 0),),
        (Place(LAYERS[0], 512, 1024, 512), Place(LAYERS[0], 1024, 512, 0)),
        (Place(LAYERS[0], 512, 1024, 0), Place(LAYERS[0], 4096, 512, 512)),
        (Place(LAYERS[0], 4096, 512, 0), Place(LAYERS[0], 512, 1024, 512)),
        (Place(LAYERS[0], 512, 1000, 512), Place(LAYERS[0], 4096, 512, 0)),
        (Place(LAYERS[0], 512, 1024, 0), Place(LAYERS[0], 1536, 512, 1024)),
        (Place(LAYERS[0], 512, 1536, 0), Place(LAYERS[0], 4096, 0, 1536)),
        (Place(LAYERS[0], 512, 1536, 0), Place(LAYERS[0], 4096, 512, 1024)),
        (Place(LAYERS[0], 512, 512, 0), Place(LAYERS[0], 4096, 512, 1024)),
    ],
)
def test_places_that_are_no_pack(places: tuple[Place, ...]) -> None:
    """None, too few, overlapping, out of order, half blocks, in two where one would do, empty, with gaps."""
    encode_pack_index(some_index())
    with pytest.raises(IntegrityError):
        encode_pack_index(PackIndex(some_index().device, places))


def test_what_a_pack_may_not_be() -> None:
    index, data = some_index(), encode_pack_index(some_index())
    with pytest.raises(IntegrityError):
        decode_pack_index(data, replace(described(data), digest=Digest.of(b"another")))
    with pytest.raises(IntegrityError):
        decode_pack_index(data + b"\0", described(data))
    with pytest.raises(UnsupportedFormat):
        decode_pack_index(data, replace(described(data), media_type=VENEER_INDEX))
    for version, hint in ((0, "convert the image again"), (2, "a newer veneer")):
        other = data[:8] + bytes([version]) + data[9:]
        with pytest.raises(UnsupportedFormat, match=f"version {version}") as caught:
            decode_pack_index(other, described(other))
        assert hint in (caught.value.hint or "")
    with pytest.raises(IntegrityError, match="type"):
        encode_pack_index(replace(index, device=device_of(bytes(1536), OCI_LAYER)))
    size = MAX_PACK_SPAN + BLOCK
    with pytest.raises(IntegrityError, match="span"):
        encode_pack_index(PackIndex(device_of(bytes(size), span=size), (Place(LAYERS[0], 0, size, 0),)))


# Files and places


def image_of(*layers: Sequence[TarItem]) -> tuple[ImageIndex, dict[Digest, bytes]]:
    indexes, tars = [], {}
    for items in layers:
        data = tar(items)
        builder, parser = TreeBuilder(), TarParser()
        for entry in [*parser.feed(data), *parser.finish()]:
            builder.add(entry)
        device = device_of(data, OCI_LAYER)
        tars[device.diff_id] = data
        indexes.append(LayerIndex(builder.finish(), device))
    return merge(indexes), tars


def pack_of(hot: Sequence[Range], tars: dict[Digest, bytes]) -> tuple[PackIndex, bytes]:
    data = b"".join(tars[one.layer][one.offset : one.offset + one.length] for one in hot)
    starts = accumulate((one.length for one in hot), initial=0)
    places = sorted(Place(*one, at) for one, at in zip(hot, starts, strict=False))
    return PackIndex(device_of(data), tuple(places)), data


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_byte_of_a_packed_file_is_where_it_is_mapped_to(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [0, 1, 511, 512, 513, 4095, 4096, 4097, 9000, 70_000, 200_001]
    names = [b"f%d" % number for number in range(12)]
    layers = [
        [TarItem(name, content=chance.randbytes(chance.choice(sizes))) for name in chance.sample(names, 8)]
        for _ in range(3)
    ]
    layers[0].append(TarItem(b"link", "link", link=layers[0][0].path))
    layers[1].append(TarItem(b"sparse", pieces=((4096, b"x" * 5000),), size=50_000))
    index, tars = image_of(*layers)
    touched = [
        Range(
            layer,
            start := chance.randrange(len(data)) // 4096 * 4096,
            min(4096 * chance.randrange(1, 6), len(data) - start),
        )
        for layer, data in [chance.choice([*tars.items()]) for _ in range(30)]
    ]
    hot = hot_ranges(index, touched, 1 << 30)
    if not hot:
        return
    pack, content = pack_of(hot, tars)
    encode_pack_index(pack)
    devices = [*(tars[device.diff_id] for device in index.devices), content]
    found = placements(index, [pack])
    packed = 0
    for node in {node for _, node in index.walk()}:
        if not stat.S_ISREG(index.mode[node]) or not index.size[node]:
            assert node not in found
            continue
        extents = found.get(node, [])
        for extent in extents:
            mine = devices[extent.device][extent.offset : extent.offset + extent.length]
            theirs = b"".join(
                devices[one.device][one.offset : one.offset + one.length]
                for one in index.extents(node, extent.file_offset, extent.length)
            )
            assert mine == theirs
            assert extent.file_offset % 4096 == 0
            packed += extent.length if extent.device == 3 else 0
        assert not extents or sum(extent.length for extent in extents) == index.size[node]
        # What was read and can be packed is: pages of the file that lie in pages of the device.
        whole = {
            page
            for extent in extents
            if extent.device == 3
            for page in range(extent.file_offset // 4096, -(-(extent.file_offset + extent.length) // 4096))
        }
        layer = index.devices[index.device_of(node)].diff_id
        if node in index.segments:
            assert not whole
            continue
        data = index.data[node]
        read = {
            page
            for one in touched
            if one.layer == layer
            for page in range(one.offset // 4096, -(-(one.offset + one.length) // 4096))
        }
        near = {
            page
            for one in touched
            if one.layer == layer and one.offset < data + index.size[node]
            for page in range(
                max(0, one.offset - data) // 4096,
                -(-min(index.size[node], one.offset + one.length - data) // 4096),
            )
        }
        pages = {
            page
            for page in near
            if read.issuperset(
                range(
                    (data + 4096 * page) // 4096,
                    -(-(data + min(-(-index.size[node] // BLOCK) * BLOCK, 4096 * (page + 1))) // 4096),
                )
            )
        }
        assert whole == pages
    assert packed <= len(content) < packed + BLOCK * 50
    files = hot_files(index, found)
    assert len({file.path for file in files}) == len(files)
    order = []
    for path, ranges in files:
        extents = [extent for extent in found[find(index, path, "the image")] if extent.device == 3]
        order.append(min(extent.offset for extent in extents))
        assert {place for start, length in ranges for place in range(start, start + length)} == {
            place
            for extent in extents
            for place in range(extent.file_offset, extent.file_offset + extent.length)
        }
    assert order == sorted(order)
    assert sum(length for _, ranges in files for _, length in ranges) == packed


def test_the_order_is_that_of_first_use_and_what_is_too_much_is_left_out() -> None:
    index, tars = image_of([TarItem(b"a", content=b"a" * 10_000), TarItem(b"b", content=b"b" * 10_000)])
    (layer,) = tars
    a, b = (index.data[node] for node in (node_at(index, b"a"), node_at(index, b"b")) if node is not None)
    touched = [Range(layer, b + 4096, 4096), Range(layer, a, 8192), Range(layer, b, 10_000), Range(layer, 0, 1)]
    expected = [Range(layer, b + 4096, 4096), Range(layer, a, 8192), Range(layer, b, 4096)]
    last = Range(layer, b + 8192, 2048)
    assert hot_ranges(index, touched, 1 << 20) == [*expected, last]
    assert hot_ranges(index, touched, 4096 * 4) == expected
    assert hot_ranges(index, [Range(LAYERS[0], 0, 10)], 1 << 20) == []
    # A profile may say anything; what is behind the end takes neither time nor memory.
    whole = [Range(layer, a, 10_240), Range(layer, b, 10_240)]
    beyond = [Range(layer, 1 << 52, 1 << 52), Range(layer, 0, 1 << 53)]
    assert hot_ranges(index, beyond, 1 << 20) == whole


def test_parts_of_files_beside_what_was_read_are_left_out() -> None:
    """Events are of whole pages of the device, and files begin anywhere in them."""
    contents = {b"a": b"a" * 20_000, b"b": b"b" * 4_096, b"c": b"c" * 6_000}
    index, tars = image_of([TarItem(name, content=content) for name, content in contents.items()])
    (layer,) = tars
    node = node_at(index, b"b")
    assert node is not None
    first = index.data[node] // 4096 * 4096
    end = -(-(index.data[node] + 4096) // 4096) * 4096
    assert first < index.data[node] < end - 4096, "not aligned, with parts of its neighbours"
    only = Range(layer, index.data[node], 4096)
    assert hot_ranges(index, [Range(layer, first, end - first)], 1 << 20) == [only]
    halves = [Range(layer, first, 4096), Range(layer, first + 4096, end - first - 4096)]
    assert hot_ranges(index, halves, 1 << 20) == [only], "page by page it is the same"


def test_huge_files_have_larger_chunks() -> None:
    assert [chunk_size(size) for size in (0, 1, 1 << 30, (1 << 30) + 1, 1 << 40)] == [
        4096,
        4096,
        4096,
        8192,
        4 << 20,
    ]
