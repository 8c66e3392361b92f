"""What a store notes of its requests and reads, and that it forgets the oldest."""

from pathlib import Path

import pytest
import trio

from tests.store.rig import KIB, ScriptedSource, sample, store_settings
from veneer.errors import Unavailable
from veneer.source.layout_file import FileBlob
from veneer.store.spanstore import Priority, open_store
from veneer.timing import RangeLog, answered, timed_range


async def test_a_request_is_noted_with_its_place_and_in_the_order_of_its_stages(tmp_path: Path) -> None:
    content = sample([64 * KIB] * 4)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(content.device, ScriptedSource(content.blob))
        await store.read(attached, 70 * KIB, 100)
        await store.read(attached, 70 * KIB, 200)
    (one,) = store.log.ranges
    spans = content.device.spans
    assert (one.device, one.priority, one.spans) == (content.device.key.hex, "demand", 1)
    assert (one.offset, one.length) == (spans.stored_offsets[1], spans.stored_lengths[1])
    assert (one.plain_offset, one.plain_length) == (64 * KIB, 64 * KIB)
    times = [one.queued, one.sent, one.first_byte, one.last_byte, one.ready]
    assert times == sorted(time for time in times if time is not None)
    assert one.busy_s > 0
    assert one.error is None
    _, reads = store.log.since(0.0, {content.device.key.hex})
    assert [(read.device, read.offset, read.length) for read in reads] == [
        (content.device.key.hex, 70 * KIB, 100),
        (content.device.key.hex, 70 * KIB, 200),
    ]
    assert reads[0].wait_s > 0
    assert reads[1].wait_s == 0


async def test_a_range_of_several_spans_is_one_request(tmp_path: Path) -> None:
    content = sample([64 * KIB] * 4)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(content.device, ScriptedSource(content.blob))
        store.prefetch(attached, 0, attached.size, priority=Priority.PROFILE)
        await store.read(attached, 0, attached.size)
    noted = sum(one.spans for one in store.log.ranges)
    assert noted == 4
    assert sum(one.length for one in store.log.ranges) == store.stats.bytes_fetched


async def test_a_failed_request_says_why_and_has_no_bytes(tmp_path: Path) -> None:
    content = sample([64 * KIB])

    async def fail(_number: int, _offset: int, _length: int, _answer: bytes) -> bytes:
        raise Unavailable("the registry is on fire")

    async with open_store(store_settings(tmp_path, deadline_s=0.5)) as store:
        attached = store.attach(content.device, ScriptedSource(content.blob, fail))
        with pytest.raises(Unavailable):
            await store.read(attached, 0, 10)
    one = store.log.ranges[0]
    assert one.error == "the registry is on fire"
    assert (one.first_byte, one.last_byte, one.ready) == (None, None, None)


async def test_the_first_byte_is_when_the_answer_began(tmp_path: Path) -> None:
    """A source that hands over a range as a whole: only the connection sees the answer's head."""
    content = sample([64 * KIB])
    heads: list[float] = []

    async def answer(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        answered()
        noted = timed_range.get()
        assert noted is not None
        assert noted.answered is not None
        heads.append(noted.answered)
        await trio.sleep(0.01)
        return answer

    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(content.device, ScriptedSource(content.blob, answer))
        await store.read(attached, 0, 10)
    (one,) = store.log.ranges
    assert one.first_byte == heads[0]
    assert one.last_byte is not None
    assert one.last_byte > heads[0]


async def test_a_file_answers_without_a_head(tmp_path: Path) -> None:
    content = sample([64 * KIB])
    (tmp_path / "blob").write_bytes(content.blob)
    async with open_store(store_settings(tmp_path)) as store:
        blob = FileBlob(tmp_path / "blob", "layout", len(content.blob))
        await store.read(store.attach(content.device, blob), 0, 10)
    (one,) = store.log.ranges
    assert one.first_byte == one.last_byte


def test_the_oldest_are_forgotten_and_counted() -> None:
    log = RangeLog(most_ranges=3, most_reads=2)
    device = log.of("a")
    for number in range(5):
        device.sent(number, 1, (number, 1), spans=1, priority="demand", queued=float(number))
        log.read("a", number, 1, 0.0)
    assert [one.offset for one in log.ranges] == [2, 3, 4]
    assert [one.offset for one in log.since(0.0, {"a"})[1]] == [3, 4]
    assert (log.sent, log.answered) == (5, 5)


def test_what_others_read_is_left_out() -> None:
    log = RangeLog()
    for name in ("mine", "theirs"):
        log.of(name).sent(0, 1, (0, 1), spans=1, priority="demand", queued=2.0)
        log.read(name, 0, 1, 0.0)
    ranges, reads = log.since(0.0, {"mine"})
    assert [one.device for one in ranges] == ["mine"]
    assert [one.device for one in reads] == ["mine"]
    assert log.since(2.5, {"mine"})[0] == []
