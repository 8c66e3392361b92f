"""Giving up devices: nothing of them stays behind, and nobody is harmed who is still at it."""

import gc
import itertools
import os
import random
import threading
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.store.rig import KIB, RAW, ScriptedSource, sample, sample_of, store_settings
from veneer.index.model import Codec
from veneer.store import devicefile, extents
from veneer.store.spanstore import Form, SpanStore, open_store


def descriptors() -> list[str]:
    """What this process has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names


async def one_life(store: SpanStore, seed: int, form: Form) -> "weakref.ref[object]":
    # The first spans are the same in all of them.
    alike = sample([20 * KIB] * 2, codecs=(RAW,)).plain
    pieces = [alike[: 20 * KIB], alike[20 * KIB :], random.Random(seed).randbytes(20 * KIB)]
    one = sample_of(pieces, codecs=(RAW,))
    attached = store.attach(one.device, ScriptedSource(one.blob), form=form)
    if form is Form.PLAIN:
        store.pin(attached, lambda: None)
        await store.fill(attached, 0, attached.size)
        store.unpin(attached)
    else:
        assert await store.read(attached, 0, attached.size) == one.plain
    store.detach(attached)
    store.detach(attached)
    return weakref.ref(attached)


@pytest.mark.parametrize("form", [Form.PLAIN, Form.STORED])
async def test_a_thousand_devices_one_after_the_other_leave_nothing_behind(tmp_path: Path, form: Form) -> None:
    async with open_store(store_settings(tmp_path)) as store:
        await one_life(store, 10_000, form)
        before = len(descriptors())
        references = [await one_life(store, seed, form) for seed in range(1_000 if form is Form.PLAIN else 50)]
        assert len(descriptors()) <= before, "somebody else may have closed some"
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert not any(reference() for reference in references)
        assert not store._memory._spans
        assert not store._memory._size
        assert not store._jobs._twins._first
        assert not store._cache._open


async def test_a_device_that_comes_back_has_what_it_had(tmp_path: Path) -> None:
    one = sample([20 * KIB] * 4, codecs=(RAW,))
    source = ScriptedSource(one.blob)
    async with open_store(store_settings(tmp_path)) as store:
        first = store.attach(one.device, source)
        await store.fill(first, 0, first.size)
        store.detach(first)
        assert (first.data_fd, first.all_present, first.complete) == (None, False, False)
        assert store.cached(first, 0, 1) is None
        assert not store.holds(first, 0, 1)
        again = store.attach(one.device, source)
        assert again is not first
        assert store.holds(again, 0, again.size)
    assert len(source.requests) == 1


async def test_a_pinned_device_cannot_be_given_up(tmp_path: Path) -> None:
    one = sample([20 * KIB], codecs=(RAW,))
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        store.pin(attached, lambda: None)
        with pytest.raises(ValueError, match="pinned"):
            store.detach(attached)
        assert attached.data_fd is not None
        store.unpin(attached)
        store.detach(attached)


async def test_the_other_twins_stay_twins(tmp_path: Path) -> None:
    ones = [sample([20 * KIB] * 3, codecs=(RAW,)), *(sample([20 * KIB] * n, codecs=(RAW,)) for n in (4, 5))]
    sources = [ScriptedSource(one.blob) for one in ones]
    async with open_store(store_settings(tmp_path)) as store:
        pairs = zip(ones, sources, strict=True)
        devices = [store.attach(one.device, source) for one, source in itertools.islice(pairs, 2)]
        await store.fill(devices[0], 0, 60 * KIB)
        await store.fill(devices[1], 0, 60 * KIB)
        store.detach(devices[0])
        devices += [store.attach(one.device, source) for one, source in pairs]
        # Looks for twins from now on.
        await store.fill(devices[2], 80 * KIB, 1)
        await store.fill(devices[2], 0, 60 * KIB)
        assert store.stats.copied == 6
        store.detach(devices[1])
        assert await store.read(devices[2], 0, devices[2].size) == ones[2].plain
    assert [bool(source.requests) for source in sources] == [True, False, True]


async def test_a_file_is_closed_only_when_the_threads_that_use_it_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than is written in one go: what is left of it then is given up.
    one = sample([900 * KIB] * 3, codecs=(RAW,))
    data = os.fspath(tmp_path / "cache" / "devices" / one.device.key.hex / "data")
    entered, proceed = threading.Event(), threading.Event()
    write_run = extents.write_run

    def write_late(fd: int, *args: object, **options: object) -> None:
        entered.set()
        assert proceed.wait(30)
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("/data")
        write_run(fd, *args, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(devicefile, "write_run", write_late)
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        store.prefetch(attached, 0, attached.size)
        await trio.to_thread.run_sync(entered.wait, 30)
        store.detach(attached)
        assert data in descriptors()
        proceed.set()
        with trio.fail_after(30):
            while data in descriptors():
                await trio.lowlevel.checkpoint()
        assert not any(one.device.key.hex in name for name in descriptors())
        assert attached.queue.jobs == {}
        assert not store._memory._spans


async def test_a_request_that_comes_back_after_all_is_dropped(tmp_path: Path) -> None:
    one = sample([20 * KIB] * 2, codecs=(Codec("raw"),))
    asked, answer = trio.Event(), trio.Event()

    async def late(_number: int, _offset: int, _length: int, right: bytes) -> bytes:
        asked.set()
        await answer.wait()
        return right

    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob, late))
        store.prefetch(attached, 0, attached.size)
        await asked.wait()
        store.detach(attached)
        answer.set()
        await trio.testing.wait_all_tasks_blocked()
        assert attached.queue.jobs == {}
        assert not store._memory._spans


async def test_what_waits_for_its_turn_is_not_asked_for_once_it_is_given_up(tmp_path: Path) -> None:
    one, two = (sample([20 * KIB] * 2, codecs=(RAW,), seed=seed) for seed in range(2))
    answer = trio.Event()

    async def late(_number: int, _offset: int, _length: int, right: bytes) -> bytes:
        await answer.wait()
        return right

    first, second = ScriptedSource(one.blob, late), ScriptedSource(two.blob)
    async with open_store(replace(store_settings(tmp_path), most_requests=1)) as store:
        store.prefetch(store.attach(one.device, first), 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        attached = store.attach(two.device, second)
        store.prefetch(attached, 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        store.detach(attached)
        answer.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (len(first.requests), second.requests) == (1, [])
        assert attached.queue.jobs == {}
