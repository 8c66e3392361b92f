"""A range that comes in pieces: what is whole is handed over, whatever becomes of the rest."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.store.rig import KIB, RAW, ScriptedSource, sample, store_settings
from veneer.errors import Unavailable
from veneer.store.spanstore import open_store


class PiecewiseSource(ScriptedSource):
    """Gives pieces of these lengths, in turn, and waits for ``pause_s`` before each.

    After ``stop`` bytes of a range nothing more comes. ``ended`` tells when ranges were given up or at an end.
    """

    def __init__(self, blob: bytes, lengths: Sequence[int], *, pause_s: float = 0, stop: int = 1 << 60) -> None:
        super().__init__(blob)
        self.lengths = lengths
        self.pause_s = pause_s
        self.stop = stop
        self.ended: list[float] = []

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        answer = await self.read(offset, self.size - offset if length is None else length)

        async def pieces() -> AsyncIterator[bytes]:
            at = turn = 0
            while at < len(answer):
                await trio.sleep(self.pause_s)
                if at >= self.stop:
                    await trio.sleep_forever()
                piece = answer[at : at + self.lengths[turn % len(self.lengths)]]
                at, turn = at + len(piece), turn + 1
                yield piece

        try:
            yield pieces()
        finally:
            self.ended.append(trio.current_time())


@pytest.mark.parametrize("lengths", [(1,), (6, 1), (8, 6), (13, 1, 14), (1000,)])
async def test_spans_are_cut_out_wherever_pieces_end(tmp_path: Path, lengths: Sequence[int]) -> None:
    one = sample([7] * 40, codecs=(RAW,))
    source = PiecewiseSource(one.blob, lengths)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, attached.size) == one.plain
        assert store.cached(attached, 0, attached.size) == one.plain
        assert store.stats.bytes_fetched == len(one.blob)
    assert len(source.requests) == 1


async def test_who_waits_for_what_has_come_does_not_wait_for_the_rest_of_the_range(tmp_path: Path) -> None:
    one = sample([4 * KIB] * 8, codecs=(RAW,))
    source = PiecewiseSource(one.blob, (KIB,), stop=4 * KIB)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        with trio.fail_after(30):
            window = 0, attached.size
            assert await store.read(attached, 0, 4 * KIB, window=window) == one.plain[: 4 * KIB]
        assert source.requests == [(0, len(one.blob))]


async def test_a_source_that_trickles_is_given_up_at_the_deadline(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    one = sample([4 * KIB] * 8, codecs=(RAW,))
    source = PiecewiseSource(one.blob, (KIB,), pause_s=20)
    began = trio.current_time()
    async with open_store(store_settings(tmp_path, deadline_s=30)) as store:
        attached = store.attach(one.device, source)
        with pytest.raises(Unavailable, match="did not"):
            await store.read(attached, 0, attached.size)
        await trio.sleep(60)
        assert source.ended[0] - began == pytest.approx(31, abs=1), "and others get its turn"
