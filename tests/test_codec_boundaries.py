"""Checkpoints found while a stream is inflated: each can be entered, and finding them alters nothing."""

import gzip
import io
import random
import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.codec.boundaries import BoundaryFinder
from veneer.codec.deflate import Checkpoint
from veneer.errors import IntegrityError
from veneer.formats.decompress import gunzip

SPACING = 256 << 10


def program(seed: int, length: int) -> bytes:
    """Bytes about as common as those of programs are, with repetitions; the whole is repeated out of reach."""
    dice = random.Random(seed)
    common = dice.choices(range(256), [1 / (1 + number) for number in range(256)], k=200_000)
    some = bytearray(bytes(common))
    for _ in range(3000):
        source, target = dice.randrange(len(some) - 50), dice.randrange(len(some) - 50)
        some[target : target + 40] = some[source : source + 40]
    return bytes(some * (length // len(some) + 1))[:length]


PLAIN = program(1, 3_000_000)


def found_in(stored: bytes, spacing: int = SPACING, most: int = 1 << 20) -> tuple[bytes, list[Checkpoint]]:
    """What comes out while checkpoints are looked for, and they."""
    points: list[Checkpoint] = []
    file = io.BytesIO(stored)
    pieces = gunzip(
        lambda size: file.read(min(size, most)), "a stream", finder=BoundaryFinder(spacing, points.append)
    )
    return b"".join(pieces), points


def from_point(stored: bytes, point: Checkpoint) -> bytes:
    file = io.BytesIO(stored)
    file.seek(point.stored_offset)
    return b"".join(gunzip(file.read, "a stream", start=point))


@pytest.mark.parametrize("level", [1, 6, 9])
def test_every_checkpoint_can_be_entered_and_they_are_as_far_apart_as_asked(level: int) -> None:
    stored = gzip.compress(PLAIN, level)
    plain, points = found_in(stored)
    assert plain == PLAIN
    offsets = [0, *(point.offset for point in points), len(PLAIN)]
    distances = [after - before for before, after in pairwise(offsets)]
    # A block has some 30 KB of this.
    assert all(SPACING <= distance < SPACING + 200_000 for distance in distances[:-1])
    assert len(points) >= 8
    for point in points:
        assert from_point(stored, point) == PLAIN[point.offset :]
    assert any(point.carry for point in points)


def test_members_are_entered_where_they_begin() -> None:
    stored = b"".join(gzip.compress(PLAIN[at : at + 50_000], 6) for at in range(0, len(PLAIN), 50_000))
    plain, points = found_in(stored)
    assert plain == PLAIN
    assert [(point.offset, point.window) for point in points[:9]] == [(300_000 * n, b"") for n in range(1, 10)]
    for point in points:
        assert from_point(stored, point) == PLAIN[point.offset :]


def test_what_has_no_headers_is_given_up_soon_and_comes_out_right() -> None:
    noise = random.Random(2).randbytes(4_000_000)
    for plain in (noise, bytes(4_000_000)):
        assert found_in(gzip.compress(plain, 6)) == (plain, [])


@given(
    st.integers(0, 1000),
    st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE]),
    st.integers(1, 9),
    st.sampled_from([1, 7, 39, 40, 41, 1000, 1 << 20]),
    st.integers(4_000, 60_000),
)
@settings(deadline=None, max_examples=25)
def test_no_stream_comes_out_otherwise_than_it_does_without(
    seed: int, strategy: int, level: int, most: int, spacing: int
) -> None:
    plain = PLAIN[seed : seed + 40_000] + bytes(seed) + random.Random(seed).randbytes(seed)
    stream = zlib.compressobj(level, zlib.DEFLATED, 31, 8, strategy)
    stored = stream.compress(plain) + stream.flush()
    stored += gzip.compress(plain)
    out, points = found_in(stored, spacing, most)
    assert out == plain * 2
    for point in points:
        assert from_point(stored, point) == out[point.offset :]


def test_damage_is_an_error_as_it_is_without() -> None:
    stored = bytearray(gzip.compress(PLAIN, 6))
    for end in range(len(stored) // 2, len(stored), 300_000):
        with pytest.raises(IntegrityError, match="ends early"):
            found_in(bytes(stored[:end]))
    stored[len(stored) // 2 : len(stored) // 2 + 200] = b"\xff" * 200
    with pytest.raises(IntegrityError, match="malformed"):
        found_in(bytes(stored))
