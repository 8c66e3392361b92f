"""A process of its own verifies, decodes and writes what bulk fetches; whatever becomes of it, all is right."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.store.rig import GZIP, KIB, RAW, ZSTD, Sample, ScriptedSource, gzip_sample, sample, store_settings
from veneer.codec import check_and_decode
from veneer.errors import IntegrityError
from veneer.index.model import Span
from veneer.source.base import WithWindows
from veneer.store import decoder as module
from veneer.store import jobs
from veneer.store.cache import DeviceCache
from veneer.store.decoder import Decoder
from veneer.store.decoder_main import Answer
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.presence import EMPTY, PRESENT, Form, Layout
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store

#: Spans that begin and end inside of blocks of the file system.
SPAN = 60_001
SPANS = 150
#: How long to wait for what has to come.
SOON_S = 30.0


@pytest.fixture(scope="module")
def one() -> Sample:
    return sample([SPAN] * SPANS, codecs=(ZSTD, RAW, GZIP))


class Watched(Decoder):
    """Notes what it is asked for, and lets something happen once that has been done."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.asked = trio.Event()
        self.afterwards: Callable[[Sequence[Span]], None] = lambda _: None

    async def fill(self, data_fd: int, spans: Sequence[Span], base: int, data: bytes) -> Answer | None:
        self.asked.set()
        answer = await super().fill(data_fd, spans, base, data)
        self.afterwards(spans)
        return answer


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(SOON_S):
        while not condition():  # noqa: ASYNC110 - another process has no event for us
            await trio.sleep(0.01)


def has_ended(pid: int | None) -> bool:
    return not Path(f"/proc/{pid}").exists()


@asynccontextmanager
async def decoding() -> AsyncIterator[Watched]:
    """One that has its process already."""
    async with trio.open_nursery() as nursery:
        decoder = Watched(nursery)
        decoder.want()
        await until(lambda: decoder.running)
        yield decoder
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(directory: Path, decoder: Decoder) -> AsyncIterator[SpanStore]:
    async with open_store(store_settings(directory), decoder=decoder) as store:
        yield store


def is_right(attached: AttachedDevice, one: Sample) -> bool:
    """Whether the disk has all of it."""
    file = attached.file
    assert file is not None
    return attached.all_present and os.pread(file.fd, len(one.plain), 0) == one.plain


async def stopped(store: SpanStore, attached: AttachedDevice, decoder: Watched, then: signal.Signals) -> None:
    """Fetch a device while the process stands still, and gets a signal once it has something to do."""
    pid = decoder.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.fetch_rest, attached)
        await decoder.asked.wait()
        await trio.sleep(0.05)
        assert not any(attached.held()), "nothing counts as present before there is an answer"
        os.kill(pid, then)


async def test_it_does_the_work_of_bulk(tmp_path: Path, one: Sample) -> None:
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        assert await store.fetch_rest(attached)
        assert is_right(attached, one)
        assert await store.prove(attached)
        assert store.stats.entrusted == store.stats.spans_fetched == SPANS
        file = attached.file
        assert file is not None
        assert file.verify(range(SPANS)).right == SPANS, "the map has the digests of what is there"


async def test_it_is_started_once_all_of_a_large_device_is_fetched(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_WORTH_A_PROCESS", 5 << 20)
    async with trio.open_nursery() as nursery:
        decoder = Decoder(nursery)
        async with opened(tmp_path, decoder) as store:
            attached = store.attach(one.device, ScriptedSource(one.blob))
            await store.read(attached, 0, 10 * SPAN)
            assert decoder.pid is None, "a reader is served without it"
            assert await store.fetch_rest(attached)
            await until(lambda: decoder.running)
            assert is_right(attached, one)
        nursery.cancel_scope.cancel()


async def test_it_is_not_started_for_little(tmp_path: Path, one: Sample) -> None:
    async with trio.open_nursery() as nursery:
        decoder = Decoder(nursery)
        async with opened(tmp_path, decoder) as store:
            attached = store.attach(one.device, ScriptedSource(one.blob))
            assert await store.fetch_rest(attached)
            await trio.sleep(0.2)
            assert not decoder.running
            assert is_right(attached, one)
        nursery.cancel_scope.cancel()


async def test_it_ends_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.1)
    async with decoding() as decoder:
        pid = decoder.pid
        await until(lambda: not decoder.running)
        await until(lambda: has_ended(pid))
        decoder.want()
        await until(lambda: decoder.running)


async def test_it_ends_with_its_owner() -> None:
    async with decoding() as decoder:
        pid = decoder.pid
    assert has_ended(pid)


async def test_readers_of_what_it_has_get_their_bytes(tmp_path: Path, one: Sample) -> None:
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        pid = decoder.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        got: list[bytes] = []

        async def read(offset: int) -> None:
            got.append(await store.read(attached, offset, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.fetch_rest, attached)
            await decoder.asked.wait()
            for number in range(3):
                nursery.start_soon(read, number * SPAN)
            await trio.sleep(0.05)
            os.kill(pid, signal.SIGCONT)
        assert sorted(got) == sorted(one.plain[number * SPAN :][:100] for number in range(3))
        assert is_right(attached, one)


async def test_one_that_dies_is_done_without(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That it died is told, not waited for.
    monkeypatch.setattr(module, "_PATIENCE_S", 3600)
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        first = decoder.pid
        await stopped(store, attached, decoder, signal.SIGKILL)
        assert is_right(attached, one)
        assert store.stats.entrusted < SPANS
        assert store.stats.bytes_fetched == len(one.blob), "nothing was fetched again for it"
        decoder.want()
        await until(lambda: decoder.running)
        assert decoder.pid != first


async def test_one_that_hangs_is_done_without(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        pid = decoder.pid
        await stopped(store, attached, decoder, signal.SIGSTOP)
        assert is_right(attached, one)
        assert store.stats.entrusted < SPANS
        assert store.stats.bytes_fetched == len(one.blob), "nothing was fetched again for it"
        await until(lambda: has_ended(pid))


async def test_one_that_keeps_dying_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with decoding() as decoder:
        for _ in range(3):
            decoder.want()
            await until(lambda: decoder.running)
            pid = decoder.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not decoder.running)
        await until(lambda: has_ended(pid))

        def another(*_: object, **__: object) -> None:
            raise AssertionError("a fourth one was started")

        monkeypatch.setattr(subprocess, "Popen", another)
        decoder.want()
        await trio.sleep(0.1)


@pytest.mark.parametrize(
    "answer",
    ["b''", "b'nothing'", "struct.pack('=Qd', 7, 0.0)", "struct.pack('=Qd', 0, 0.0) + bytes(range(64))"],
    ids=["the end", "too short", "of another batch", "for other spans"],
)
async def test_one_that_answers_nonsense_is_done_without(
    tmp_path: Path,
    one: Sample,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = (
        "import socket, struct, sys\n"
        "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        "sock.send(b'ready')\n"
        f"while sock.recv(1 << 17): sock.send({answer})\n"
    )
    monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", program))
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        assert await store.fetch_rest(attached)
        assert is_right(attached, one)
        assert store.stats.entrusted == 0
        assert "is given up" in caplog.text


async def test_it_marks_nothing_that_is_wrong(tmp_path: Path, one: Sample) -> None:
    bad = one.device.spans[20]

    async def flip(_number: int, offset: int, _length: int, answer: bytes) -> bytes:
        place = bad.stored_offset + 5 - offset
        if not 0 <= place < len(answer):
            return answer
        return answer[:place] + bytes([answer[place] ^ 1]) + answer[place + 1 :]

    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        source = ScriptedSource(one.blob, flip)
        attached = store.attach(one.device, source)
        for _ in range(3):
            # What is wrong ends it, and costs what came with it nothing.
            assert not await store.fetch_rest(attached)
        file = attached.file
        assert file is not None
        assert [n for n, state in enumerate(file.states) if state != PRESENT] == [20]
        assert not any(os.pread(file.fd, SPAN, 20 * SPAN)), "no byte of it was written"
        assert store.stats.verify_failures > 0
        assert store.stats.entrusted > SPANS // 2
        with pytest.raises(IntegrityError, match="span 20"):
            await store.read(attached, 20 * SPAN, 1)
        source.fault = None
        assert await store.read(attached, 0, len(one.plain)) == one.plain


async def test_a_disk_that_refuses_it_is_left_to_those_who_know_what_to_do(tmp_path: Path, one: Sample) -> None:
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        pid = decoder.pid
        assert pid is not None
        # As on a disk that is full from some place on; there is room for this process.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (50 * SPAN + 7, resource.RLIM_INFINITY))
        assert await store.fetch_rest(attached)
        assert is_right(attached, one)
        assert 0 < store.stats.entrusted <= 50
        assert decoder.pid == pid, "it is not to blame"


@pytest.mark.parametrize("loss", ["evicted", "not written"])
async def test_nothing_is_marked_after_something_was_punched_out(
    tmp_path: Path, one: Sample, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Punching a span takes the rest of its blocks along, where nothing is marked yet."""
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 70 * SPAN, 1)
        file = attached.file
        assert file is not None
        present = [n for n in range(SPANS) if file.states[n] == PRESENT]
        assert 70 in present

        def lose(spans: Sequence[Span]) -> None:
            decoder.afterwards = lambda _: None
            if loss == "evicted":
                file.evict(present)
            else:
                number, begin, length = spans[3][:3]
                fill = Fill(number, one.plain[begin : begin + length], spans[3].digest)
                monkeypatch.setattr(os, "pwritev", fail)
                with pytest.raises(OSError, match="full"):
                    file.write([fill])
                monkeypatch.undo()

        decoder.afterwards = lose
        came = await store.fetch_rest(attached)
        assert came or loss == "evicted", "what was not taken over is done here"
        await store.fetch_rest(attached)
        assert is_right(attached, one)
        assert file.verify(range(SPANS)).right == SPANS


def fail(*_: object) -> int:
    raise OSError(28, "the disk is full")


def test_what_was_written_before_a_punch_is_not_taken_over(tmp_path: Path, one: Sample) -> None:
    file = DeviceFile.open(tmp_path / "device", Layout.of(one.device, Form.PLAIN))
    spans = one.device.spans
    file.write([Fill(1, one.plain[SPAN : 2 * SPAN], spans[1].digest)])
    generation = file.entrust()
    assert generation is not None
    os.pwrite(file.fd, one.plain[2 * SPAN : 3 * SPAN], 2 * SPAN)
    file.evict([1])
    assert os.pread(file.fd, SPAN, 2 * SPAN) != one.plain[2 * SPAN : 3 * SPAN], "its first block is gone"
    assert file.take_over(generation, {2: spans[2].digest}) is None
    assert file.states[2] == EMPTY
    again = file.entrust()
    assert again is not None
    os.pwrite(file.fd, one.plain[2 * SPAN : 3 * SPAN], 2 * SPAN)
    assert file.take_over(again, {2: spans[2].digest}) == SPAN
    assert file.read(2 * SPAN, SPAN) == one.plain[2 * SPAN : 3 * SPAN]
    file.close()


async def test_a_device_that_is_given_up_stays_open_until_it_is_done(tmp_path: Path, one: Sample) -> None:
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        pid, file = decoder.pid, attached.file
        assert pid is not None
        assert file is not None
        fd = file.fd
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.fetch_rest, attached)
            await decoder.asked.wait()
            await trio.sleep(0.05)
            store.detach(attached)
            nursery.cancel_scope.cancel()
            await trio.lowlevel.cancel_shielded_checkpoint()
            assert os.readlink(f"/proc/self/fd/{fd}").endswith("/data"), "the number is nobody else's"
            os.kill(pid, signal.SIGCONT)
        again = store.attach(one.device, ScriptedSource(one.blob))
        assert await store.fetch_rest(again)
        assert is_right(again, one)


async def test_what_it_had_is_counted_once(tmp_path: Path, one: Sample) -> None:
    quota = 64 << 20
    cache = DeviceCache(tmp_path / "cache", quota)
    async with decoding() as decoder, trio.open_nursery() as nursery:
        store = SpanStore(cache, nursery=nursery, read_deadline_s=30, decoder=decoder)

        def held() -> int:
            return next(size for size in range(0, quota, SPAN) if cache.has_room(quota - size))

        attached = store.attach(one.device, ScriptedSource(one.blob))
        await stopped(store, attached, decoder, signal.SIGKILL)
        assert held() == len(one.plain)
        file = attached.file
        assert file is not None
        cache.evict(file, range(SPANS))
        assert held() == 0
        decoder.want()
        await until(lambda: decoder.running)
        assert await store.fetch_rest(attached)
        assert held() == len(one.plain)
        nursery.cancel_scope.cancel()
        store.close()


@pytest.mark.parametrize("seal", ["aes-gcm", ""], ids=["kept sealed", "kept plain"])
async def test_what_takes_a_key_is_not_entrusted(tmp_path: Path, seal: str) -> None:
    sealed = sample([SPAN] * SPANS, codecs=(replace(RAW, seal=seal),))

    def open_seal(span: Span, stored: bytes | memoryview, what: str) -> bytes:
        return check_and_decode(span._replace(codec=RAW), stored, what)

    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        attached = store.attach(sealed.device, ScriptedSource(sealed.blob), decode=open_seal)
        await store.fetch_rest(attached)
        assert await store.read(attached, 0, len(sealed.plain)) == sealed.plain
        assert not decoder.asked.is_set()


async def test_what_takes_windows_is_not_entrusted(tmp_path: Path) -> None:
    gzip = gzip_sample(os.urandom(60 * KIB) * 80, tmp_path)
    async with decoding() as decoder, opened(tmp_path, decoder) as store:
        source = WithWindows(ScriptedSource(gzip.blob), ScriptedSource(gzip.windows, name="registry.test/w"))
        attached = store.attach(gzip.device, source)
        assert await store.fetch_rest(attached)
        assert await store.read(attached, 0, len(gzip.plain)) == gzip.plain
        assert attached.windows is not None
