"""What the processes of test_processes do: ``python -m tests.store.child ROLE DIRECTORY SEED COUNT``.

Each says ``ready``, waits for a line on standard input, and works until it has done COUNT things or is killed.
"""

import json
import random
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from tests.store.rig import KIB, MIB, RAW, ZSTD, Sample, ScriptedSource, sample, store_settings
from veneer.store.cache import DeviceCache
from veneer.store.spanstore import open_store

#: Spans of all sizes, most of them not aligned to blocks.
LENGTHS = [random.Random(i).choice((100, 3 * KIB, 4 * KIB, 20 * KIB, 60 * KIB, 200 * KIB)) for i in range(120)]


def shared_sample() -> Sample:
    return sample(LENGTHS, codecs=(ZSTD, RAW), seed=1)


async def fill(directory: Path, rng: random.Random, count: int) -> None:
    """Read everything in random order within a small quota: writing and evicting all the time."""
    one = shared_sample()
    async with open_store(store_settings(directory, quota=MIB)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        for _ in range(count):
            number = rng.randrange(len(LENGTHS))
            span = one.device.spans[number]
            assert (
                await store.read(attached, span.offset, span.length) == one.plain[span.offset :][: span.length]
            )
            print(number, flush=True)


async def read(directory: Path, rng: random.Random, count: int) -> None:
    """Read random ranges and compare every byte."""
    one = shared_sample()
    async with open_store(store_settings(directory)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        for _ in range(count):
            offset = rng.randrange(attached.size)
            length = min(rng.choice((1, 4 * KIB, 128 * KIB)), attached.size - offset)
            data = store.cached(attached, offset, length)
            if data is None:
                data = await store.read(attached, offset, length)
            assert data == one.plain[offset : offset + length], f"wrong bytes at {offset}+{length}"
        print(json.dumps(store.stats.to_json()), flush=True)


async def evict(directory: Path, rng: random.Random, count: int) -> None:
    """Evict random spans, ``count`` times between two looks whether there is a file ``stop``."""
    cache = DeviceCache(directory / "cache", 1 << 40)
    freed = 0
    while not (directory / "stop").exists():
        for path in cache.paths():
            with cache.visit(path) as file:
                for _ in range(count):
                    numbers = rng.sample(range(len(LENGTHS)), rng.choice((1, 5, 60)))
                    freed += file.evict(numbers).freed
    cache.close()
    print(freed, flush=True)


async def pin(directory: Path, _rng: random.Random, _count: int) -> None:
    """Own a device that is mounted, half there, until somebody ends that."""
    one = sample([60 * KIB] * 10, codecs=(RAW,))
    async with open_store(store_settings(directory)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, 300 * KIB)
        store.pin(attached, lambda: None)
        print("pinned", flush=True)
        await trio.sleep_forever()


async def freeze(directory: Path, _rng: random.Random, _count: int) -> None:
    """Freeze a complete device until somebody ends that."""
    one = sample([60 * KIB] * 10, codecs=(RAW,))
    async with open_store(store_settings(directory)) as store:
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await store.fill(attached, 0, attached.size)
        assert await store.prove(attached)
        assert store.freeze(attached) is not None
        print("frozen", flush=True)
        await trio.sleep_forever()


ROLES: dict[str, Callable[[Path, random.Random, int], Awaitable[None]]] = {
    "fill": fill,
    "read": read,
    "evict": evict,
    "pin": pin,
    "freeze": freeze,
}

if __name__ == "__main__":
    role, where, seed, many = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    trio.run(partial(ROLES[role], Path(where), random.Random(int(seed)), int(many)))
