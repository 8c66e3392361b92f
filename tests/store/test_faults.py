"""What a source can do wrong, and what a reader then gets: right bytes, or an error in time."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.store.rig import KIB, RAW, ZSTD, Fault, Sample, ScriptedSource, sample, store_settings
from veneer.errors import IntegrityError, NotFound, RateLimited, Unavailable, UnsupportedFormat, VeneerError
from veneer.index.model import Codec
from veneer.store.spanstore import open_store

# Spans are small here: all work is done in the event loop, so that the mock clock stands still meanwhile.


@pytest.fixture
def one() -> Sample:
    return sample([4 * KIB] * 16, codecs=(ZSTD, RAW))


def first(times: int, change: Callable[[bytes], bytes]) -> Fault:
    """Change the answers to the first requests only."""

    async def fault(number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        return change(answer) if number < times else answer

    return fault


def failing(times: float, error: VeneerError) -> Fault:
    async def fault(number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if number < times:
            raise error
        return answer

    return fault


def flip(answer: bytes) -> bytes:
    return answer[:100] + bytes([answer[100] ^ 1]) + answer[101:]


@pytest.mark.parametrize(
    "change",
    [flip, lambda answer: answer[:-1], lambda answer: bytes(len(answer)), lambda answer: answer + b"x"],
)
async def test_wrong_bytes_are_fetched_again(
    tmp_path: Path, one: Sample, autojump_clock: MockClock, change: Callable[[bytes], bytes]
) -> None:
    source = ScriptedSource(one.blob, first(2, change))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, 8 * KIB) == one.plain[: 8 * KIB]
        assert store.stats.verify_failures >= 2
        assert store.stats.retries == store.stats.verify_failures
        assert len(source.requests) == 3
        assert store.cached(attached, 0, 8 * KIB) == one.plain[: 8 * KIB]


async def test_persistently_wrong_bytes_are_an_error_that_names_everything_and_never_data(
    tmp_path: Path, one: Sample, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScriptedSource(one.blob, first(3, flip))
    settings = store_settings(tmp_path)
    async with open_store(settings) as store:
        attached = store.attach(one.device, source)
        with pytest.raises(IntegrityError):
            await store.read(attached, 0, 10)
        assert len(source.requests) == 3
        assert store.cached(attached, 0, 1) is None
        span = one.device.spans[0]
        for part in (source.name, f"bytes 0+{span.stored_length}", span.digest.hex(), "got sha256:"):
            assert part in caplog.text
        # Not remembered: once the source is right again, so is the read.
        assert await store.read(attached, 0, 10) == one.plain[:10]
    data = (settings.cache_dir / "devices" / one.device.key.hex / "data").read_bytes()
    assert data[: 4 * KIB] == one.plain[: 4 * KIB]


async def test_one_bad_span_does_not_spoil_its_neighbours_in_the_range(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    bad = one.device.spans[2]

    async def spoil(_number: int, offset: int, _length: int, answer: bytes) -> bytes:
        at = bad.stored_offset + 50 - offset
        return answer[:at] + b"\0\0\0\0" + answer[at + 4 :] if 0 <= at < len(answer) else answer

    source = ScriptedSource(one.blob, spoil)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        with pytest.raises(IntegrityError):
            await store.read(attached, 0, 20 * KIB)
        assert store.cached(attached, 0, 8 * KIB) == one.plain[: 8 * KIB]
        assert store.cached(attached, 12 * KIB, 8 * KIB) == one.plain[12 * KIB : 20 * KIB]
        assert store.cached(attached, 8 * KIB, 1) is None
        assert source.requests[1:] == [(bad.stored_offset, bad.stored_length)] * 2


async def test_temporary_errors_are_retried_within_the_deadline(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    source = ScriptedSource(one.blob, failing(5, Unavailable("reset")))
    async with open_store(store_settings(tmp_path)) as store:
        assert await store.read(store.attach(one.device, source), 0, 10) == one.plain[:10]
        assert store.stats.retries == 5
        assert store.stats.errors == 0


async def test_a_dead_source_fails_reads_in_time_is_not_hammered_and_is_used_again_at_once(
    tmp_path: Path, one: Sample, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScriptedSource(one.blob, failing(float("inf"), Unavailable("connection refused")))
    async with open_store(store_settings(tmp_path, deadline_s=20)) as store:
        attached = store.attach(one.device, source)
        source.fault, fault = None, source.fault
        await store.read(attached, 60 * KIB, 10)
        source.fault = fault
        failed = 0

        async def read(offset: int) -> None:
            nonlocal failed
            with pytest.raises(Unavailable, match="connection refused"):
                await store.read(attached, offset, 10)
            failed += 1

        async with trio.open_nursery() as nursery:
            started = trio.current_time()
            for offset in range(0, 40 * KIB, KIB):
                nursery.start_soon(read, offset)
            await wait_all_tasks_blocked()
            assert store.cached(attached, 60 * KIB, 10) == one.plain[60 * KIB : 60 * KIB + 10]
        assert failed == 40
        assert trio.current_time() - started == pytest.approx(20, abs=0.3)
        assert len(source.requests) <= 30, "about one a second"
        assert sum(record.levelno >= logging.WARNING for record in caplog.records) <= 2
        assert attached.queue.jobs == {}
        source.fault = None
        started = trio.current_time()
        assert await store.read(attached, 0, 10) == one.plain[:10]
        assert trio.current_time() - started <= 1.0


async def test_a_stalled_request_is_given_up_and_asked_again(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    async def stall(number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if number == 0:
            await trio.sleep_forever()
        return answer

    source = ScriptedSource(one.blob, stall)
    async with open_store(store_settings(tmp_path, deadline_s=5)) as store:
        attached = store.attach(one.device, source)
        started = trio.current_time()
        assert await store.read(attached, 0, 10) == one.plain[:10]
        assert 5 < trio.current_time() - started < 5.5


async def test_permanent_errors_end_the_read_at_once_and_are_not_remembered(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    source = ScriptedSource(one.blob, failing(1, NotFound("blob is gone")))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        started = trio.current_time()
        with pytest.raises(NotFound, match="gone"):
            await store.read(attached, 0, 10)
        assert trio.current_time() == started
        assert await store.read(attached, 0, 10) == one.plain[:10]


async def test_retry_after_is_honoured(tmp_path: Path, one: Sample, autojump_clock: MockClock) -> None:
    source = ScriptedSource(one.blob, failing(1, RateLimited("slow down", retry_after_s=7)))
    async with open_store(store_settings(tmp_path)) as store:
        started = trio.current_time()
        await store.read(store.attach(one.device, source), 0, 10)
        assert trio.current_time() - started == pytest.approx(7)


async def test_read_ahead_that_fails_is_forgotten(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    source = ScriptedSource(one.blob, failing(1, Unavailable("reset")))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        store.prefetch(attached, 0, 40 * KIB)
        await wait_all_tasks_blocked()
        assert attached.queue.jobs == {}
        assert await store.read(attached, 0, 10) == one.plain[:10]
        assert store.stats.errors == 0


async def test_an_unknown_seal_is_refused_without_asking_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    sealed = sample([100], codecs=(Codec("raw", "unheard-of"),))
    source = ScriptedSource(sealed.blob)
    async with open_store(store_settings(tmp_path)) as store:
        with pytest.raises(UnsupportedFormat, match="unheard-of"):
            await store.read(store.attach(sealed.device, source), 0, 10)
    assert len(source.requests) == 1


async def test_a_source_that_works_again_is_asked_as_much_as_before(tmp_path: Path, one: Sample) -> None:
    gate = trio.Event()

    async def fault(number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if number == 0:
            raise Unavailable("connection reset")
        if number > 1:
            await gate.wait()
        return answer

    source = ScriptedSource(one.blob, fault)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, 1) == one.plain[:1]
        async with trio.open_nursery() as nursery:
            for number in (5, 10):
                nursery.start_soon(store.read, attached, number * 4 * KIB, 1)
                await wait_all_tasks_blocked()
            assert source.running == 2
            gate.set()


async def test_who_comes_while_a_source_is_tried_again_has_its_turn_after_that(
    tmp_path: Path, one: Sample
) -> None:
    gate = trio.Event()

    async def fault(number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if number == 0:
            raise Unavailable("connection reset")
        await gate.wait()
        return answer

    source = ScriptedSource(one.blob, fault)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, attached, 0, 1)
            while len(source.requests) < 2:
                await wait_all_tasks_blocked(0.01)
            nursery.start_soon(store.read, attached, 40 * KIB, 1)
            await wait_all_tasks_blocked(0.01)
            assert len(source.requests) == 2, "one at a time"
            gate.set()
        assert len(source.requests) == 3


async def test_a_source_is_not_believed_when_it_says_to_wait_for_an_hour(
    tmp_path: Path, one: Sample, autojump_clock: MockClock
) -> None:
    source = ScriptedSource(one.blob, failing(1, RateLimited("slow down", retry_after_s=3600)))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, 1) == one.plain[:1]
    assert len(source.requests) == 2
