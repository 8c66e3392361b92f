"""The whole artifact: header, sections and their digests; what a reader must refuse."""

import hashlib
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.trees import Node, lay_out, layer_of, layers, unpack_index
from tests.index.vectors.make import gzip_layer, windows
from veneer.errors import IntegrityError, UnsupportedFormat, VeneerError
from veneer.index import wire_header
from veneer.index.model import LayerIndex, LayerTree, MetadataPolicy
from veneer.index.wire import (
    SectionRef,
    decode_policy,
    decode_section,
    encode_spans,
    encode_tree,
    header_length,
    pack_index,
    parse_header,
)
from veneer.index.wire_columns import pack
from veneer.index.wire_header import LayerRecord, pack_header
from veneer.oci.digest import Digest

POLICY = MetadataPolicy("keep", {"device node": 3, "xattr ü": 0})
# Offsets of the header, docs/reference/index-format.md: prologue, policy section, layer records.
LAYER_COUNT, HEADER_LENGTH, REQUIRED, OPTIONAL, POLICY_REF, FIRST_RECORD = 10, 12, 16, 24, 64, 160
SEAL, COMPRESSION, ALGORITHM = 24, 26, 28


@pytest.fixture(scope="module")
def packed() -> bytes:
    """Two layers of one and two files."""
    one = Node(0o040755, children={b"f": Node(0o100644, size=5, block=1)})
    two = Node(0o040755, children={b"g": Node(0o100644, size=9, block=5), b"h": Node(0o100644)})
    return pack_index([layer_of(lay_out(root)[0], b"%d" % len(root.children)) for root in (one, two)], POLICY)


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def equal(one: LayerIndex, other: LayerIndex) -> bool:
    return one.device.key == other.device.key and all(
        getattr(one.tree, name) == getattr(other.tree, name) for name in LayerTree.__slots__
    )


@given(st.lists(layers(), max_size=3))
@settings(deadline=None, max_examples=40)
def test_what_is_packed_unpacks_to_the_same(roots: list[Node]) -> None:
    packed_layers = [layer_of(lay_out(root)[0], b"%d" % number) for number, root in enumerate(roots)]
    data = pack_index(packed_layers, POLICY)
    unpacked, policy = unpack_index(data)
    assert policy == POLICY
    assert all(map(equal, packed_layers, unpacked))
    assert len(unpacked) == len(packed_layers)
    assert pack_index(unpacked, policy) == data


def test_the_header_alone_says_where_everything_is(packed: bytes) -> None:
    header = parse_header(packed[: header_length(2)])
    assert header.length == header_length(2)
    assert header.artifact_length == len(packed)
    tree = header.layers[1].tree
    plain = decode_section(tree, packed[tree.offset : tree.offset + tree.stored_length])
    assert plain == encode_tree(unpack_index(packed)[0][1].tree)


def test_no_byte_can_change_unnoticed(packed: bytes) -> None:
    """Optional feature bits are the only bytes of an artifact that may differ and still be read."""
    for position in range(len(packed)):
        changed = patched(packed, position, bytes([packed[position] ^ 0x10]))
        if OPTIONAL <= position < POLICY_REF - 32:
            unpack_index(changed)
            continue
        with pytest.raises(VeneerError):
            unpack_index(changed)


@pytest.mark.parametrize("length", [0, 8, 159, 160, 500, -1])
def test_a_truncated_artifact_is_refused(packed: bytes, length: int) -> None:
    with pytest.raises(IntegrityError):
        unpack_index(packed[:length])


def test_nothing_may_follow_the_artifact(packed: bytes) -> None:
    with pytest.raises(IntegrityError, match="expected"):
        unpack_index(packed + b"\0")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"\x89EROFS!\n", "not a veneer index"),
        (8, b"\x02\0", "version 2"),
        (REQUIRED, b"\x01", "0x1 are required"),
        (REQUIRED + 7, b"\x80", "0x8000000000000000 are required"),
        (POLICY_REF + SEAL, b"\x01", "sealed with method 1"),
        (FIRST_RECORD + 144 + SEAL, b"\x01", "sealed with method 1"),
        (POLICY_REF + COMPRESSION, b"\x02", "compression 2"),
        (POLICY_REF + ALGORITHM, b"\x02", "digest algorithm 2"),
        (FIRST_RECORD, b"\x03", "digest algorithm 3"),
    ],
)
def test_what_only_newer_readers_know_is_unsupported(
    packed: bytes, offset: int, value: bytes, message: str
) -> None:
    with pytest.raises(UnsupportedFormat, match=message):
        parse_header(patched(packed, offset, value))


@pytest.mark.parametrize(("version", "hint"), [(0, "convert the image again"), (2, "a newer veneer")])
def test_an_index_of_another_version_says_what_to_do(packed: bytes, version: int, hint: str) -> None:
    with pytest.raises(UnsupportedFormat, match=f"version {version} of the format") as caught:
        parse_header(patched(packed, 8, bytes([version, 0])))
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(LAYER_COUNT, b"\x03\0", id="more layers than the header has room for"),
        pytest.param(LAYER_COUNT, b"\xe9\x03", id="1001 layers"),
        pytest.param(HEADER_LENGTH, b"\0\0\0\0", id="header length"),
        pytest.param(POLICY_REF, (5000).to_bytes(8, "little"), id="a gap before a section"),
        pytest.param(POLICY_REF + 8, bytes(8), id="an empty stored section"),
        pytest.param(POLICY_REF + 16, bytes(8), id="an empty plain section"),
        pytest.param(POLICY_REF + 16, b"\xff" * 8, id="a section of 16 EiB"),
        pytest.param(POLICY_REF + 30, b"\x01", id="reserved bytes of a section"),
        pytest.param(FIRST_RECORD + 2, b"\x01", id="reserved bytes of a digest"),
        pytest.param(FIRST_RECORD + 8 + 32, b"\x01", id="more digest than the algorithm has"),
    ],
)
def test_a_contradictory_header_is_refused(packed: bytes, offset: int, value: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse_header(patched(packed, offset, value))


def test_a_well_formed_header_of_too_many_layers_is_refused() -> None:
    ref = SectionRef(0, 1, bytes(32), 1, bytes(32))
    record = LayerRecord(Digest.of(b""), Digest.of(b""), ref, ref, None)
    with pytest.raises(IntegrityError, match="number of layers"):
        parse_header(pack_header([record] * 1001, ref))


@pytest.mark.parametrize(("stored_length", "length"), [(0, 1), (1, 0)])
def test_no_section_is_empty(stored_length: int, length: int) -> None:
    ref = SectionRef(header_length(0), stored_length, bytes(32), length, bytes(32))
    with pytest.raises(IntegrityError, match="sections are empty"):
        parse_header(pack_header([], ref))


def test_sections_together_are_bounded(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sum(ref.length for ref in parse_header(packed).sections())
    monkeypatch.setattr(wire_header, "MAX_PLAIN_SIZE", plain)
    parse_header(packed)
    monkeypatch.setattr(wire_header, "MAX_PLAIN_SIZE", plain - 1)
    with pytest.raises(IntegrityError, match="together"):
        parse_header(packed)


def test_a_section_that_shrank_too_well_is_refused(packed: bytes) -> None:
    most = (64 << 20) + 1000 * parse_header(packed).policy.stored_length
    parse_header(patched(packed, POLICY_REF + 16, most.to_bytes(8, "little")))
    with pytest.raises(IntegrityError, match="is stored in"):
        parse_header(patched(packed, POLICY_REF + 16, (most + 1).to_bytes(8, "little")))


def test_header_and_spans_must_name_the_same_layer(packed: bytes) -> None:
    other = Digest.of(b"other", "sha512").raw
    with pytest.raises(IntegrityError, match="different layers"):
        unpack_index(patched(packed, FIRST_RECORD, b"\x02\0" + bytes(6) + other))


def test_windows_come_last_and_belong_to_layers_that_have_some(packed: bytes) -> None:
    layers = [*unpack_index(packed)[0], gzip_layer(), unpack_index(packed)[0][0]]
    header = parse_header(pack_index(layers, POLICY))
    assert [record.aux is not None for record in header.layers] == [False, False, True, False]
    assert list(header.sections())[-1] == header.layers[2].aux
    unpacked = unpack_index(pack_index(layers, POLICY))[0]
    assert [layer.device.windows is not None for layer in unpacked] == [False, False, True, False]
    assert unpacked[2].device.windows is not None
    assert unpacked[2].device.windows.key == windows().key


def test_windows_of_a_layer_that_needs_none_are_refused(packed: bytes) -> None:
    plain = encode_spans(windows().blob, windows().diff_id, windows().spans)
    stored = zstandard.compress(plain)
    digests = hashlib.sha256(stored).digest(), hashlib.sha256(plain).digest()
    header = parse_header(packed)
    aux = SectionRef(len(packed), len(stored), digests[0], len(plain), digests[1])
    records = [replace(header.layers[0], aux=aux), header.layers[1]]
    changed = pack_header(records, header.policy) + packed[header.length :] + stored
    with pytest.raises(IntegrityError, match="windows are not those"):
        unpack_index(changed)


def test_a_layer_without_its_windows_is_refused() -> None:
    packed = pack_index([gzip_layer()], POLICY)
    header = parse_header(packed)
    aux = header.layers[0].aux
    assert aux is not None
    changed = pack_header([replace(header.layers[0], aux=None)], header.policy)
    with pytest.raises(IntegrityError, match="no windows"):
        unpack_index(changed + packed[header.length : aux.offset])


def ref_of(stored: bytes, plain: bytes, **changes: int) -> SectionRef:
    lengths = {"stored_length": len(stored), "length": len(plain)} | changes
    return SectionRef(
        offset=0,
        stored_digest=hashlib.sha256(stored).digest(),
        digest=hashlib.sha256(plain).digest(),
        **lengths,
    )


def test_sections_are_checked_as_stored_and_as_plain_bytes() -> None:
    plain = b"section"
    stored = zstandard.compress(plain)
    assert decode_section(ref_of(stored, plain), stored) == plain
    with pytest.raises(IntegrityError, match="expected sha256"):
        decode_section(ref_of(stored, plain), stored[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="plain index section"):
        decode_section(ref_of(stored, b"another"), stored)
    with pytest.raises(IntegrityError, match="bytes, got"):
        decode_section(ref_of(stored, plain), stored[:-1])


def test_a_bomb_is_refused_before_it_grows() -> None:
    """A small frame that holds 64 MiB, behind a header that says less, and one that says too much."""
    stored = zstandard.compress(bytes(64 << 20))
    with pytest.raises(IntegrityError, match="expected size of 1000 bytes"):
        decode_section(ref_of(stored, b"", length=1000), stored)
    with pytest.raises(IntegrityError, match="are more than"):
        decode_section(ref_of(stored, b"", length=(512 << 20) + 1), stored)


def test_too_many_layers_are_not_written() -> None:
    layer = layer_of(lay_out(Node(0o040755))[0])
    with pytest.raises(IntegrityError, match="more than 1000"):
        pack_index([layer] * 1001, POLICY)


@pytest.mark.parametrize(
    "policy",
    [
        MetadataPolicy("sometimes"),
        MetadataPolicy("drop", {"": 1}),
        MetadataPolicy("drop", {"time": -1}),
        MetadataPolicy("drop", {"time": 1 << 63}),
        MetadataPolicy("drop", {f"thing {number}": 1 for number in range(1001)}),
    ],
)
def test_impossible_policies_are_not_written(policy: MetadataPolicy) -> None:
    with pytest.raises(IntegrityError):
        pack_index([], policy)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(["drop", 2, b"b\0a", bytes([1, 2])], id="not sorted"),
        pytest.param(["drop", 2, b"a\0a", bytes([1, 2])], id="twice"),
        pytest.param(["drop", 1, b"\xff", bytes([1])], id="not UTF-8"),
        pytest.param([b"drop", 1, b"a", bytes([1])], id="bytes for text"),
    ],
)
def test_other_spellings_of_a_policy_are_refused(fields: list[object]) -> None:
    assert decode_policy(pack(["drop", 2, b"a\0b", bytes([1, 2])])) == MetadataPolicy("drop", {"a": 1, "b": 2})
    with pytest.raises(IntegrityError):
        decode_policy(pack(fields))
