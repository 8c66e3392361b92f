"""What is made of the times of requests: how wide a link is."""

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from tests.store.rig import KIB, MIB, RAW, ScriptedSource, sample
from veneer.store.link import LinkEstimate
from veneer.store.stats import StoreStats
from veneer.store.transfer import Priority, SpanJob, Transfer
from veneer.timing import RangeLog

pytestmark = pytest.mark.usefixtures("neighbours")


@pytest.fixture
def near() -> LinkEstimate:
    """A registry on the same machine: 10 ms until it answers, 500 MB/s."""
    link = LinkEstimate()
    for length in (MIB, 2 * MIB, MIB, 4 * MIB):
        link.observe(length, 0.010 + length / 500e6)
    assert link.is_wide
    return link


def test_a_registry_that_is_busy_makes_a_wide_link_no_narrower(near: LinkEstimate) -> None:
    for length, seconds in ((30 * KIB, 0.004), (400 * KIB, 0.050)) * 20:
        near.observe(length, seconds)
    assert near.is_wide


def test_one_long_range_that_comes_slowly_does(near: LinkEstimate) -> None:
    for _ in range(8):
        near.observe(60 * KIB, 0.005)
    near.observe(2 * MIB, 2 * MIB / 12.5e6)
    near.observe(4 * MIB, 4 * MIB / 12.5e6)
    assert not near.is_wide


def observe_tails(link: LinkEstimate, tails_s: tuple[float, ...]) -> None:
    """Ranges of 256 KiB, half of which came at once, after 10 ms, and the rest so much later."""
    for tail_s in tails_s:
        link.observe(256 * KIB, 0.010 + tail_s, first_s=0.010, first_length=128 * KIB)


def test_what_comes_behind_the_first_piece_tells_of_a_wide_link_before_there_is_a_long_range() -> None:
    link = LinkEstimate()
    observe_tails(link, (0.0005,) * 3)
    assert not link.is_wide
    observe_tails(link, (0.0005,))
    assert link.is_wide


@pytest.mark.parametrize("tails_s", [(0.010,) * 8, (0.0, 0.0, 0.010) * 3], ids=["slow", "sometimes at once"])
def test_a_narrow_link_is_not_taken_for_a_wide_one(tails_s: tuple[float, ...]) -> None:
    link = LinkEstimate()
    observe_tails(link, tails_s)
    assert not link.is_wide


def test_what_comes_in_one_piece_tells_nothing_of_that() -> None:
    link = LinkEstimate()
    for _ in range(8):
        link.observe(64 * KIB, 0.010)
    assert not link.is_wide


def test_a_long_range_knows_better(near: LinkEstimate) -> None:
    observe_tails(near, (0.010,) * 8)
    assert near.is_wide
    slow = LinkEstimate()
    for length in (MIB, 2 * MIB):
        slow.observe(length, length / 12.5e6)
    observe_tails(slow, (0.0,) * 4)
    assert not slow.is_wide


@pytest.mark.parametrize(
    ("check_s", "s_per_byte", "expected"),
    [
        # Verifying takes longer than the link: what it does in one round trip, and what asking costs besides.
        (10e-9, 1e-9, 100_000 + 1280 * KIB),
        (20e-9, 1e-9, 50_000 + 1280 * KIB),
        # A narrow link is kept busy for no longer than asking takes.
        (10e-9, 100e-9, 10_000 + 128 * KIB),
        (0.0, 10e-9, 100_000),
    ],
)
def test_a_miss_brings_what_costs_as_much_as_asking_again(
    near: LinkEstimate, check_s: float, s_per_byte: float, expected: int
) -> None:
    near.observe(4 << 20, 0.01)
    near.rtt_s, near.s_per_byte = 0.001, s_per_byte
    if check_s:
        near.observe_check(1 << 20, check_s * (1 << 20))
    before, behind = near.reach
    assert behind == pytest.approx(expected, rel=0.01)
    assert before == behind // 8


class Late(ScriptedSource):
    """Answers after 10 ms, and has the second half of every range so much later."""

    def __init__(self, blob: bytes, tail_s: float) -> None:
        super().__init__(blob)
        self.tail_s = tail_s

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            data = await self.read(offset, self.size - offset if length is None else length)
            await trio.sleep(0.010)
            yield data[: len(data) // 2]
            await trio.sleep(self.tail_s)
            yield data[len(data) // 2 :]

        yield chunks()


@pytest.mark.parametrize(("tail_s", "wide"), [(0.0005, True), (0.010, False)])
async def test_requests_tell_it(autojump_clock: MockClock, tail_s: float, wide: bool) -> None:
    del autojump_clock  # nothing but these waits takes time
    one = sample([64 * KIB] * 4, codecs=(RAW,))
    link, source = LinkEstimate(), Late(one.blob, tail_s)

    async def settle(_jobs: Sequence[SpanJob], _offset: int, _data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    for _ in range(4):
        await Transfer(
            deque(SpanJob(number, Priority.DEMAND) for number in range(4)),
            source,
            one.device.spans,
            link=link,
            stats=StoreStats(),
            deadline_s=30,
            settle=settle,
            ranges=RangeLog().of("device"),
        ).run()
    assert link.is_wide is wide
