"""Reading most of a device brings the rest of it, a start does not; and bulk is in nobody's way."""

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.clocks import nothing_happens, patient_clock
from tests.store.rig import KIB, MIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.errors import IntegrityError, Unavailable
from veneer.store import bulk, link
from veneer.store.link import LinkEstimate
from veneer.store.spanstore import AttachedDevice, Priority, SpanStore, open_store

SPAN = 64 * KIB
SPANS = 512
SIZE = SPANS * SPAN
#: Nearly a quarter, and no two spans next to each other: the next one that is read starts bulk.
ALMOST = range(0, SPANS // 2 - 2, 2)


@pytest.fixture(scope="module")
def one() -> Sample:
    return sample([SPAN] * SPANS, codecs=(RAW,))


@pytest.fixture
def mock_clock() -> MockClock:
    return patient_clock()


@pytest.fixture(autouse=True)
def only_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss brings along what takes as long to verify as asking takes: nothing, for a slow :func:`fix`."""
    monkeypatch.setattr(link, "_ASKING", 0)


class Gate:
    """A fault that holds requests as long as it is closed."""

    def __init__(self) -> None:
        self._opened = trio.Event()
        self._opened.set()

    def close(self) -> None:
        self._opened = trio.Event()

    def open(self) -> None:
        self._opened.set()

    async def __call__(self, _number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        await self._opened.wait()
        return answer


class Pieces(ScriptedSource):
    """Streams come span by span, long ones when ``allow`` says so, and break off after ``most`` bytes."""

    def __init__(self, blob: bytes) -> None:
        super().__init__(blob)
        self.allowed = trio.Semaphore(0)
        self.most = 1 << 60

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            data = await self.read(offset, self.size - offset if length is None else length)
            for place in range(0, len(data), SPAN):
                if len(data) > 10 * SPAN:
                    await self.allowed.acquire()
                if place >= self.most:
                    raise Unavailable("broken off")
                yield data[place : place + SPAN]

        yield chunks()

    def allow(self, pieces: int) -> None:
        for _ in range(pieces):
            self.allowed.release()


async def read(store: SpanStore, attached: AttachedDevice, numbers: Iterable[int], one: Sample) -> None:
    """One reader that reads the first bytes of spans, one span after the other."""
    for number in numbers:
        assert await store.read(attached, number * SPAN, 4 * KIB) == one.plain[number * SPAN :][: 4 * KIB]


async def settled(attached: AttachedDevice) -> None:
    """Wait until there is no job any more, and nobody about to make one."""
    await nothing_happens()
    while jobs := attached.queue.jobs:
        await next(iter(jobs.values())).done.wait()
        await nothing_happens()


def fix(link: LinkEstimate, rtt_s: float, bytes_per_s: float) -> None:
    """Have a link of this kind, whatever the machine is busy with."""
    for _ in range(50):
        for length in (SPAN, MIB, 4 * MIB):
            link.observe(length, rtt_s + length / bytes_per_s)
    # The estimate is not what is tested here; and verifying is slow, so that a miss brings nothing along.
    link.observe = lambda *_, **__: None  # type: ignore[method-assign]
    link.observe_check = lambda *_: None  # type: ignore[method-assign]
    link.check_s_per_byte = 1.0


def widen(link: LinkEstimate) -> None:
    fix(link, 0.0005, 1e9)
    assert link.is_wide


def narrow(link: LinkEstimate) -> None:
    fix(link, 0.002, 12.5e6)
    assert not link.is_wide


async def test_reading_in_order_brings_the_rest_in_few_requests(tmp_path: Path, one: Sample) -> None:
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, range(SPANS // 3), one)
        await settled(attached)
        assert attached.all_present
        assert store.stats.bulk_started >= 1
        assert store.stats.bulk_bytes > SIZE // 2
        # Those of the first 4 MiB, one by one, and then 4 MiB at a time, however it was doubled.
        assert len(source.requests) <= 4 * MIB // SPAN + SIZE // (4 * MIB) + 8
        assert sum(length for _, length in source.requests) == SIZE, "nothing was fetched twice"
        assert await store.read(attached, 0, SIZE) == one.plain
        assert not attached.bulk.watching, "there is nothing more to learn from reads"


def scattered(share: float, stretch: int = 1) -> list[int]:
    """So much of a device in stretches of so many spans, none of them next to each other, in any order."""
    choose = random.Random(7)
    places = choose.sample(range(0, SPANS, stretch + 1), round(SPANS * share / stretch))
    return [number for place in places for number in range(place, min(place + stretch, SPANS))]


@pytest.mark.parametrize(
    ("numbers", "starts"),
    [
        (scattered(0.04), False),
        (scattered(0.2), False),
        (scattered(0.2, 7), False),
        (scattered(0.27), True),
        (list(range(15)), False),
        ([*range(12), *range(100, 112)], False),
        (list(range(20)), True),
        (list(range(300, 370)), True),
        (list(range(100, 30, -1)), True),
    ],
    ids=[
        "4 %",
        "20 %",
        "20 %, like a start",
        "27 %",
        "below 1 MiB",
        "2 stretches",
        "in order",
        "the middle",
        "backwards",
    ],
)
async def test_what_was_read_tells_what_will_be_read(
    tmp_path: Path, one: Sample, numbers: list[int], starts: bool
) -> None:
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, numbers, one)
        await settled(attached)
        assert bool(store.stats.bulk_started) is bool(store.stats.bulk_bytes) is starts
        if not starts:
            assert len(source.requests) == len(numbers), "what was asked for, and no more"


@pytest.mark.parametrize(
    ("stretches", "starts"),
    [
        ([17] * 4, True),
        ([17] * 5, False),
        ([17, 17, 17, 17, 65], False),
        ([17, 17, 17, 17, 68], True),
        ([68, 17, 17, 17, 17], True),
        ([34, 17, 34, 17, 17], False),
    ],
    ids=["few", "many", "less than half in one", "half in one", "half in the first", "two of a quarter"],
)
async def test_many_long_stretches_are_a_start_of_a_large_image(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch, stretches: list[int], starts: bool
) -> None:
    monkeypatch.setattr(bulk, "_FEW_STRETCHES", 4)
    monkeypatch.setattr(bulk, "_LARGE_SHARE", 1 / 2)
    # What was read by the end is to tell, not the first of them.
    monkeypatch.setattr(bulk, "_WIDE_LEAST", sum(stretches) * SPAN)
    numbers = [
        number for place, spans in enumerate(stretches) for number in range(90 * place, 90 * place + spans)
    ]
    assert bulk._WIDE_SHARE <= len(numbers) / SPANS < bulk._LARGE_SHARE
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        widen(attached.queue.link)
        await read(store, attached, numbers, one)
        await settled(attached)
        assert bool(store.stats.bulk_started) is starts


async def test_a_wrong_guess_costs_at_most_as_much_again(tmp_path: Path, one: Sample) -> None:
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        narrow(attached.queue.link)
        await read(store, attached, range(200, 280), one)
        await settled(attached)
        assert 0 < store.stats.bulk_bytes <= 80 * SPAN
        held = [number for number, is_held in enumerate(attached.held()) if is_held]
        assert held == list(range(200, 200 + len(held))), "what comes next, not what comes first"


@pytest.mark.parametrize(
    ("kind", "spans", "brought"),
    [
        # A 32nd, a 13th and an eighth of the device. Of what is brought, readers come to some.
        (narrow, 16, 4),
        (narrow, 40, 40),
        (narrow, 64, 64),
        (widen, 16, 16),
        (widen, 40, 160),
        (widen, 64, SPANS - 16),
    ],
)
async def test_where_little_is_lost_by_a_wrong_guess_more_is_fetched_sooner(
    tmp_path: Path,
    one: Sample,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[LinkEstimate], None],
    spans: int,
    brought: int,
) -> None:
    monkeypatch.setattr(bulk, "_LEAST", 4 * SPAN)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        kind(attached.queue.link)
        await read(store, attached, range(100, 100 + spans), one)
        await settled(attached)
        assert brought - 4 <= store.stats.bulk_bytes // SPAN <= brought


async def test_demand_is_sent_at_once_and_bulk_is_three_requests_at_most(tmp_path: Path, one: Sample) -> None:
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, ALMOST, one)
        await settled(attached)
        before = len(source.requests)
        gate.close()
        for number in (500, 490, 480):
            nursery.start_soon(read, store, attached, [number], one)
            await nothing_happens()
        assert source.requests[before][0] == 500 * SPAN, "what bulk was started by goes first"
        assert [offset for offset, _ in source.requests[before + 4 :]] == [490 * SPAN, 480 * SPAN]
        assert len(source.requests) == before + 4 + 2
        gate.open()


async def test_on_a_narrow_link_bulk_waits_for_demand_and_is_one_short_request(
    tmp_path: Path, one: Sample
) -> None:
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)
        link = attached.queue.link
        narrow(link)
        await read(store, attached, range(63), one)
        await settled(attached)
        assert store.stats.to_json()["bulk_started"] == 0
        gate.close()
        before = len(source.requests)
        nursery.start_soon(read, store, attached, range(63, 66), one)
        await nothing_happens()
        assert len(source.requests) == before + 1, "the reader's own request"
        gate.open()
        await nothing_happens()
        await settled(attached)
        assert store.stats.bulk_started == 1
        longest = max(length for _, length in source.requests)
        assert 256 * KIB <= longest <= 0.050 * 12.5e6 + SPAN
        assert source.most_running <= 2, "one that a reader waits for, and one of bulk"


async def test_a_reader_gets_a_span_before_the_range_it_is_in_has_come(tmp_path: Path, one: Sample) -> None:
    source = Pieces(one.blob)
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, range(16), one)
        await nothing_happens()
        before = len(source.requests)
        begun, length = source.requests[-1]
        assert length > 30 * SPAN, "a range of bulk is under way"
        number = begun // SPAN + 3
        nursery.start_soon(read, store, attached, [number], one)
        await nothing_happens()
        source.allow(4)
        await attached.queue.jobs[number].done.wait()
        assert len(source.requests) == before, "the range that is under way will do"
        assert attached.queue.jobs, "and it still is"
        nursery.cancel_scope.cancel()


async def test_what_came_before_a_range_broke_off_is_kept_and_the_rest_asked_for_again(
    tmp_path: Path, one: Sample
) -> None:
    source = Pieces(one.blob)
    source.allow(SPANS)
    source.most = 5 * SPAN
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        data = await store.read(attached, 0, 12 * SPAN, priority=Priority.COMPLETION)
        assert data == one.plain[: 12 * SPAN]
        assert source.requests == [(n * SPAN, (12 - n) * SPAN) for n in (0, 5, 10)]


async def test_a_failing_source_stops_bulk_and_the_first_success_lets_it_go_on(
    tmp_path: Path, mock_clock: MockClock, one: Sample
) -> None:
    away = False

    async def fault(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if away:
            raise Unavailable("away")
        return answer

    source = ScriptedSource(one.blob, fault)
    async with open_store(store_settings(tmp_path, deadline_s=5)) as store:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, ALMOST, one)
        await settled(attached)
        away = True
        for number in (500, 400):
            before = store.stats.bulk_bytes
            with pytest.raises(Unavailable, match="away"):
                await read(store, attached, [number], one)
            await settled(attached)
            asked = store.stats.bulk_bytes - before
            assert asked <= (12 * MIB if number == 500 else 0), "three ranges, and none while it keeps failing"
        away = False
        await read(store, attached, [500], one)
        await settled(attached)
        await read(store, attached, [400], one)
        await settled(attached)
        assert attached.all_present
        assert store.stats.bulk_started >= 2


async def test_wrong_bytes_in_a_range_of_bulk_are_not_kept(
    tmp_path: Path, mock_clock: MockClock, one: Sample
) -> None:
    wrong, mended = 300, False

    async def fault(_number: int, offset: int, length: int, answer: bytes) -> bytes:
        place = wrong * SPAN + 77 - offset
        if mended or not 0 <= place < length:
            return answer
        return answer[:place] + bytes([answer[place] ^ 1]) + answer[place + 1 :]

    source = ScriptedSource(one.blob, fault)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, range(SPANS // 3), one)
        await settled(attached)
        await read(store, attached, [n for n in range(SPANS) if n != wrong], one)
        await settled(attached)
        assert [n for n, held in enumerate(attached.held()) if not held] == [wrong]
        asked = [o for o, length in source.requests if o <= wrong * SPAN < o + length]
        assert len(asked) <= 3, "tried as often as for a reader, and then left to readers"
        with pytest.raises(IntegrityError):
            await read(store, attached, [wrong], one)
        mended = True
        assert await store.read(attached, 0, SIZE) == one.plain


async def test_when_nobody_reads_any_more_bulk_stops_and_goes_on_with_the_next_miss(
    tmp_path: Path, mock_clock: MockClock, one: Sample
) -> None:
    slow = False

    async def far(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        await trio.sleep(1.5 if slow else 0)
        return answer

    source = ScriptedSource(one.blob, far)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        narrow(attached.queue.link)
        await read(store, attached, ALMOST, one)
        await settled(attached)
        slow = True
        before = len(source.requests)
        await read(store, attached, [301], one)
        await settled(attached)
        assert 1 <= len(source.requests) - before - 1 <= 3, "2 s after the last read nothing is begun any more"
        assert not attached.all_present
        before = len(source.requests)
        await read(store, attached, [400], one)
        await settled(attached)
        assert len(source.requests) - before > 1


async def test_bulk_evicts_nothing(tmp_path: Path, one: Sample) -> None:
    source = ScriptedSource(one.blob)
    quota = SIZE // 2
    async with open_store(store_settings(tmp_path, quota=quota)) as store:
        attached = store.attach(one.device, source)
        widen(attached.queue.link)
        await read(store, attached, range(SPANS // 4 + 1), one)
        await settled(attached)
        assert store.stats.bulk_bytes > 0
        assert store.stats.evicted == 0
        assert sum(attached.held()) * SPAN > quota - 9 * MIB
        before = store.stats.bulk_bytes
        await read(store, attached, range(SPANS - 20, SPANS), one)
        await settled(attached)
        assert store.stats.bulk_bytes - before <= 5 * MIB, "what demand had evicted is not refilled for long"


@pytest.mark.parametrize("give_up", ["close", "detach"])
async def test_nothing_is_left_when_a_device_is_given_up(tmp_path: Path, one: Sample, give_up: str) -> None:
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    with trio.fail_after(60):
        async with open_store(store_settings(tmp_path)) as store:
            attached = store.attach(one.device, source)
            widen(attached.queue.link)
            await read(store, attached, ALMOST, one)
            await settled(attached)
            gate.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, store, attached, [500], one)
                await nothing_happens()
                assert source.running == 4
                nursery.cancel_scope.cancel()
            if give_up == "detach":
                store.detach(attached)
                gate.open()
                before = len(source.requests)
                await settled(attached)
                assert len(source.requests) == before
        assert source.running == 0
        assert attached.queue.link.bulk == 0
