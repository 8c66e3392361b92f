"""Images behind one registry take turns: nobody is starved, and what nobody asked for waits."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.clocks import nothing_happens, patient_clock
from tests.store.rig import KIB, MIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.errors import UsageError
from veneer.settings import DEFAULT_MOST_REQUESTS, Settings
from veneer.store.incoming import IncomingBlob
from veneer.store.spanstore import AttachedDevice, Priority, SpanStore, open_store
from veneer.store.turns import QUIET_S

SPAN, SPANS = 256 * KIB, 64
HALF = DEFAULT_MOST_REQUESTS // 2


@pytest.fixture
def mock_clock() -> MockClock:
    return patient_clock()


class Held:
    """Sources of one registry, whose requests wait for a word."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.released = trio.Semaphore(0)

    def source(self, one: Sample, repository: str) -> ScriptedSource:
        async def fault(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
            self.sent.append(repository)
            await self.released.acquire()
            return answer

        return ScriptedSource(one.blob, fault, f"registry.test/{repository}@{one.device.blob.digest}")

    async def answer(self, count: int) -> None:
        for _ in range(count):
            self.released.release()
        await nothing_happens()


async def read_all_at_once(
    nursery: trio.Nursery,
    store: SpanStore,
    attached: AttachedDevice,
    step: int = 4,
    priority: Priority = Priority.DEMAND,
) -> None:
    """As many readers as there are places, none near to another."""
    for number in range(0, SPANS, step):
        nursery.start_soon(partial(store.read, attached, number * SPAN, KIB, priority=priority))
    await nothing_happens()


def device(seed: int) -> Sample:
    return sample([SPAN] * SPANS, codecs=(RAW,), seed=seed)


async def test_a_greedy_image_does_not_keep_another_one_waiting(tmp_path: Path) -> None:
    held = Held()
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        greedy = [store.attach((one := device(n)).device, held.source(one, "greedy")) for n in range(3)]
        for attached in greedy:
            await read_all_at_once(nursery, store, attached)
        assert held.sent == ["greedy"] * HALF, "however many layers it has"
        small = store.attach((one := device(9)).device, held.source(one, "small"))
        nursery.start_soon(store.read, small, 0, KIB)
        await nothing_happens()
        assert held.sent == ["greedy"] * HALF + ["small"], "sent at once"
        report = store.links()["registry.test"]
        assert report["classes"]["demand"]["running"] == HALF + 1  # type: ignore[index]
        assert report["classes"]["demand"]["queued_spans"] == 3 * SPANS // 4 - HALF  # type: ignore[index]
        nursery.cancel_scope.cancel()


async def test_when_all_requests_are_taken_images_take_turns(tmp_path: Path) -> None:
    held = Held()
    async with open_store(replace(store_settings(tmp_path), most_requests=2)) as store:
        async with trio.open_nursery() as nursery:
            for n, name in enumerate("abc"):
                attached = store.attach((one := device(n)).device, held.source(one, name))
                await read_all_at_once(nursery, store, attached, 16)
            assert held.sent == ["a", "b"]
            for _ in range(12):
                await held.answer(1)
        assert held.sent[:9] == list("abcabcabc"), "who has not had any comes first"
        assert sorted(held.sent) == sorted("abc" * 4)


async def test_layers_of_an_image_take_turns(tmp_path: Path) -> None:
    order: list[int] = []
    async with open_store(replace(store_settings(tmp_path), most_requests=1)) as store:
        async with trio.open_nursery() as nursery:
            for n in range(3):
                one = device(n)

                async def fault(_number: int, _offset: int, _length: int, answer: bytes, n: int = n) -> bytes:
                    order.append(n)
                    await wait_all_tasks_blocked(0.01)
                    return answer

                source = ScriptedSource(one.blob, fault, f"registry.test/app@{n}")
                await_first = store.attach(one.device, source)
                for number in range(0, SPANS, 16):
                    nursery.start_soon(store.read, await_first, number * SPAN, KIB)
        assert [sorted(order[n : n + 3]) for n in range(0, 12, 3)] == [[0, 1, 2]] * 4


async def test_what_is_read_ahead_leaves_room_for_demands_of_all(tmp_path: Path) -> None:
    held = Held()
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        ahead = [store.attach((one := device(n)).device, held.source(one, f"ahead{n}")) for n in range(4)]
        for attached in ahead:
            await read_all_at_once(nursery, store, attached, priority=Priority.READAHEAD)
        assert len(held.sent) == DEFAULT_MOST_REQUESTS // 2
        demand = store.attach((one := device(9)).device, held.source(one, "demand"))
        await read_all_at_once(nursery, store, demand)
        assert held.sent.count("demand") == HALF
        nursery.cancel_scope.cancel()


async def test_a_device_that_is_given_up_cancels_what_is_under_way_and_queued(tmp_path: Path) -> None:
    held = Held()
    async with open_store(store_settings(tmp_path)) as store:
        one = device(1)
        source = held.source(one, "app")
        attached = store.attach(one.device, source)
        other = store.attach((two := device(2)).device, held.source(two, "app"))
        for number in range(0, SPANS, 4):
            store.prefetch(attached, number * SPAN, number * SPAN + KIB)
        await nothing_happens()
        assert source.running == HALF // 2
        store.detach(attached)
        await nothing_happens()
        assert source.running == 0
        assert attached.queue.jobs == {}
        async with trio.open_nursery() as nursery:
            await read_all_at_once(nursery, store, other, 16)
            assert len(held.sent) == HALF // 2 + 4, "the other one has all turns now"
            await held.answer(4)


async def test_a_demand_whose_reader_has_gone_is_not_sent(tmp_path: Path) -> None:
    held = Held()
    async with open_store(replace(store_settings(tmp_path), most_requests=1)) as store:
        attached = store.attach((one := device(1)).device, held.source(one, "app"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, attached, 0, KIB)
            await nothing_happens()
            async with trio.open_nursery() as killed:
                killed.start_soon(store.read, attached, 32 * SPAN, KIB)
                await nothing_happens()
                killed.cancel_scope.cancel()
            await held.answer(2)
        assert len(held.sent) == 1


@asynccontextmanager
async def completing(store: SpanStore, attached: AttachedDevice) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.fetch_rest, attached)
        yield


async def test_the_rest_of_a_device_comes_in_few_requests_and_nothing_twice(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    one = device(1)
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        await store.read(attached, 20 * SPAN, KIB)
        assert await store.fetch_rest(attached)
        assert attached.all_present
        assert sum(length for _, length in source.requests) == len(one.blob)
        assert len(source.requests) < SPANS / 4
        assert await store.fetch_rest(attached), "there is nothing left to do"
        assert await store.prove(attached)
        assert store.links()["registry.test"]["classes"]["bulk"]["bytes"] > 0  # type: ignore[index]


async def test_background_work_waits_until_demands_have_stopped(tmp_path: Path, mock_clock: MockClock) -> None:
    one, two = device(1), device(2)
    source, other = ScriptedSource(one.blob), ScriptedSource(two.blob, name="registry.test/other@sha256:34cd")
    async with open_store(store_settings(tmp_path)) as store:
        attached, read = store.attach(one.device, source), store.attach(two.device, other)
        await store.read(read, 0, KIB)
        async with completing(store, attached):
            for number in range(1, 5):
                await trio.sleep(QUIET_S / 2)
                assert source.requests == []
                await store.read(read, number * 8 * SPAN, KIB)
        assert attached.all_present


async def test_background_work_has_a_budget(tmp_path: Path, mock_clock: MockClock) -> None:
    one = device(1)
    source = ScriptedSource(one.blob)
    async with open_store(replace(store_settings(tmp_path), background_rate=MIB)) as store:
        attached = store.attach(one.device, source)
        began = trio.current_time()
        assert await store.fetch_rest(attached)
        longest = max(length for _, length in source.requests)
        assert trio.current_time() - began >= (len(one.blob) - longest) / MIB
        assert store.links()["registry.test"]["background_bytes_per_s"] == MIB


async def test_a_source_that_fails_ends_an_attempt(tmp_path: Path, mock_clock: MockClock) -> None:
    one = device(1)
    source = ScriptedSource(one.blob)

    async def cut(_number: int, offset: int, length: int, answer: bytes) -> bytes:
        return answer if offset + length < SPANS * SPAN // 2 else answer[:-1]

    source.fault = cut
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert not await store.fetch_rest(attached)
        source.fault = None
        assert await store.fetch_rest(attached)
        assert await store.read(attached, 0, SPANS * SPAN) == one.plain


async def take(incoming: IncomingBlob, offset: int, length: int | None) -> None:
    async with incoming.stream(offset, length) as chunks:
        async for _ in chunks:
            pass


async def test_parts_of_a_download_take_turns_and_its_first_request_takes_none(tmp_path: Path) -> None:
    held, one, other = Held(), device(1), device(2)
    async with (
        open_store(replace(store_settings(tmp_path), most_requests=2)) as store,
        trio.open_nursery() as nursery,
    ):
        reader = store.attach(other.device, held.source(other, "read"))
        with store.incoming(held.source(one, "streamed"), one.device.blob) as incoming:
            for offset in (MIB, 2 * MIB, 3 * MIB):
                nursery.start_soon(take, incoming, offset, MIB)
            await nothing_happens()
            assert held.sent == ["streamed"], "one request is left for readers"
            nursery.start_soon(take, incoming, 0, None)
            nursery.start_soon(store.read, reader, 0, KIB)
            await nothing_happens()
            assert sorted(held.sent) == ["read", "streamed", "streamed"]
            stream = store.links()["registry.test"]["classes"]["stream"]  # type: ignore[index]
            assert stream == {"running": 1, "queued_spans": 2, "requests": 2, "bytes": 0}
            await held.answer(5)
            assert held.sent.count("streamed") == 4
            stream = store.links()["registry.test"]["classes"]["stream"]  # type: ignore[index]
            assert stream == {"running": 0, "queued_spans": 0, "requests": 4, "bytes": SPANS * SPAN + 3 * MIB}
            incoming.proven()
        ranges, _ = store.log.since(0.0, {str(one.device.blob.digest)})
        assert sorted(times.length for times in ranges) == [MIB] * 3 + [SPANS * SPAN]
        for times in ranges:
            assert times.priority == "stream"
            assert times.queued <= times.sent <= (times.first_byte or 0) <= (times.last_byte or 0)
            assert (times.last_byte or 0) <= (times.ready or 0)


async def test_a_download_that_is_given_up_leaves_its_turn_to_others(tmp_path: Path) -> None:
    held, one = Held(), device(1)
    async with open_store(replace(store_settings(tmp_path), most_requests=1)) as store:
        with store.incoming(held.source(one, "streamed"), one.device.blob) as incoming:
            async with trio.open_nursery() as nursery:
                for offset in (MIB, 2 * MIB):
                    nursery.start_soon(take, incoming, offset, MIB)
                await nothing_happens()
                nursery.cancel_scope.cancel()
        await held.answer(1)
        reader = store.attach(one.device, held.source(one, "read"))
        with trio.fail_after(60):
            assert await store.read(reader, 0, KIB) == one.plain[:KIB]


@pytest.mark.parametrize("value", ["0", "65", "-1", "many", "1.5"])
def test_a_number_of_requests_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VENEER_MAX_REQUESTS", value)
    with pytest.raises(UsageError, match="number of requests"):
        Settings.from_environment()


def test_budgets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_MAX_REQUESTS", "4")
    monkeypatch.setenv("VENEER_BACKGROUND_RATE", "2M")
    settings = Settings.from_environment()
    assert (settings.most_requests, settings.background_rate) == (4, 2 * MIB)
