"""Compressed layers by plain offset: right in any order, and cheap once a decompressor has passed."""

import gzip
import io
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest
import zstandard

from tests.test_codec_boundaries import program
from veneer.codec.boundaries import BoundaryFinder
from veneer.errors import IntegrityError, Unavailable
from veneer.formats import checkpoints
from veneer.formats.checkpoints import CheckpointFiles, CheckpointTable
from veneer.formats.decompress import gunzip
from veneer.formats.replayed import ReplayedBlob
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

PLAIN = program(5, 6_000_000)
MIB = 1 << 20
STORED = {
    "gzip": gzip.compress(PLAIN, 6),
    "members": b"".join(gzip.compress(PLAIN[at : at + 70_000], 1) for at in range(0, len(PLAIN), 70_000)),
    "zstd": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(3, window_log=15)
    ).compress(PLAIN),
}


class Blob:
    """Bytes in memory, and which of them were asked for."""

    name = "registry.test/app@sha256:12"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.asked = self.requests = 0
        self.failing = False

    async def read(self, offset: int, length: int) -> bytes:
        if self.failing:
            raise Unavailable("gone")
        self.asked += length
        self.requests += 1
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
    monkeypatch.setattr(checkpoints, "_SPACING", 64 << 10)
    blob = Blob(STORED[form])
    plain = ReplayedBlob(blob, "gzip", len(PLAIN))
    assert await plain.read(0, len(PLAIN)) == PLAIN
    assert blob.asked == blob.size
    dice = random.Random(2)
    for _ in range(20):
        blob.asked = blob.requests = 0
        offset = dice.randrange(len(PLAIN) - 800_000)
        assert await plain.read(offset, 1000) == PLAIN[offset : offset + 1000]
        assert blob.asked < blob.size / 10
        assert blob.requests == 1


async def test_kept_checkpoints_spare_the_way_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "_SPACING", 256 << 10)
    table = CheckpointTable()
    finder = BoundaryFinder(256 << 10, table.add)
    stored = io.BytesIO(STORED["gzip"])
    assert b"".join(gunzip(stored.read, "layer", finder=finder)) == PLAIN
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"x"), len(STORED["gzip"]))
    files = CheckpointFiles(tmp_path)
    files.save(layer, table)
    offset = len(PLAIN) - 2 * MIB
    for load, few in ((partial(files.load, layer), True), (CheckpointTable, False)):
        blob = Blob(STORED["gzip"])
        plain = ReplayedBlob(blob, "gzip", len(PLAIN), load)
        assert await plain.read(offset, 1000) == PLAIN[offset : offset + 1000]
        assert (blob.requests == 1 and blob.asked < blob.size / 10) is few
    # Damage of the file costs the file.
    (path,) = (tmp_path / "checkpoints").iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert (
        await ReplayedBlob(Blob(STORED["gzip"]), "gzip", len(PLAIN), partial(files.load, layer)).read(
            offset, 1000
        )
        == (PLAIN[offset : offset + 1000])
    )
    assert not path.exists()


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
