"""Several processes on one cache, and processes that die in the middle of it."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.store import child
from tests.store.rig import KIB, Sample, ScriptedSource, sample, store_settings
from veneer.store import extents
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.presence import PRESENT, Form, Layout
from veneer.store.spanstore import open_store

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def started(role: str, directory: Path, seed: int, count: int) -> "Iterator[subprocess.Popen[str]]":
    """A child that waits for :func:`go`; it does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.child", role, str(directory), str(seed), str(count)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def assert_sound(directory: Path, one: Sample) -> int:
    """Every span that the map vouches for is what it should be; returns how many there are."""
    path = directory / one.device.key.hex
    file = DeviceFile.open(path, Layout.of(one.device, Form.PLAIN))
    numbers = [number for number in range(len(one.device.spans)) if file.states[number] == PRESENT]
    for number in numbers:
        span = one.device.spans[number]
        data = file.read(span.offset, span.length)
        assert data == one.plain[span.offset : span.offset + span.length], f"span {number}"
        assert file.map.digest(number) == hashlib.sha256(data).digest()
    assert file.map.present_bytes == sum(one.device.spans[number].length for number in numbers)
    file.close()
    return len(numbers)


async def test_killed_processes_leave_nothing_wrong_behind(tmp_path: Path) -> None:
    one, rng = child.shared_sample(), random.Random(7)
    found = 0
    for seed in range(6):
        with started("fill", tmp_path, seed, 1_000_000) as process:
            go(process)
            assert process.stdout is not None
            for _ in range(rng.randrange(20, 120)):
                process.stdout.readline()
            process.kill()
            assert process.wait() == -9
        found += assert_sound(tmp_path / "cache" / "devices", one)
    assert found > 100
    async with open_store(store_settings(tmp_path)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        assert await store.read(attached, 0, attached.size) == one.plain


class Died(BaseException):
    """The process ended here."""


def test_dying_at_any_system_call_leaves_a_sound_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = sample([5 * KIB, 100, 9 * KIB, 4 * KIB, 1], seed=3)
    fills = [
        Fill(span.number, data, hashlib.sha256(data).digest())
        for span in one.device.spans
        for data in [one.plain[span.offset : span.offset + span.length]]
    ]
    calls, deadline = 0, 0

    def mortal(target: object, name: str) -> None:
        real = getattr(target, name)

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == deadline:
                raise Died(name)
            return real(*args)

        monkeypatch.setattr(target, name, call)

    def live(directory: Path) -> None:
        file = DeviceFile.open(directory / one.device.key.hex, Layout.of(one.device, Form.PLAIN))
        try:
            file.write(fills[:4])
            file.evict([1, 2])
            file.write(fills)
            file.evict([0, 4])
        finally:
            file.close()

    for target, name in (
        (os, "pwrite"), (os, "pwritev"), (os, "ftruncate"), (os, "posix_fallocate"), (Path, "rename"),
        (extents, "punch"),
    ):  # fmt: skip
        mortal(target, name)
    survived = False
    present: set[int] = set()
    for deadline in range(1, 200):
        directory = tmp_path / str(deadline)
        calls = 0
        try:
            live(directory)
            survived = True
        except Died:
            pass
        calls = -1000
        present.add(assert_sound(directory, one))
        live(directory)
        assert assert_sound(directory, one) == 3
        if survived:
            break
    assert survived
    assert deadline > 25
    assert present == {0, 2, 3, 4, 5}


async def test_readers_stay_right_while_another_process_evicts(tmp_path: Path) -> None:
    one = child.shared_sample()
    async with open_store(store_settings(tmp_path)) as store:
        assert await store.fetch_rest(store.attach(one.device, ScriptedSource(one.blob)))
    totals = {"hits": 0, "misses": 0}
    with ExitStack() as stack:
        readers = [stack.enter_context(started("read", tmp_path, seed, 1500)) for seed in range(3)]
        evictor = stack.enter_context(started("evict", tmp_path, 9, 20))
        for process in (*readers, evictor):
            go(process)
        for process in readers:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            stats = json.loads(out)
            assert stats["dropped"] == stats["verify_failures"] == stats["errors"] == 0
            for name in totals:
                totals[name] += stats[name]
        (tmp_path / "stop").touch()
        out, _ = evictor.communicate(timeout=60)
        assert evictor.returncode == 0
    assert int(out) > 1_000_000
    assert totals["hits"] > 200
    assert totals["misses"] > 200
    assert_sound(tmp_path / "cache" / "devices", one)
