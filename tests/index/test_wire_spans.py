"""Spans sections: a device as it is named in the cache, one encoding for each."""

from array import array
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.trees import mutate, span_tables
from tests.index.vectors.make import gzip_layer, windows
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index import wire_spans
from veneer.index.model import Codec, SpanTable
from veneer.index.wire import decode_spans, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_ZSTD

DIFF_ID = Digest.of(b"device")


def blob(size: int, algorithm: str = "sha256") -> Descriptor:
    return Descriptor(OCI_LAYER_ZSTD, Digest.of(b"blob", algorithm), size, {"not": "kept"})


def table(**changes: object) -> SpanTable:
    """Three spans: 10 bytes raw at 0, 20 as zstd at 10, 30 raw at 45 (after a gap of 20)."""
    columns: dict[str, object] = {
        "starts": array("q", [0, 10, 30, 60]),
        "stored_offsets": array("q", [0, 10, 45]),
        "stored_lengths": array("q", [10, 15, 30]),
        "digests": bytes(range(96)),
        "codecs": (Codec("raw"), Codec("zstd")),
        "codec_of": bytes([0, 1, 0]),
    }
    return SpanTable(**(columns | changes))  # type: ignore[arg-type] # changes are checked by the test that makes them


@given(span_tables(), st.sampled_from(["sha256", "sha512"]))
@settings(deadline=None)
def test_what_is_encoded_decodes_to_the_same(drawn: tuple[SpanTable, int], algorithm: str) -> None:
    spans, size = drawn
    data = encode_spans(blob(size, algorithm), DIFF_ID, spans)
    device = decode_spans(data)
    assert list(device.spans) == list(spans)
    assert device.spans.size == spans.size
    assert (device.blob.media_type, device.blob.digest, device.blob.size) == (
        OCI_LAYER_ZSTD,
        Digest.of(b"blob", algorithm),
        size,
    )
    assert device.diff_id == DIFF_ID
    assert device.key == Digest.of(data)


@given(span_tables(), st.data())
@settings(deadline=None, max_examples=200)
def test_mutated_sections_are_refused_or_canonical(drawn: tuple[SpanTable, int], data: st.DataObject) -> None:
    spans, size = drawn
    mutated = mutate(encode_spans(blob(size), DIFF_ID, spans), data)
    try:
        device = decode_spans(mutated)
    except (IntegrityError, UnsupportedFormat):
        return
    assert encode_spans(device.blob, device.diff_id, device.spans) == mutated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": array("q", [0, 10, 10, 60])}, "a span is empty"),
        ({"starts": array("q", [0, 30, 10, 60])}, "not ascending"),
        ({"starts": array("q", [5, 10, 30, 60])}, "contradict"),
        ({"starts": array("q", [0, 10, 30])}, "cannot hold|wider"),
        ({"starts": array("q", [0, 10, 30, 30 + (1 << 28) + 1])}, "longer than"),
        ({"stored_offsets": array("q", [0, 9, 45])}, "overlap"),
        ({"stored_lengths": array("q", [10, 15, 31])}, "beyond their blob"),
        ({"stored_lengths": array("q", [10, 0, 30])}, "a span is empty"),
        ({"digests": bytes(95)}, "bytes of digests"),
        ({"codecs": (Codec("zstd"), Codec("raw")), "codec_of": bytes([1, 0, 1])}, "order of first use"),
        ({"codecs": (Codec("raw"), Codec("zstd"), Codec("gzip"))}, "order of first use"),
        ({"codecs": (Codec("raw"),), "codec_of": bytes(3)}, "codec numbers"),
        ({"codecs": (Codec("raw"),) * 2}, "order of first use"),
        ({"codec_of": bytes([0, 1])}, "codec numbers"),
        ({"codecs": (), "codec_of": b""}, "order of first use"),
    ],
)
def test_impossible_tables_are_not_written(changes: dict[str, object], message: str) -> None:
    encode_spans(blob(75), DIFF_ID, table())
    with pytest.raises(IntegrityError, match=message):
        encode_spans(blob(75), DIFF_ID, table(**changes))


def with_field(number: int, value: object) -> bytes:
    fields = msgpack.unpackb(encode_spans(blob(75), DIFF_ID, table()))
    fields[number] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    "codecs",
    [
        [["raw", "", b""], ["zstd", "aes-256-gcm", b"nonce"]],
        [["raw", "", b""], ["zstd", "aes-256-gcm", b""]],
        [["raw", "", b""], ["zstd", "", b"parameters"]],
        [["raw", "", b""], ["lzma", "", b""]],
    ],
)
def test_unknown_codecs_and_seals_are_said_to_be_unsupported(codecs: list[object]) -> None:
    with pytest.raises(UnsupportedFormat):
        decode_spans(with_field(9, codecs))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, "not a media type"),
        (1, "sha256:00"),
        (1, "md5:" + "0" * 32),
        (2, -1),
        (2, 1 << 60),
        (3, "sha256:" + "0" * 63 + "G"),
        (4, 1 << 40),
        (9, [["raw", ""], ["zstd", "", b""]]),
        (9, [["raw", "", b""], b"zstd"]),
        (9, 7),
    ],
)
def test_malformed_fields_are_refused(field: int, value: object) -> None:
    with pytest.raises(IntegrityError):
        decode_spans(with_field(field, value))


GZIP = gzip_layer().device
WINDOWS = windows()


def gzip_section(**changes: object) -> bytes:
    return encode_spans(GZIP.blob, GZIP.diff_id, replace(GZIP.spans, **changes), WINDOWS)  # type: ignore[arg-type] # changes are checked by the test that makes them


def test_stretches_keep_their_bits_and_windows() -> None:
    device = decode_spans(gzip_section(), WINDOWS)
    assert [span.carry for span in device.spans] == [0, 0b1101, 0]
    assert device.windows is WINDOWS
    assert device.spans[1].codec == Codec("deflate", parameters=WINDOWS.key.raw)
    assert decode_spans(gzip_section(carries=b""), WINDOWS).key != device.key


@pytest.mark.parametrize("carries", [bytes(3), bytes([0, 1, 0]), bytes([2, 2]), bytes([0, 13, 0, 0])])
def test_bits_before_a_span_have_one_form(carries: bytes) -> None:
    with pytest.raises(IntegrityError, match="bits before"):
        gzip_section(carries=carries)


def test_only_stretches_have_bits_before_them() -> None:
    with pytest.raises(IntegrityError, match="bits before"):
        encode_spans(blob(75), DIFF_ID, table(carries=bytes([0, 2, 0])))


def test_stretches_have_exactly_the_windows_that_they_name() -> None:
    data = gzip_section()
    other = decode_spans(encode_spans(WINDOWS.blob, DIFF_ID, WINDOWS.spans))
    native = encode_spans(blob(75), DIFF_ID, table())
    for section, theirs in ((data, None), (data, other), (data, GZIP), (native, WINDOWS)):
        with pytest.raises(IntegrityError, match="windows"):
            decode_spans(section, theirs)


def test_windows_are_as_many_as_the_stretches() -> None:
    spans = WINDOWS.spans
    fewer = replace(
        spans,
        starts=spans.starts[:2],
        stored_offsets=spans.stored_offsets[:1],
        stored_lengths=spans.stored_lengths[:1],
        digests=spans.digests[:32],
    )
    short = decode_spans(encode_spans(WINDOWS.blob, DIFF_ID, fewer))
    codecs = (Codec("deflate", parameters=short.key.raw),)
    with pytest.raises(IntegrityError, match="windows"):
        encode_spans(GZIP.blob, GZIP.diff_id, replace(GZIP.spans, codecs=codecs), short)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_mutated_stretches_are_refused_or_canonical(data: st.DataObject) -> None:
    mutated = mutate(gzip_section(), data)
    try:
        device = decode_spans(mutated, WINDOWS)
    except (IntegrityError, UnsupportedFormat):
        return
    assert encode_spans(device.blob, device.diff_id, device.spans, WINDOWS) == mutated


def test_devices_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_spans, "MAX_DEVICE_SIZE", 75)
    data = encode_spans(blob(75), DIFF_ID, table())
    assert decode_spans(data).spans.size == 60
    monkeypatch.setattr(wire_spans, "MAX_DEVICE_SIZE", 59)
    with pytest.raises(IntegrityError):
        encode_spans(blob(55), DIFF_ID, table(stored_offsets=array("q", [0, 10, 25])))


def test_the_key_names_the_blob() -> None:
    """Equal spans of two blobs must never share a cache entry."""
    one = decode_spans(encode_spans(blob(75), DIFF_ID, table()))
    other = decode_spans(encode_spans(blob(76), DIFF_ID, table()))
    assert one.key != other.key
