"""What is fetched for somebody who may leave: nothing more is asked for then, and it goes on where it was."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from tests.clocks import nothing_happens
from tests.store.rig import KIB, RAW, Sample, ScriptedSource, sample, store_settings
from veneer.settings import Settings
from veneer.store.spanstore import Priority, SpanStore, open_store
from veneer.store.wanted import Range

SPAN, SPANS = 512 * KIB, 24


def one_at_a_time(directory: Path) -> Settings:
    return replace(store_settings(directory), most_requests=1)


class Held:
    """A source whose requests wait for a word."""

    def __init__(self, of: Sample) -> None:
        self.may = trio.Semaphore(0)
        self.source = ScriptedSource(of.blob, self._wait)

    async def _wait(self, _number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        await self.may.acquire()
        return answer

    async def answer(self, count: int) -> None:
        for _ in range(count):
            self.may.release()
        await nothing_happens()

    def spans(self) -> list[int]:
        """Which were asked for so far."""
        return [
            n
            for offset, length in self.source.requests
            for n in range(offset // SPAN, (offset + length) // SPAN)
        ]


async def bring(store: SpanStore, *ranges: Range) -> None:
    await store.bring(ranges, priority=Priority.PROFILE)


async def test_who_leaves_leaves_nothing_in_the_queue_and_goes_on_later(tmp_path: Path) -> None:
    one = sample([SPAN] * SPANS, codecs=(RAW,))
    held = Held(one)
    async with open_store(one_at_a_time(tmp_path)) as store:
        attached = store.attach(one.device, held.source)
        whole = Range(attached, 0, attached.size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring, store, whole)
            await nothing_happens()
            asked = held.spans()
            nursery.cancel_scope.cancel()
        (link,) = store.links().values()
        assert link["classes"]["profile"]["queued_spans"] == 0  # type: ignore[index] # JSON
        await held.answer(SPANS)
        assert held.spans() == asked, "nobody wanted more"
        assert attached.cached == SPAN * len(asked), "what was under way is kept"
        await bring(store, whole)
        assert held.spans() == list(range(SPANS)), "in order, and nothing twice"
        assert attached.all_present


async def test_what_others_want_too_is_fetched_for_them(tmp_path: Path) -> None:
    one = sample([SPAN] * SPANS, codecs=(RAW,))
    held = Held(one)
    async with open_store(one_at_a_time(tmp_path)) as store:
        attached = store.attach(one.device, held.source)
        read: list[bytes] = []

        async def reader() -> None:
            read.append(await store.read(attached, 23 * SPAN, KIB))

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(bring, store, Range(attached, 0, attached.size))
                await nothing_happens()
                nursery.start_soon(bring, store, Range(attached, 12 * SPAN, 2 * SPAN))
                nursery.start_soon(reader)
                await nothing_happens()
                leaving.cancel_scope.cancel()
            begun = len(held.spans())
            await held.answer(SPANS)
        assert begun < 12
        assert sorted(held.spans()) == [*range(begun), 12, 13, 23]
        assert read == [one.plain[23 * SPAN :][:KIB]]


async def test_a_reader_who_leaves_takes_nothing_from_whoever_wants_it(tmp_path: Path) -> None:
    one = sample([SPAN] * SPANS, codecs=(RAW,))
    held = Held(one)
    async with open_store(one_at_a_time(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, held.source)
        nursery.start_soon(bring, store, Range(attached, 0, attached.size))
        await nothing_happens()
        async with trio.open_nursery() as leaving:
            leaving.start_soon(partial(store.read, attached, 20 * SPAN, KIB))
            await nothing_happens()
            leaving.cancel_scope.cancel()
        await held.answer(SPANS)
        assert attached.all_present


async def test_devices_that_are_gone_are_left_out(tmp_path: Path) -> None:
    one, two = sample([SPAN] * 2, codecs=(RAW,)), sample([SPAN] * 2, codecs=(RAW,), seed=1)
    async with open_store(one_at_a_time(tmp_path)) as store:
        source = ScriptedSource(one.blob)
        gone, here = store.attach(one.device, source), store.attach(two.device, ScriptedSource(two.blob))
        store.detach(gone)
        await bring(store, Range(gone, 0, gone.size), Range(here, 0, 0), Range(here, SPAN, SPAN))
        assert here.cached == SPAN
        assert source.requests == []
