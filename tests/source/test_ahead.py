"""The first bytes of a blob, asked for ahead: the same bytes, one request, and the source when it fails."""

import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from veneer.cli.status import ASKED_AHEAD
from veneer.errors import IntegrityError, Unavailable
from veneer.source import ahead
from veneer.source.ahead import AheadBlob

DATA = bytes(range(256)) * 40


class Blob:
    """A source that gives a few bytes at a time, as far as it is let, and notes what was asked."""

    name, size = "host/blob", len(DATA)

    def __init__(self, let: int = len(DATA)) -> None:
        self.asked: list[tuple[int, int]] = []
        self.let = let
        self.more = trio.Event()
        self.fails = False

    async def read(self, offset: int, length: int) -> bytes:
        async with self.stream(offset, length) as chunks:
            return b"".join([chunk async for chunk in chunks])

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        self.asked.append((offset, self.size - offset if length is None else length))
        async with aclosing(self._chunks(offset, offset + self.asked[-1][1])) as chunks:
            yield chunks

    async def _chunks(self, offset: int, end: int) -> AsyncGenerator[bytes, None]:
        while offset < end:
            if offset >= self.let:
                if self.fails:
                    await trio.testing.wait_all_tasks_blocked()
                    self.fails = False
                    self.let = self.size
                    raise Unavailable("gone")
                await self.more.wait()
            await trio.lowlevel.checkpoint()
            yield DATA[offset : min(offset + 777, end)]
            offset += 777


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "AHEAD", 8_000)


async def test_reads_are_served_by_the_one_request_that_is_under_way() -> None:
    blob = Blob(let=3_000)
    front = AheadBlob(blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(front.fetch)
        assert await front.read(100, 2_000) == DATA[100:2_100], "before the rest has come"
        blob.let = len(DATA)
        blob.more.set()
        assert await front.read(2_100, 5_900) == DATA[2_100:8_000]
        assert await front.read(0, 100) == DATA[:100]
    assert blob.asked == [(0, 8_000)]
    assert await front.read(8_000, 100) == DATA[8_000:8_100]
    assert blob.asked[1:] == [(8_000, 100)], "what is not ahead is asked for"


async def test_what_was_read_is_asked_for_when_it_is_read_again() -> None:
    """Who reads twice had wrong bytes, which would be the same again."""
    blob = Blob()
    front = AheadBlob(blob)
    await front.fetch()
    assert await front.read(0, 500) == await front.read(0, 500) == DATA[:500]
    assert await front.read(400, 200) == DATA[400:600], "a part of it, too"
    assert blob.asked == [(0, 8_000), (0, 500), (400, 200)]


async def test_a_failure_ahead_costs_a_request() -> None:
    blob = Blob(let=2_000)
    blob.fails = True
    front = AheadBlob(blob)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(front.fetch)
            assert await front.read(0, 5_000) == DATA[:5_000], "whoever waits is told"
    (_, first), (second, rest) = blob.asked
    assert first == 8_000
    assert second + rest == 5_000, "only what had not come"


async def test_what_has_been_read_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 << 20
    monkeypatch.setattr(ahead, "AHEAD", size)

    class Large(Blob):
        size = 5 << 20

        async def _chunks(self, offset: int, end: int) -> AsyncGenerator[bytes, None]:
            for _ in range(offset, end, 1 << 20):
                await trio.lowlevel.checkpoint()
                yield bytes(1 << 20)

    front = AheadBlob(Large())
    tracemalloc.start()
    try:
        async with front.stream(0, size // 2) as slow:
            await front.fetch()
            for place in range(size // 2, size, 1 << 20):
                assert len(await front.read(place, 1 << 20)) == 1 << 20
            assert sum([len(chunk) async for chunk in slow]) == size // 2
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    async with trio.open_nursery() as nursery:
        front = AheadBlob(blob := Large())
        nursery.start_soon(front.fetch)
        async with front.stream(0, size // 2) as slow:
            first = await anext(slow)
            await front.read(size // 2, size // 2)
            assert len(first) + sum([len(chunk) async for chunk in slow]) == size // 2
    assert len(blob.asked) == 1, "nothing is forgotten before it is read"


@given(cuts=st.lists(st.integers(1, len(DATA) - 1), max_size=8, unique=True).map(sorted))
def test_every_range_has_its_bytes(cuts: list[int]) -> None:
    async def check() -> None:
        front = AheadBlob(Blob())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(front.fetch)
            for start, end in zip([0, *cuts], [*cuts, len(DATA)], strict=True):
                assert await front.read(start, end - start) == DATA[start:end]

    trio.run(check)


async def test_what_is_not_where_it_should_be_is_an_error() -> None:
    """Whoever waits for it must not wait for ever."""
    front = AheadBlob(Blob())
    await front.fetch()
    front._ends[1] += 777
    with pytest.raises(IntegrityError, match="no byte at 1000"):
        await front.read(1_000, 500)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
async def test_a_source_that_gives_too_little_or_too_much_is_an_error(size: int) -> None:
    class Wrong(Blob):
        async def _chunks(self, offset: int, end: int) -> AsyncGenerator[bytes, None]:
            await trio.lowlevel.checkpoint()
            yield bytes(size)

    with pytest.raises(IntegrityError, match=f"of {len(DATA)} bytes at 0"):
        await AheadBlob(Wrong()).read(0, len(DATA))


def test_its_times_are_not_taken_for_those_of_the_source() -> None:
    assert AheadBlob(Blob()).name == ASKED_AHEAD + Blob.name
