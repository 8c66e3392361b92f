"""Compressed layers by plain offset: right in any order, and cheap once a decompressor has passed."""

import gzip
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest
import zstandard

from veneer.errors import IntegrityError, Unavailable
from veneer.formats import replayed
from veneer.formats.replayed import ReplayedBlob

DICE = random.Random(5)
PLAIN = b"".join(DICE.choice((b"abc" * 700, DICE.randbytes(1500))) for _ in range(6000))
MIB = 1 << 20
STORED = {
    "gzip": gzip.compress(PLAIN, 6),
    "members": b"".join(gzip.compress(PLAIN[at : at + 70_000], 1) for at in range(0, len(PLAIN), 70_000)),
    "zstd": zstandard.compress(PLAIN),
}


class Blob:
    """Bytes in memory, and which of them were asked for."""

    name = "registry.test/app@sha256:12"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.asked = 0
        self.failing = False

    async def read(self, offset: int, length: int) -> bytes:
        if self.failing:
            raise Unavailable("gone")
        self.asked += length
        return self.data[offset : offset + length]

    def stream(
        self, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        raise AssertionError("ranges only")


@pytest.mark.parametrize("form", list(STORED))
async def test_any_range_in_any_order(form: str) -> None:
    blob = Blob(STORED[form])
    plain = ReplayedBlob(blob, "zstd" if form == "zstd" else "gzip", len(PLAIN))
    dice = random.Random(1)
    for _ in range(12):
        offset = dice.randrange(len(PLAIN))
        length = dice.choice((0, 1, 5000, 2 * MIB, len(PLAIN)))
        expected = PLAIN[offset : offset + length]
        assert await plain.read(offset, len(expected)) == expected
    async with plain.stream(5, len(PLAIN) - 9) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == PLAIN[5:-4]


@pytest.mark.parametrize("form", ["gzip", "members"])
async def test_what_was_passed_once_is_read_again_from_near(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_LEAST_SPACING", 64 << 10)
    monkeypatch.setattr(replayed, "_FIRST_STEP", 64 << 10)
    blob = Blob(STORED[form])
    plain = ReplayedBlob(blob, "gzip", len(PLAIN))
    assert await plain.read(0, len(PLAIN)) == PLAIN
    assert blob.asked == blob.size
    dice = random.Random(2)
    for _ in range(20):
        blob.asked = 0
        offset = dice.randrange(len(PLAIN) - 1000)
        assert await plain.read(offset, 1000) == PLAIN[offset : offset + 1000]
        assert blob.asked < blob.size / 10


async def test_reading_on_goes_on() -> None:
    blob = Blob(STORED["zstd"])
    plain = ReplayedBlob(blob, "zstd", len(PLAIN))
    for offset in range(0, len(PLAIN), MIB):
        expected = PLAIN[offset : offset + MIB]
        assert await plain.read(offset, len(expected)) == expected
    assert blob.asked == blob.size


@pytest.mark.parametrize("form", ["gzip", "zstd"])
async def test_an_error_is_not_remembered(form: str) -> None:
    blob = Blob(STORED[form])
    plain = ReplayedBlob(blob, form, len(PLAIN))
    assert await plain.read(0, MIB) == PLAIN[:MIB]
    blob.failing = True
    with pytest.raises(Unavailable):
        await plain.read(len(PLAIN) - MIB, MIB)
    blob.failing = False
    assert await plain.read(len(PLAIN) - MIB, MIB) == PLAIN[-MIB:]


@pytest.mark.parametrize("form", ["gzip", "zstd"])
async def test_more_than_there_is_and_damage_are_errors(form: str) -> None:
    plain = ReplayedBlob(Blob(STORED[form]), form, len(PLAIN) + 1)
    with pytest.raises(IntegrityError, match="has only"):
        await plain.read(len(PLAIN), 1)
    with pytest.raises(IntegrityError, match="outside"):
        await plain.read(len(PLAIN), 2)
    damaged = bytearray(STORED[form])
    damaged[0] ^= 255
    with pytest.raises(IntegrityError, match="malformed"):
        await ReplayedBlob(Blob(bytes(damaged)), form, len(PLAIN)).read(0, 10)
