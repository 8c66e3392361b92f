"""Spans decode to exactly their bytes, or not at all."""

import gzip
import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.codec import check_and_decode, decode
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import Codec, Span

RAW, ZSTD, GZIP = Codec("raw"), Codec("zstd"), Codec("gzip")
PLAIN = b"the same words again and again, " * 100
SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"


def encode(codec: Codec, plain: bytes) -> bytes:
    if codec in (ZSTD, FRAMES):
        return zstandard.compress(plain)
    return gzip.compress(plain) if codec == GZIP else plain


def zstd_frame(plain: bytes, **parameters: bool | int) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(plain)  # type: ignore[arg-type] # mixed keyword types


codecs = pytest.mark.parametrize("codec", [RAW, ZSTD, GZIP], ids=lambda codec: codec.name)


@codecs
def test_stored_bytes_decode_to_the_plain_ones(codec: Codec) -> None:
    @given(st.binary(min_size=1, max_size=2000))
    @settings(deadline=None, max_examples=50)
    def holds(plain: bytes) -> None:
        stored = encode(codec, plain)
        assert decode(codec, stored, len(plain), "span") == plain
        assert decode(codec, memoryview(b"-" + stored)[1:], len(plain), "span") == plain

    holds()


@codecs
@pytest.mark.parametrize("difference", [-1, 1, -len(PLAIN)])
def test_another_length_than_promised_is_refused(codec: Codec, difference: int) -> None:
    with pytest.raises(IntegrityError, match="span 7"):
        decode(codec, encode(codec, PLAIN), len(PLAIN) + difference, "span 7")


@codecs
def test_missing_and_additional_bytes_are_refused(codec: Codec) -> None:
    stored = encode(codec, PLAIN)
    for cut in range(0, len(stored), 1 + len(stored) // 50):
        with pytest.raises(IntegrityError):
            decode(codec, stored[:cut], len(PLAIN), "span")
    for more in (b"\0", SKIPPABLE, stored):
        with pytest.raises(IntegrityError):
            decode(codec, stored + more, len(PLAIN), "span")


@pytest.mark.parametrize("codec", [ZSTD, GZIP], ids=lambda codec: codec.name)
def test_corrupt_bytes_decode_to_the_same_or_not_at_all(codec: Codec) -> None:
    """Some bits, such as those of gzip's time, mean nothing; no bit may change what is read."""
    stored = zstd_frame(PLAIN, write_checksum=True) if codec == ZSTD else encode(codec, PLAIN)
    for position in range(8 * len(stored)):
        corrupt = bytearray(stored)
        corrupt[position // 8] ^= 1 << position % 8
        try:
            assert decode(codec, bytes(corrupt), len(PLAIN), "span") == PLAIN
        except IntegrityError:
            continue


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(zstd_frame(PLAIN, write_content_size=False), id="content size not stated"),
        pytest.param(SKIPPABLE, id="skippable frame"),
        pytest.param(SKIPPABLE + zstd_frame(PLAIN), id="skippable frame before it"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x28\xb5\x2f\xfd", id="magic number only"),
        pytest.param(gzip.compress(PLAIN), id="gzip"),
    ],
)
def test_only_one_zstd_frame_of_known_size_will_do(stored: bytes) -> None:
    for length in (len(PLAIN), 4):
        with pytest.raises(IntegrityError):
            decode(ZSTD, stored, length, "span")


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    dictionary = zstandard.ZstdCompressionDict(b"words " * 50, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    trained = zstandard.train_dictionary(1024, [b"%d words %d" % (n, n * n) for n in range(2000)])
    assert trained.dict_id()
    with pytest.raises(IntegrityError, match="dictionary"):
        decode(ZSTD, zstandard.ZstdCompressor(dict_data=trained).compress(PLAIN), len(PLAIN), "span")
    raw = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"words words words")
    with pytest.raises(IntegrityError):
        decode(ZSTD, raw, 17, "span")


def test_a_frame_with_a_huge_window_is_refused() -> None:
    """A window descriptor of 2 GiB in a frame of 5 bytes; content size 300 as two bytes (300 - 256 = 44)."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x40, (31 - 10) << 3]) + (44).to_bytes(2, "little")
    frame += (300 << 3 | 2 | 1).to_bytes(3, "little") + b"a"  # last block: 300 times the same byte
    with pytest.raises(IntegrityError, match="window of 2147483648"):
        decode(ZSTD, frame, 300, "span")
    small = frame[:5] + bytes([(20 - 10) << 3]) + frame[6:]
    assert decode(ZSTD, small, 300, "span") == b"a" * 300


FRAMES = Codec("zstd-frames")


def test_frames_of_others_need_not_state_their_sizes() -> None:
    unsized, halves = zstd_frame(PLAIN, write_content_size=False), (PLAIN[:1000], PLAIN[1000:])
    split = zstd_frame(halves[0]) + SKIPPABLE + zstd_frame(halves[1], write_content_size=False)
    for stored in (unsized, split, SKIPPABLE + unsized, encode(ZSTD, PLAIN)):
        assert decode(FRAMES, stored, len(PLAIN), "span") == PLAIN
        assert decode(FRAMES, memoryview(b"-" + stored)[1:], len(PLAIN), "span") == PLAIN


@pytest.mark.parametrize("length", [1, len(PLAIN) - 1, len(PLAIN) + 1])
def test_frames_hold_exactly_what_is_promised(length: int) -> None:
    with pytest.raises(IntegrityError, match="exactly"):
        decode(FRAMES, zstd_frame(PLAIN, write_content_size=False), length, "span")


@pytest.mark.parametrize(
    "stored", [b"", b"\x28\xb5\x2f\xfd", SKIPPABLE, encode(GZIP, PLAIN), encode(ZSTD, PLAIN)[:-9]]
)
def test_other_bytes_are_no_frames(stored: bytes) -> None:
    with pytest.raises(IntegrityError, match="span"):
        decode(FRAMES, stored, len(PLAIN), "span")


@pytest.mark.parametrize("codec", [ZSTD, GZIP, FRAMES], ids=lambda codec: codec.name)
def test_bombs_are_refused(codec: Codec) -> None:
    bomb = encode(codec, bytes(64 << 20))
    with pytest.raises(IntegrityError):
        decode(codec, bomb, 1000, "span")


def test_deflate_and_zlib_streams_are_not_gzip() -> None:
    with pytest.raises(IntegrityError, match="invalid gzip"):
        decode(GZIP, zlib.compress(PLAIN), len(PLAIN), "span")


@pytest.mark.parametrize("codec", [Codec("lzma"), Codec(""), Codec("zstd", "aes-256-gcm")])
def test_unknown_codecs_and_seals_are_unsupported(codec: Codec) -> None:
    with pytest.raises(UnsupportedFormat, match="span 7"):
        decode(codec, PLAIN, len(PLAIN), "span 7")


def span(stored: bytes, codec: Codec = ZSTD) -> Span:
    return Span(7, 0, len(PLAIN), 0, len(stored), codec, hashlib.sha256(stored).digest())


def test_stored_bytes_are_hashed_before_they_are_decoded() -> None:
    stored = encode(ZSTD, PLAIN)
    assert check_and_decode(span(stored), memoryview(stored), "span") == PLAIN
    other = zstd_frame(PLAIN, level=19, write_checksum=True)
    with pytest.raises(IntegrityError, match="stored bytes, got"):
        check_and_decode(span(stored), other, "span")
    flipped = stored[:-1] + bytes([stored[-1] ^ 1])
    for codec in (ZSTD, Codec("lzma")):  # a decoder that looked at it would say something else
        with pytest.raises(IntegrityError, match=r"expected sha256:.*, got sha256:"):
            check_and_decode(span(stored, codec), flipped, "span")


def test_threads_do_not_disturb_each_other() -> None:
    plains = [bytes([number]) * 200_000 + PLAIN for number in range(4)]
    stored = [encode(ZSTD, plain) for plain in plains]

    def work(number: int) -> bool:
        return all(
            decode(ZSTD, stored[number], len(plains[number]), "span") == plains[number] for _ in range(50)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
