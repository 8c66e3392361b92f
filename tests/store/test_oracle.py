"""Whatever happens to source, cache and machine: never a wrong byte, and a right one in the end."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.store.rig import GZIP, KIB, RAW, ZSTD, Fault, ScriptedSource, sample, store_settings
from veneer.errors import Unavailable, VeneerError
from veneer.store.maintenance import clear, collect
from veneer.store.spanstore import AttachedDevice, Form, Priority, SpanStore, open_store

SAMPLE = sample(
    [random.Random(i).choice((1, 100, 512, 4 * KIB, 5000, 9000)) for i in range(40)],
    codecs=(ZSTD, RAW, GZIP),
    gap=20,
)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 10**6), st.integers(0, 30_000)),
        st.tuples(st.just("readers"), st.integers(0, 10**6), st.integers(1, 20_000)),
        st.tuples(st.just("prefetch"), st.integers(0, 10**6), st.integers(0, 10**5)),
        st.tuples(st.just("collect"), st.integers(0, 10**5), st.just(0)),
        st.tuples(st.sampled_from(["clear", "reopen", "reboot", "complete"]), st.just(0), st.just(0)),
        st.tuples(st.just("damage"), st.integers(0, 10**6), st.integers(1, 5000)),
    ),
    max_size=25,
)


def unreliable(rng: random.Random, rate: float) -> Fault:
    async def fault(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        await trio.sleep(rng.random() / 10)
        if rng.random() >= rate:
            return answer
        match rng.randrange(4):
            case 0:
                raise Unavailable("reset")
            case 1:
                return answer[: rng.randrange(len(answer))]
            case 2:
                at = rng.randrange(len(answer))
                return answer[:at] + bytes([answer[at] ^ 1 << rng.randrange(8)]) + answer[at + 1 :]
            case _:
                return rng.randbytes(len(answer))

    return fault


async def run_here(function: Callable[..., object], *args: object, **_limits: object) -> object:
    """In place of a worker thread: while one works, a clock that jumps would jump past the deadlines."""
    return function(*args)


class Machine:
    """One machine with a cache: performs steps, compares every byte that comes out."""

    def __init__(self, directory: Path, rng: random.Random, rate: float, quota: int, form: Form) -> None:
        self.directory = directory
        self.source = ScriptedSource(SAMPLE.blob, unreliable(rng, rate))
        self.settings = store_settings(directory, quota=quota, deadline_s=60)
        self.form = form
        self.boot = 0

    async def run(self, todo: list[tuple[str, int, int]]) -> None:
        while todo:
            with patch("veneer.store.presence.boot_id", lambda: self.boot.to_bytes(16, "big")):
                async with open_store(self.settings) as store:
                    attached = store.attach(SAMPLE.device, self.source, form=self.form)
                    while todo and await self.step(store, attached, *todo.pop()):
                        pass
        with patch("veneer.store.presence.boot_id", lambda: self.boot.to_bytes(16, "big")):
            async with open_store(self.settings) as store:
                self.source.fault = None
                attached = store.attach(SAMPLE.device, self.source, form=self.form)
                assert await store.read(attached, 0, attached.size) == SAMPLE.plain

    async def step(self, store: SpanStore, attached: AttachedDevice, what: str, a: int, b: int) -> bool:
        """Whether the store stays open."""
        offset = a % attached.size
        length = min(b, attached.size - offset)
        match what:
            case "read":
                await self.read(store, attached, offset, length)
            case "readers":
                async with trio.open_nursery() as nursery:
                    for i in range(5):
                        part = min(length, attached.size - offset) * (i + 1) // 5
                        nursery.start_soon(self.read, store, attached, offset, part)
            case "prefetch":
                store.prefetch(attached, a, a + b, priority=Priority.PROFILE)
            case "collect":
                collect(self.settings.cache_dir, a)
            case "clear":
                clear(self.settings.cache_dir)
            case "complete":
                if await store.fetch_rest(attached):
                    await store.prove(attached)
            case "damage":
                # What a crash of the machine may do: it is noticed after the boot.
                self.boot += 1
                path = self.settings.cache_dir / "devices" / SAMPLE.device.key.hex / "data"
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(bytes(length))
                return False
            case "reboot":
                self.boot += 1
                return False
            case "reopen":
                return False
        return True

    async def read(self, store: SpanStore, attached: AttachedDevice, offset: int, length: int) -> None:
        try:
            data = store.cached(attached, offset, length)
            if data is None:
                data = await store.read(attached, offset, length, window=(offset, offset + 2 * length))
        except VeneerError:
            return
        assert data == SAMPLE.plain[offset : offset + length]


@given(
    steps,
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([1 << 30, 60_000, 3000]),
    st.sampled_from(Form),
)
@settings(max_examples=120, deadline=None)
def test_reads_equal_the_oracle(
    todo: list[tuple[str, int, int]], rng: random.Random, rate: float, quota: int, form: Form
) -> None:
    with TemporaryDirectory() as directory, patch.object(trio.to_thread, "run_sync", run_here):
        machine = Machine(Path(directory), rng, rate, quota, form)
        trio.run(partial(machine.run, todo), clock=MockClock(autojump_threshold=0))
