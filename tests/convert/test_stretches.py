"""Checkpoints of gzip streams: every span decodes alone, to what the stream holds there."""

import gzip
import hashlib
import io
import random
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.codec import check_and_decode, decode
from veneer.convert.checkpoints import IndexingGunzip
from veneer.convert.stretches import Stretches
from veneer.convert.work import BlobFile
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import DEFLATE, WINDOW_SIZE, Device
from veneer.index.wire import decode_spans, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_GZIP, VENEER_WINDOWS

SPACING = 32 << 10


def text(seed: int, length: int) -> bytes:
    rng = random.Random(seed)
    return b" ".join(
        rng.choice((b"alpha", b"beta", b"%d" % rng.getrandbits(40))) for _ in range(length // 8 + 1)
    )[:length]


TEXT, NOISE = text(1, 400_000), random.Random(2).randbytes(150_000)
PIECES = (b"", b"x", TEXT, TEXT[:70_000], NOISE, bytes(300_000), NOISE[:40_000] + TEXT[:40_000] + NOISE[:9])


def cut(stored: bytes, directory: Path) -> tuple[Device, bytes, bytes]:
    """The device of a gzip stream, the blob with its windows, and its plain bytes as its spans have them."""
    with (
        IndexingGunzip(io.BytesIO(stored), "layer", spacing=SPACING) as gunzip,
        tempfile.TemporaryFile() as exported,
        BlobFile(directory / "windows", VENEER_WINDOWS) as windows,
    ):
        read = b"".join(gunzip.pieces())
        stretches = Stretches(io.BytesIO(stored), gunzip.export(exported), windows, "layer")
        plain = b"".join(stretches.pieces())
        assert plain == read
        device = stretches.device(Descriptor(OCI_LAYER_GZIP, Digest.of(stored), len(stored)), Digest.of(plain))
    return device, (directory / "windows").read_bytes(), plain


def windows_of(device: Device, blob: bytes) -> bytes:
    if device.windows is None:
        return b""
    device.windows.blob.digest.check(blob, "windows")
    spans = device.windows.spans
    stored = (blob[span.stored_offset : span.stored_offset + span.stored_length] for span in spans)
    return b"".join(
        decode(span.codec, data, span.length, "windows") for span, data in zip(spans, stored, strict=True)
    )


def decoded(device: Device, stored: bytes, windows: bytes) -> Iterator[bytes]:
    for span in device.spans:
        data = stored[span.stored_offset : span.stored_offset + span.stored_length]
        window = windows[span.number * WINDOW_SIZE :][:WINDOW_SIZE]
        yield check_and_decode(span, data, f"span {span.number}", window)


members = st.lists(
    st.tuples(st.sampled_from(PIECES), st.integers(0, 9), st.sampled_from([0, zlib.Z_FIXED])),
    min_size=1,
    max_size=4,
)


def member(plain: bytes, level: int, strategy: int) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, 31, 8, strategy)
    return stream.compress(plain) + stream.flush()


@given(members)
@settings(deadline=None, max_examples=25)
def test_every_span_decodes_alone(parts: list[tuple[bytes, int, int]]) -> None:
    stored = b"".join(member(*part) for part in parts)
    with tempfile.TemporaryDirectory() as directory:
        device, blob, plain = cut(stored, Path(directory))
    assert plain == b"".join(part[0] for part in parts)
    assert b"".join(decoded(device, stored, windows_of(device, blob))) == plain
    again = decode_spans(
        encode_spans(device.blob, device.diff_id, device.spans, device.windows), device.windows
    )
    assert again.key == device.key
    assert list(again.spans) == list(device.spans)


def test_streams_are_cut_at_all_bits_and_windows_are_small(tmp_path: Path) -> None:
    plain = text(5, 6_000_000)
    device, blob, _ = cut(gzip.compress(plain, 6), tmp_path)
    lengths = [span.length for span in device.spans]
    assert max(lengths) < 6 * SPACING
    assert min(lengths[:-1]) >= SPACING // 2
    counts = {span.carry.bit_length() - 1 if span.carry else 0 for span in device.spans}
    assert counts == set(range(8))
    assert {codec.name for codec in device.spans.codecs} == {DEFLATE}
    # What no span refers to is left out: whole windows of this text take 10,000 bytes.
    assert len(blob) < len(device.spans) * 6_000


def test_a_wrong_window_or_carry_gives_an_error_or_is_not_there(tmp_path: Path) -> None:
    """The stored bytes alone do not say what they mean: both are covered by the key of the device."""
    stored = gzip.compress(TEXT)
    device, blob, _ = cut(stored, tmp_path)
    windows = bytearray(windows_of(device, blob))
    windows[WINDOW_SIZE:] = bytes(len(windows) - WINDOW_SIZE)
    with pytest.raises(IntegrityError):
        device.diff_id.check(b"".join(decoded(device, stored, bytes(windows))), "device")
    assert device.windows is not None
    other = Device(
        device.windows.blob,
        Digest.of(b"others"),
        device.windows.spans,
        Digest.of(encode_spans(device.windows.blob, Digest.of(b"others"), device.windows.spans)),
    )
    with pytest.raises(IntegrityError, match="windows"):
        encode_spans(device.blob, device.diff_id, device.spans, other)


@pytest.mark.parametrize(
    "stored", [b"", b"no gzip", gzip.compress(TEXT)[:-20], gzip.compress(TEXT) + b"garbage"]
)
def test_what_is_no_gzip_stream_is_refused(stored: bytes, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="layer"):
        cut(stored, tmp_path)


def test_a_stream_that_cannot_be_cut_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.convert.stretches.MAX_SPAN_LENGTH", 1000)
    with pytest.raises(UnsupportedFormat, match="cannot be cut") as caught:
        cut(gzip.compress(TEXT), tmp_path)
    assert caught.value.hint == "make a lazily loadable copy: veneer convert"


def test_an_empty_stream_has_no_spans(tmp_path: Path) -> None:
    device, blob, plain = cut(gzip.compress(b""), tmp_path)
    assert (len(device.spans), device.windows, blob, plain) == (0, None, b"", b"")
    assert hashlib.sha256(plain).digest() == device.diff_id.raw
