"""A miss brings along what lies around it: as much as comes, and is verified, in the time that asking takes."""

import threading
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.clocks import patient_clock
from tests.store.rig import KIB, RAW, ScriptedSource, sample, store_settings
from veneer.codec import check_and_decode
from veneer.index.model import Span
from veneer.store.spanstore import open_store

pytestmark = pytest.mark.usefixtures("neighbours")

SPANS, SPAN = 256, 64 * KIB
#: What asking costs besides the round trip, as bytes.
ASKING = 1280 * KIB


@pytest.fixture
def mock_clock() -> MockClock:
    return patient_clock()


# As many spans as do not let the store fetch the rest on its own.
@pytest.mark.parametrize(("rtt_s", "spans", "fewest", "most"), [(0.05, 62, 4, 20), (0.0, 15, 4, 15)])
async def test_reading_span_after_span(
    tmp_path: Path, mock_clock: MockClock, rtt_s: float, spans: int, fewest: int, most: int
) -> None:
    async def far(_number: int, _offset: int, length: int, answer: bytes) -> bytes:
        await trio.sleep(rtt_s + length / 12.5e6 if rtt_s else 0)
        return answer

    one = sample([SPAN] * SPANS, codecs=(RAW,))
    source = ScriptedSource(one.blob, far)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        for offset in range(0, spans * SPAN, SPAN):
            assert await store.read(attached, offset, 4 * KIB) == one.plain[offset : offset + 4 * KIB]
    assert fewest <= len(source.requests) <= most
    # About what arrives in one round trip (12.5 MB/s), and nothing twice.
    along = 2 * rtt_s * 12.5e6 or ASKING
    assert max(length for _, length in source.requests) <= along + SPAN
    total = sum(length for _, length in source.requests)
    assert spans * SPAN <= total <= spans * SPAN + along


async def test_what_lies_before_a_miss_comes_too_but_keeps_it_waiting_for_little(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async def far(_number: int, _offset: int, length: int, answer: bytes) -> bytes:
        await trio.sleep(0.05 + length / 12.5e6)
        return answer

    one = sample([SPAN] * SPANS, codecs=(RAW,))
    source = ScriptedSource(one.blob, far)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        for number in (0, 20, 40, 60, 80, 100, 200):
            await store.read(attached, number * SPAN, 4 * KIB)
        offset, length = source.requests[-1]
        before, behind = 200 * SPAN - offset, offset + length - 201 * SPAN
        assert 0 < before < behind / 4
        await store.read(attached, 199 * SPAN, 2 * SPAN)
        assert source.requests[-1] == (offset, length), "it came in that request"


async def test_a_reader_does_not_wait_until_what_came_along_is_verified(tmp_path: Path) -> None:
    one = sample([SPAN] * 4, codecs=(RAW,))
    answered = threading.Event()

    def decode(span: Span, stored: bytes | memoryview, what: str) -> bytes:
        # In vain if this is what the reader waits for, whose test fails then.
        assert span.number == 2 or answered.wait(10)
        return check_and_decode(span, stored, what)

    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source, decode=decode)
        with trio.fail_after(5):
            data = await store.read(attached, 2 * SPAN, SPAN, window=(0, 4 * SPAN))
        answered.set()
        assert data == one.plain[2 * SPAN : 3 * SPAN]
        assert await store.read(attached, 0, 4 * SPAN) == one.plain
        assert source.requests == [(0, 4 * SPAN)]


async def test_where_verifying_is_what_takes_long_a_miss_brings_little(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async def far(_number: int, _offset: int, length: int, answer: bytes) -> bytes:
        await trio.sleep(0.05 + length / 100e6)
        return answer

    one = sample([SPAN] * SPANS, codecs=(RAW,))
    source = ScriptedSource(one.blob, far)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        link = attached.queue.link
        link.check_s_per_byte = 0.05 / (3 * SPAN)
        link.observe_check = lambda *_: None  # type: ignore[method-assign]
        for number in range(0, SPANS, 25):
            await store.read(attached, number * SPAN, 4 * KIB)
        # Three spans for the round trip, and as many for what asking costs besides, with that which was missed.
        assert max(length for _, length in source.requests) == 4 * SPAN + ASKING


async def test_what_is_there_already_is_not_fetched_again(tmp_path: Path, mock_clock: MockClock) -> None:
    async def far(_number: int, _offset: int, length: int, answer: bytes) -> bytes:
        await trio.sleep(0.05 + length / 12.5e6)
        return answer

    one = sample([SPAN] * SPANS, codecs=(RAW,))
    source = ScriptedSource(one.blob, far)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        for number in (*range(0, SPANS, 7), *range(SPANS)):
            await store.read(attached, number * SPAN, SPAN)
    assert sum(length for _, length in source.requests) == len(one.blob)
