"""Compressed streams from strangers: whole ones in bounded pieces, everything else refused."""

import gzip
import io
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.formats import decompress
from veneer.formats.decompress import PIECE_SIZE, plain_pieces

SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
TEXT = b"".join(b"%d " % number for number in range(20_000))


def unpack(stored: bytes, compression: str) -> bytes:
    return b"".join(plain_pieces(io.BytesIO(stored).read, compression, "layer x"))


def zstd(plain: bytes, *, stated: bool = True, checksum: bool = False) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=stated, write_checksum=checksum)
    if stated:
        return compressor.compress(plain)
    stream = compressor.compressobj()
    return stream.compress(plain) + stream.flush()


FRAMES: dict[str, list[Callable[[bytes], bytes]]] = {
    "gzip": [gzip.compress, lambda plain: gzip.compress(plain, 0), lambda plain: gzip.compress(plain, mtime=0)],
    "zstd": [
        zstd,
        lambda plain: zstd(plain, stated=False),
        lambda plain: zstd(plain, checksum=True),
        lambda plain: SKIPPABLE + zstd(plain) + SKIPPABLE,
    ],
}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(("gzip", "zstd")),
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from((b"", b"a", TEXT, bytes(3_000_000)))),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_several_members_are_one_stream_and_half_of_one_is_none(
    compression: str, members: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    writers = FRAMES[compression]
    parts = [writers[which % len(writers)](plain) for which, plain in members]
    stored = b"".join(parts)
    assert unpack(stored, compression) == b"".join(plain for _, plain in members)
    last = len(parts[-1]) - (len(SKIPPABLE) if parts[-1].endswith(SKIPPABLE) else 0)
    missing = data.draw(st.integers(1, last - (len(SKIPPABLE) if parts[-1].startswith(SKIPPABLE) else 0) - 1))
    with pytest.raises(IntegrityError):
        unpack(b"".join(parts[:-1]) + parts[-1][:last][:-missing], compression)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize(
    "garbage", [b"\0", b"x", bytes(4), b"(\xb5", b"\x1f", b"\x1f\x8b", b"more than a header" * 50]
)
def test_what_follows_the_last_member_is_refused(compression: str, garbage: bytes) -> None:
    stored = FRAMES[compression][0](TEXT)
    with pytest.raises(IntegrityError, match="layer x"):
        unpack(stored + garbage, compression)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_flipped_bits_and_emptiness_are_refused(compression: str) -> None:
    stored = bytearray(FRAMES[compression][0](TEXT))
    stored[0] ^= 1
    for bad in (bytes(stored), b""):
        with pytest.raises(IntegrityError, match="layer x"):
            unpack(bad, compression)


@pytest.mark.parametrize("step", [1, 7, 128 << 10])
def test_headers_of_members_may_have_names_and_comments(step: int) -> None:
    """RFC 1952: extra field, name, comment and checksum of the header, in this order."""
    deflated = zlib.compress(b"text", wbits=-15)
    end = zlib.crc32(b"text").to_bytes(4, "little") + (4).to_bytes(4, "little")
    extra, texts = b"\x05\0ab\0cd", b"n" * 9_000 + b"\0" + b"comment\0"
    member = b"\x1f\x8b\x08\x1e" + bytes(6) + extra + texts + b"cc" + deflated + end
    stored = io.BytesIO(3 * member)
    assert b"".join(plain_pieces(lambda size: stored.read(min(size, step)), "gzip", "layer x")) == b"text" * 3
    for cut in (12, 20, 9_020, 9_027, len(member) - len(deflated) - len(end) - 1):
        with pytest.raises(IntegrityError, match="ends early"):
            unpack(member[:cut], "gzip")
    endless = b"\x1f\x8b\x08\x10" + bytes(6) + b"c" * (64 << 10) + b"\0" + deflated + end
    with pytest.raises(IntegrityError, match="a header of more than"):
        unpack(endless, "gzip")


def test_a_member_is_as_long_as_it_says() -> None:
    stored = gzip.compress(TEXT)
    lying = stored[:-4] + (len(TEXT) + 1).to_bytes(4, "little")
    for members in (lying, lying + stored, stored + lying):
        with pytest.raises(IntegrityError, match="not as long as it says"):
            unpack(members, "gzip")


def test_plain_layers_pass_through_and_unknown_ones_do_not() -> None:
    assert unpack(TEXT, "none") == TEXT
    with pytest.raises(UnsupportedFormat):
        unpack(TEXT, "lzma")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_is_read_no_faster_than_its_pieces_are_taken(compression: str) -> None:
    if compression == "gzip":
        compressor = zlib.compressobj(9, wbits=31)
        stored = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(200)) + compressor.flush()
    else:
        stored = zstd(bytes(200 << 20))
    source = io.BytesIO(stored)
    pieces = plain_pieces(source.read, compression, "layer x")
    taken = [next(pieces) for _ in range(5)]
    assert all(0 < len(piece) <= PIECE_SIZE for piece in taken)
    assert source.tell() <= 128 << 10
    assert sum(len(piece) for piece in pieces) + sum(map(len, taken)) == 200 << 20


def test_more_than_any_layer_may_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "MAX_PLAIN_SIZE", 1_000_000)
    with pytest.raises(IntegrityError, match="expands to more than"):
        unpack(gzip.compress(bytes(2_000_000)), "gzip")


def test_a_window_that_would_take_all_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stored = stream.compress(TEXT) + stream.flush()
    with pytest.raises(IntegrityError, match="malformed zstd"):
        unpack(stored, "zstd")
