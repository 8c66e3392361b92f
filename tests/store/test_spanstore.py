"""Reads through the store: single flight, coalescing, priorities, forms, copies, completion."""

import errno
import math
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.store.rig import GZIP, KIB, MIB, RAW, ZSTD, ScriptedSource, sample, sample_of, store_settings
from veneer.codec import check_and_decode
from veneer.errors import UsageError
from veneer.index.model import Codec, Span
from veneer.store import presence
from veneer.store.devicefile import DeviceFile
from veneer.store.spanstore import AttachedDevice, Form, Priority, SpanStore, open_store


class Gate:
    """A fault that holds every request until it is opened; requests after that pass."""

    def __init__(self) -> None:
        self.open = trio.Event()

    async def __call__(self, _number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        await self.open.wait()
        return answer


async def test_a_read_fetches_verifies_keeps_and_the_next_one_finds(tmp_path: Path) -> None:
    one = sample([20 * KIB] * 10, codecs=(RAW, ZSTD, GZIP))
    source = ScriptedSource(one.blob)
    seen: list[tuple[str, int, int, bool]] = []
    settings = store_settings(tmp_path)
    async with open_store(settings, on_access=lambda *a: seen.append((*a[:3], a[3] > 0))) as store:
        attached = store.attach(one.device, source)
        assert store.attach(one.device, source) is attached
        assert store.cached(attached, 5, 10) is None
        assert await store.read(attached, 15 * KIB, 50 * KIB) == one.plain[15 * KIB : 65 * KIB]
        assert source.requests == [(0, sum(one.device.spans.stored_lengths[:4]))]
        assert store.cached(attached, 0, 80 * KIB) == one.plain[: 80 * KIB]
        assert await store.read(attached, 79 * KIB, 10) == one.plain[79 * KIB : 79 * KIB + 10]
        assert await store.read(attached, 7, 0) == b""
        with pytest.raises(ValueError, match="outside"):
            await store.read(attached, len(one.plain), 1)
        stats = store.stats
        assert (stats.requests, stats.spans_fetched, stats.hits, stats.misses) == (1, 4, 3, 1)
        assert stats.bytes_fetched == source.requests[0][1]
        assert seen[0] == (one.device.key.hex, 15 * KIB, 50 * KIB, True)
        assert not seen[1][3]
    async with open_store(settings) as store:
        attached = store.attach(one.device, source)
        assert store.cached(attached, 0, 80 * KIB) == one.plain[: 80 * KIB]
    assert len(source.requests) == 1


async def test_many_readers_of_one_span_make_one_fetch_and_a_cancelled_one_harms_nobody(tmp_path: Path) -> None:
    one = sample([30 * KIB] * 4)
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    results: list[bytes] = []
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)

        async def read(offset: int, scope: trio.CancelScope | None = None) -> None:
            with scope or trio.CancelScope():
                results.append(await store.read(attached, offset, 100))

        first = trio.CancelScope()
        nursery.start_soon(read, 0, first)
        await wait_all_tasks_blocked()
        for offset in range(20):
            nursery.start_soon(read, offset)
        await wait_all_tasks_blocked()
        first.cancel()
        await wait_all_tasks_blocked()
        gate.open.set()
    assert sorted(results) == sorted(one.plain[offset : offset + 100] for offset in range(20))
    assert len(source.requests) == 1


async def test_a_queued_fetch_is_dropped_with_its_last_reader(tmp_path: Path) -> None:
    one = sample([300 * KIB] * 20, codecs=(RAW,))
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)

        async def read(number: int, scope: trio.CancelScope) -> None:
            with scope:
                await store.read(attached, number * 300 * KIB, 1)

        scopes = [trio.CancelScope() for _ in range(10)]
        for i, scope in enumerate(scopes):
            nursery.start_soon(read, 2 * i, scope)
        await wait_all_tasks_blocked()
        assert len(source.requests) == 8, "all slots are taken"
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        gate.open.set()
        await finished(attached)
        assert len(source.requests) == 8
        assert store.stats.spans_fetched == 8, "a fetch that had started is worth finishing"
        assert store.stats.errors == 0


async def finished(attached: AttachedDevice) -> None:
    """Wait for every job there is."""
    for job in list(attached.queue.jobs.values()):
        await job.done.wait()


async def test_misses_of_readers_that_come_together_become_one_request(tmp_path: Path) -> None:
    one = sample([4 * KIB] * 30, codecs=(RAW,))
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        async with trio.open_nursery() as nursery:
            for number in (3, 9, 4, 8):
                nursery.start_soon(store.read, attached, number * 4 * KIB, 1)
        assert source.requests == [(3 * 4 * KIB, 7 * 4 * KIB)], "the gap is cheaper than a round trip"
        assert store.cached(attached, 12 * KIB, 28 * KIB) is not None, "and its spans are kept"


@pytest.mark.parametrize("there", [True, False], ids=["there", "under way"])
async def test_what_lies_in_a_gap_is_verified_only_if_nobody_has_asked_for_it(
    tmp_path: Path, there: bool
) -> None:
    one, gate = sample([4 * KIB] * 3, codecs=(RAW,)), Gate()
    source = ScriptedSource(one.blob, gate)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, attached, 4 * KIB, 1)
            await wait_all_tasks_blocked()
            if there:
                gate.open.set()
                await finished(attached)
            for number in (0, 2):
                nursery.start_soon(store.read, attached, number * 4 * KIB, 1)
            await wait_all_tasks_blocked()
            gate.open.set()
        assert source.requests == [(4 * KIB, 4 * KIB), (0, 12 * KIB)]
        assert store.stats.spans_fetched == 3


@pytest.mark.parametrize("order", [(0, 2, 10), (10, 2, 0)])
async def test_a_gap_that_costs_more_than_a_round_trip_is_not_fetched(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    one = sample([4 * KIB] * 400, codecs=(RAW,))
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, source)
        # 1 ms and 10 MB/s: a round trip is worth 10 kB.
        for length in (10_000, 200_000, 400_000) * 20:
            attached.queue.link.observe(length, 0.001 + length / 10e6)
        for number in order:
            store.prefetch(attached, number * 4 * KIB, number * 4 * KIB + 1)
        await finished(attached)
        assert sorted(source.requests) == [(0, 12 * KIB), (40 * KIB, 4 * KIB)]


async def test_a_window_is_fetched_with_the_miss_in_several_ranges_demand_first(tmp_path: Path) -> None:
    one = sample([128 * KIB] * 64, codecs=(RAW,))
    gate = Gate()
    source = ScriptedSource(one.blob, gate)
    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)
        limit = attached.queue.link.range_limit
        nursery.start_soon(read_window, store, attached, 3 * MIB, (2 * MIB, 6 * MIB))
        await wait_all_tasks_blocked()
        offset, length = source.requests[0]
        assert offset <= 3 * MIB < offset + length <= offset + limit
        assert len(source.requests) == 4, "read-ahead leaves slots free"
        gate.open.set()
        await finished(attached)
        assert store.cached(attached, 2 * MIB, 4 * MIB) == one.plain[2 * MIB : 6 * MIB]
        assert store.cached(attached, 2 * MIB - 1, 1) is None
        assert store.cached(attached, 6 * MIB, 1) is None
        assert sum(length for _, length in source.requests) == 4 * MIB
        assert len(source.requests) <= math.ceil(4 * MIB / limit) + 2


async def read_window(store: SpanStore, attached: AttachedDevice, offset: int, window: tuple[int, int]) -> None:
    await store.read(attached, offset, 1, window=window)


async def test_demand_overtakes_what_is_queued_and_promotes_it(tmp_path: Path) -> None:
    one = sample([500 * KIB] * 40, codecs=(RAW,))
    gate = Gate()
    source = ScriptedSource(one.blob, gate)

    def asked() -> list[int]:
        return [offset // (500 * KIB) for offset, _ in source.requests]

    async with open_store(store_settings(tmp_path)) as store, trio.open_nursery() as nursery:
        attached = store.attach(one.device, source)
        store.prefetch(attached, 0, len(one.plain), priority=Priority.COMPLETION)
        await wait_all_tasks_blocked()
        assert asked() == [0, 3, 6, 9], "completion asks for long ranges, and leaves slots free"
        nursery.start_soon(store.read, attached, 39 * 500 * KIB, 1)
        await wait_all_tasks_blocked()
        assert asked()[4:] == [39], "demand has slots of its own"
        gate.open.set()
        await finished(attached)
        assert sum(length for _, length in source.requests) == len(one.blob), "nothing was fetched twice"


async def test_decoded_spans_of_a_long_read_come_in_order_whatever_their_codec(tmp_path: Path) -> None:
    one = sample([90 * KIB, 1, 200 * KIB, 70, 400 * KIB] * 8, codecs=(ZSTD, RAW, GZIP), gap=13)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        assert await store.read(attached, 0, len(one.plain)) == one.plain
        assert store.cached(attached, 0, len(one.plain)) == one.plain


async def test_identical_spans_are_copied_from_a_device_that_has_them(tmp_path: Path) -> None:
    pieces = [bytes([i]) * 9000 for i in range(8)]
    one, two = sample_of(pieces), sample_of([b"new" * 1000, *pieces[2:6], pieces[2]])
    sources = ScriptedSource(one.blob), ScriptedSource(two.blob)
    async with open_store(store_settings(tmp_path)) as store:
        first, second = store.attach(one.device, sources[0]), store.attach(two.device, sources[1])
        await store.read(first, 0, first.size)
        assert await store.read(second, 3000, second.size - 3000) == two.plain[3000:]
        assert sources[1].requests == []
        assert store.stats.copied == 5
        assert store.cached(second, 3000, second.size - 3000) == two.plain[3000:]
        assert await store.read(second, 0, 10) == two.plain[:10]
        assert len(sources[1].requests) == 1


async def test_another_device_is_never_read_by_the_thread_that_may_have_to_let_it_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_span, readers = DeviceFile.read_span, set[int]()

    def noted(file: DeviceFile, number: int, trusted: int = presence.PRESENT) -> bytes | None:
        readers.add(threading.get_ident())
        return read_span(file, number, trusted)

    one, two = sample_of([b"a" * 9000, b"b"]), sample_of([b"a" * 9000, b"c"])
    async with open_store(store_settings(tmp_path)) as store:
        first, second = (store.attach(s.device, ScriptedSource(s.blob)) for s in (one, two))
        await store.read(first, 0, 1)
        monkeypatch.setattr(DeviceFile, "read_span", noted)
        assert await store.read(second, 0, 9000) == b"a" * 9000
        assert store.stats.copied == 1
    assert readers
    assert threading.get_ident() not in readers


async def test_a_copy_of_bytes_that_were_altered_on_disk_is_fetched_instead(tmp_path: Path) -> None:
    one, two = sample_of([b"a" * 9000, b"b"]), sample_of([b"a" * 9000, b"c"])
    async with open_store(store_settings(tmp_path)) as store:
        first, second = (store.attach(s.device, ScriptedSource(s.blob)) for s in (one, two))
        await store.read(first, 0, 1)
        assert first.file is not None
        with (first.file.directory / "data").open("r+b") as file:
            file.write(b"evil")
        assert await store.read(second, 0, 9000) == b"a" * 9000
        assert store.stats.copied == 0


def open_seal(span: Span, stored: bytes | memoryview, what: str) -> bytes:
    """A seal for tests: check_and_decode around the bytes, once the seal's name is taken off."""
    return check_and_decode(span._replace(codec=Codec(span.codec.name)), stored, what)


async def test_sealed_devices_keep_the_stored_form_on_disk_and_plain_bytes_in_memory(tmp_path: Path) -> None:
    secret = [bytes([65 + i]) * 50_000 for i in range(6)]
    one = sample_of(secret, codecs=(Codec("zstd", "test-seal"),), gap=7)
    source = ScriptedSource(one.blob)
    settings = store_settings(tmp_path)
    async with open_store(settings) as store:
        with pytest.raises(ValueError, match="sealed"):
            store.attach(one.device, source, form=Form.PLAIN)
        attached = store.attach(one.device, source, decode=open_seal)
        assert await store.read(attached, 49_000, 52_000) == one.plain[49_000:101_000]
        assert store.cached(attached, 50_000, 50_000) == secret[1]
        assert store.stats.uncached == 0
    data = (settings.cache_dir / "devices" / one.device.key.hex / "data").read_bytes()
    assert secret[1][:100] not in data
    assert len(data) == len(one.blob)
    async with open_store(settings) as store:
        attached = store.attach(one.device, source, decode=open_seal)
        assert store.cached(attached, 50_000, 10) is None, "plaintext did not survive the process"
        assert await store.read(attached, 50_000, 50_000) == secret[1]
        assert len(source.requests) == 1
        assert await store.read(attached, 0, attached.size) == one.plain
    assert store.stats.errors == 0


async def test_stored_form_that_rotted_on_disk_is_fetched_again(tmp_path: Path) -> None:
    one = sample([50 * KIB] * 3)
    settings, source = store_settings(tmp_path), ScriptedSource(one.blob)
    async with open_store(settings) as store:
        attached = store.attach(one.device, source, form=Form.STORED)
        await store.read(attached, 0, attached.size)
    with (settings.cache_dir / "devices" / one.device.key.hex / "data").open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    async with open_store(settings) as store:
        attached = store.attach(one.device, source, form=Form.STORED)
        assert await store.read(attached, 0, attached.size) == one.plain
        assert store.stats.dropped == 1
    assert len(source.requests) == 2
    async with open_store(settings) as store:
        attached = store.attach(one.device, source, form=Form.STORED)
        assert await store.read(attached, 0, attached.size) == one.plain
    assert len(source.requests) == 2, "what came is on the disk in place of what had rotted"


async def test_after_a_boot_stored_form_is_verified_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample([50 * KIB] * 3)
    settings, source = store_settings(tmp_path), ScriptedSource(one.blob)
    async with open_store(settings) as store:
        await store.read(store.attach(one.device, source, form=Form.STORED), 0, len(one.plain))
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    async with open_store(settings) as store:
        attached = store.attach(one.device, source, form=Form.STORED)
        assert await store.read(attached, 0, attached.size) == one.plain
        assert (store.stats.reverified, store.stats.dropped) == (3, 0)
    assert len(source.requests) == 1


async def test_what_cannot_be_verified_after_a_boot_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_file: DeviceFile, _numbers: Iterable[int]) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    one = sample([50 * KIB] * 3)
    settings, source = store_settings(tmp_path), ScriptedSource(one.blob)
    async with open_store(settings) as store:
        await store.read(store.attach(one.device, source), 0, len(one.plain))
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    monkeypatch.setattr(DeviceFile, "verify", read_only)
    async with open_store(settings) as store:
        attached = store.attach(one.device, source)
        assert await store.read(attached, 0, attached.size) == one.plain
    assert len(source.requests) == 2


async def test_after_a_boot_what_is_damaged_is_fetched_again_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = sample([50 * KIB] * 8)
    settings, source = store_settings(tmp_path), ScriptedSource(one.blob)
    async with open_store(settings) as store:
        await store.read(store.attach(one.device, source), 0, len(one.plain))
    with (settings.cache_dir / "devices" / one.device.key.hex / "data").open("r+b") as file:
        file.seek(110 * KIB)
        file.write(bytes(4 * KIB))
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    source.requests.clear()
    async with open_store(settings) as store:
        attached = store.attach(one.device, source)
        assert store.cached(attached, 0, 1) is None
        assert await store.read(attached, 0, attached.size) == one.plain
        span = one.device.spans[2]
        assert source.requests == [(span.stored_offset, span.stored_length)]
        assert (store.stats.reverified, store.stats.dropped) == (7, 1)
        assert "span 2" in caplog.text
        assert store.cached(attached, 0, attached.size) == one.plain


async def test_an_error_of_the_body_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    one = sample([10 * KIB])
    gate = Gate()

    async def body() -> None:
        async with open_store(store_settings(tmp_path)) as store:
            attached = store.attach(one.device, ScriptedSource(one.blob, gate))
            store.prefetch(attached, 0, 10)
            await wait_all_tasks_blocked()
            raise UsageError("mine")

    with pytest.raises(UsageError, match="mine"):
        await body()


async def test_a_bug_in_a_source_ends_the_store_loudly(tmp_path: Path) -> None:
    async def bug(_number: int, _offset: int, _length: int, _answer: bytes) -> bytes:
        raise ZeroDivisionError

    one = sample([10 * KIB])
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_store(store_settings(tmp_path)) as store:
            await store.read(store.attach(one.device, ScriptedSource(one.blob, bug)), 0, 1)
    assert caught.group_contains(ZeroDivisionError)
