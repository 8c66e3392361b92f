"""A blob over several connections: its bytes once each and in order, whatever the registry can do."""

import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from veneer.errors import RegistryError, Unavailable
from veneer.source import parallel
from veneer.source.parallel import open_download

PART = 1000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PART_SIZE", PART)


class Blob:
    """Bytes that come when they like, from a server with ranges or without."""

    name = "registry.test/app@sha256:12"

    def __init__(self, size: int, dice: random.Random, *, ranges: bool = True) -> None:
        self.data = dice.randbytes(size)
        self.size = size
        self.asked: list[tuple[int, int | None]] = []
        self.failing: RegistryError | None = None
        self._dice = dice
        self._ranges = ranges

    async def read(self, offset: int, length: int) -> bytes:
        raise AssertionError("streams only")

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        self.asked.append((offset, length))

        async def chunks() -> AsyncIterator[bytes]:
            place, end = offset, self.size if length is None else offset + length
            await trio.sleep(self._dice.random() * 3)
            if not self._ranges and length is not None:
                raise RegistryError("no ranges", status=200)
            while place < end:
                step = min(self._dice.randint(1, 700), end - place)
                yield self.data[place : place + step]
                place += step
                await trio.sleep(self._dice.random() * self._dice.choice((0.01, 1)))
                if self.failing and place > self.size // 2:
                    raise self.failing

        async with aclosing(chunks()) as stream:  # type: ignore[type-var] # a generator
            yield stream


async def drain(blob: Blob) -> None:
    async with open_download(blob) as download:
        while await download.take():
            pass


@pytest.mark.parametrize("ranges", [True, False])
def test_every_byte_comes_once_in_order_and_few_are_held(ranges: bool) -> None:
    async def take(seed: int) -> None:
        dice = random.Random(seed)
        blob = Blob(dice.choice((0, 1, PART - 1, PART, PART + 1, 5 * PART, 33_333)), dice, ranges=ranges)
        out = b""
        async with open_download(blob) as download:
            while chunks := await download.take():
                out += b"".join(chunks)
                await trio.lowlevel.checkpoint()
                assert download.received - len(out) <= 6 * PART
                await trio.sleep(dice.random() * dice.choice((0, 0.5)))
        assert out == blob.data

    for seed in range(60):
        trio.run(take, seed, clock=MockClock(autojump_threshold=0))


def test_a_server_with_ranges_is_asked_for_each_part_once() -> None:
    async def take() -> None:
        blob = Blob(20 * PART, random.Random(0))
        await drain(blob)
        blob.asked.remove((0, None))
        offsets = {offset for offset, _ in blob.asked}
        assert len(offsets) == len(blob.asked) > 5
        assert all(length == PART for _, length in blob.asked)

    trio.run(take, clock=MockClock(autojump_threshold=0))


def test_a_small_blob_is_one_request() -> None:
    async def take() -> None:
        blob = Blob(3 * PART, random.Random(0))
        await drain(blob)
        assert blob.asked == [(0, None)]

    trio.run(take, clock=MockClock(autojump_threshold=0))


def test_an_error_of_the_blob_is_told_to_whoever_takes() -> None:
    async def take() -> None:
        blob = Blob(20 * PART, random.Random(0))
        blob.failing = Unavailable("gone")
        with pytest.raises(Unavailable, match="gone"):
            await drain(blob)

    trio.run(take, clock=MockClock(autojump_threshold=0))
