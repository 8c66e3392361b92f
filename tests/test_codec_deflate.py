"""Stretches of gzip streams decode to exactly their bytes from any bit on, or not at all."""

import gzip
import hashlib
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.codec import check_and_decode, decode
from veneer.codec.deflate import decode_stretch
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import DEFLATE, WINDOW_SIZE, Codec, Span, pack_carry

WORDS = (b"checkpoint ", b"window ", b"stretch ", b"of a stream, ", b"\n", b"0123456789")


def text(seed: int, length: int) -> bytes:
    rng = random.Random(seed)
    return b"".join(rng.choice(WORDS) for _ in range(length // 5 + 1))[:length]


WINDOW = text(0, WINDOW_SIZE)
PLAIN = text(1, 5000)
#: One member whose plain bytes are "more", and nothing.
MORE, NOTHING = gzip.compress(b"more"), gzip.compress(b"")
CODEC = Codec(DEFLATE, parameters=bytes(32))


def deflated(plain: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """A raw stream that refers to the window."""
    stream = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy, WINDOW)
    return stream.compress(plain) + stream.flush()


def from_bit(raw: bytes, count: int) -> tuple[bytes, int]:
    """The same stream when its first ``count`` bits are the last ones of the byte before: the rest, and the
    carry."""
    bits = int.from_bytes(raw, "little")
    return (bits >> count).to_bytes(len(raw), "little"), pack_carry(count, bits & ~(-1 << count))


def stretch(stored: bytes, length: int = len(PLAIN), carry: int = 0, window: bytes = WINDOW) -> bytes:
    return decode_stretch(stored, length, carry, window, "span 7")


streams = st.builds(
    lambda seed, length, level, strategy: (text(seed, length), level, strategy),
    st.integers(0, 1000),
    st.integers(1, 20_000),
    st.integers(1, 9),
    st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE]),
)


@given(streams, st.integers(0, 7))
@settings(deadline=None)
def test_streams_can_be_entered_at_every_bit(stream: tuple[bytes, int, int], count: int) -> None:
    plain, level, strategy = stream
    stored, carry = from_bit(deflated(plain, level, strategy), count)
    assert stretch(stored, len(plain), carry) == plain
    assert stretch(memoryview(b"-" + stored)[1:], len(plain), carry) == plain  # type: ignore[arg-type] # a view


@pytest.mark.parametrize("count", range(8))
def test_stored_blocks_keep_their_place(count: int) -> None:
    """They are aligned to bytes: bits of a fixed block, ``count`` of them in the byte before, then the
    alignment."""
    # An empty fixed block of 10 bits; its last ones begin the stretch, as the header of a stored block does.
    body = len(PLAIN).to_bytes(2, "little") + (0xFFFF ^ len(PLAIN)).to_bytes(2, "little") + PLAIN
    header = 1  # final, stored: 3 bits, the first one set
    if count >= 3:
        assert stretch(body, carry=pack_carry(count, header)) == PLAIN
    else:
        assert (
            stretch(bytes([header >> count]) + body, carry=pack_carry(count, header & ~(-1 << count))) == PLAIN
        )


@given(st.lists(st.sampled_from([b"", b"a", text(3, 900), text(4, 40_000)]), max_size=6), st.data())
@settings(deadline=None)
def test_members_may_end_and_begin_inside(members: list[bytes], data: st.DataObject) -> None:
    stored = deflated(PLAIN) + bytes(8) + b"".join(map(gzip.compress, members))
    plain = PLAIN + b"".join(members)
    assert stretch(stored, len(plain)) == plain
    length = data.draw(st.integers(1, len(plain) + 5).filter(lambda length: length != len(plain)))
    with pytest.raises(IntegrityError, match="span 7"):
        stretch(stored, length)


def test_headers_of_members_may_have_everything() -> None:
    """Extra field, name, comment and checksum of the header, of every length about the size of an input."""
    body = gzip.compress(b"more")[10:]
    for length in (0, 1, 4090, 4096, 65_530):
        extra = length.to_bytes(2, "little") + bytes(length)
        header = b"\x1f\x8b\x08\x1e" + bytes(6) + extra + b"n" * length + b"\0" + b"c" * length + b"\0" + b"12"
        stored = deflated(PLAIN) + bytes(8) + header + body + header + body
        assert stretch(stored, len(PLAIN) + 8) == PLAIN + b"moremore"
        assert stretch(stored[: -len(body) - 1], len(PLAIN) + 4) == PLAIN + b"more"


def test_the_last_member_may_go_on_after_the_stretch() -> None:
    tail = gzip.compress(text(9, 50_000), mtime=0)
    plain = zlib.decompressobj(31).decompress(tail[: len(tail) // 2])
    assert stretch(deflated(PLAIN) + bytes(8) + tail[: len(tail) // 2], len(PLAIN + plain)) == PLAIN + plain


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(deflated(PLAIN)[:-200], id="ends early"),
        pytest.param(deflated(PLAIN + b"!"), id="goes on"),
        pytest.param(deflated(PLAIN) + bytes(8) + MORE, id="another member with bytes"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x07" + deflated(PLAIN), id="a block of no type"),
        pytest.param(gzip.compress(PLAIN), id="a member with its header"),
    ],
)
def test_more_less_or_other_bytes_are_refused(stored: bytes) -> None:
    with pytest.raises(IntegrityError, match="span 7"):
        stretch(stored)


def test_what_follows_a_member_is_a_member() -> None:
    assert stretch(deflated(PLAIN) + bytes(8) + NOTHING * 3) == PLAIN
    with pytest.raises(IntegrityError, match="invalid gzip"):
        stretch(deflated(PLAIN) + bytes(8) + b"neither a member nor the end")


@pytest.mark.parametrize("window", [b"", WINDOW[1:], WINDOW + b"!"])
def test_a_window_has_its_size(window: bytes) -> None:
    with pytest.raises(IntegrityError, match="window"):
        stretch(deflated(PLAIN), window=window)


def test_many_short_members_are_cheap() -> None:
    """Each end of a member copies what follows it, unless that is bounded: a gigabyte here."""
    stored = deflated(PLAIN) + bytes(8) + NOTHING * 10_000 + MORE
    assert stretch(stored, len(PLAIN) + 4) == PLAIN + b"more"


def test_bombs_are_refused() -> None:
    with pytest.raises(IntegrityError):
        stretch(deflated(bytes(64 << 20)), 1000)


def test_stored_bytes_are_hashed_before_they_are_decoded() -> None:
    stored, carry = from_bit(deflated(PLAIN), 5)
    span = Span(7, 0, len(PLAIN), 10, len(stored), CODEC, hashlib.sha256(stored).digest(), carry)
    assert check_and_decode(span, stored, "span 7", WINDOW) == PLAIN
    with pytest.raises(IntegrityError, match="expected sha256"):
        check_and_decode(span, stored[:-1] + b"!", "span 7", WINDOW)


def test_a_stretch_cannot_be_decoded_without_its_window() -> None:
    stored = deflated(PLAIN)
    span = Span(7, 0, len(PLAIN), 10, len(stored), CODEC, hashlib.sha256(stored).digest())
    with pytest.raises(IntegrityError, match="window"):
        check_and_decode(span, stored, "span 7")
    with pytest.raises(UnsupportedFormat):
        decode(CODEC, stored, len(PLAIN), "span 7")
