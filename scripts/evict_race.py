"""How long a span of a mounted device must be idle before it may be punched: count what readers see otherwise.

    PYTHONPATH=. .venv/bin/python scripts/evict_race.py [SECONDS] [MIN_IDLE_S ...]

Mounts one file over a device of the cache (root, pre-content events), and for each value of MIN_IDLE_S evicts
all that may be evicted, over and over, while four threads read random pages of it from the disk. See
docs/decisions/0008-evicting-mounted-devices.md.
"""

import os
import random
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import trio

from tests.store.rig import KIB, RAW, ScriptedSource, sample
from veneer.erofs.writer import write_erofs
from veneer.mount import fanotify
from veneer.mount.erofs import erofs_over, nameless, one_file
from veneer.mount.filetable import FileTable
from veneer.mount.precontent import GuardedDevices
from veneer.store.cache import DeviceCache
from veneer.store.owned import IdleRule
from veneer.store.spanstore import SpanStore

SPAN, SPANS, PAGE, READERS = 16 * KIB, 256, 4 * KIB, 4


def read_pages(mount: int, plain: bytes, seed: int, counts: Counter[str], stop: threading.Event) -> None:
    rng = random.Random(seed)
    file = os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    while not stop.is_set():
        at = rng.randrange(SPANS) * SPAN
        os.posix_fadvise(file, at, PAGE, os.POSIX_FADV_DONTNEED)
        try:
            page = os.pread(file, PAGE, at)
        except OSError:
            counts["errors"] += 1
            continue
        counts["reads"] += 1
        counts["wrong"] += page != plain[at : at + PAGE]
    os.close(file)


async def race(directory: Path, min_idle_s: float, seconds: float) -> None:
    one, counts, stop = sample([SPAN] * SPANS, codecs=(RAW,)), Counter[str](), threading.Event()
    index, image = replace(one_file(one.plain), devices=(one.device,)), write_erofs(one_file(one.plain)).data
    group = fanotify.open_group()
    devices = GuardedDevices(group)
    cache = DeviceCache(directory / "cache", 1 << 30, rule=IdleRule(min_idle_s))

    def evict() -> None:
        while not stop.is_set():
            cache.collect(0)

    async with trio.open_nursery() as nursery:
        store = SpanStore(cache, nursery=nursery, read_deadline_s=30)
        await nursery.start(devices.serve)
        attached = store.attach(one.device, ScriptedSource(one.blob))
        await devices.hold(store, attached, FileTable(lambda: index), "race")
        data = Path(f"/proc/self/fd/{attached.data_fd}")
        with nameless(image, directory) as metadata, erofs_over(metadata, [data]) as mount:
            async with trio.open_nursery() as threads:
                for seed in range(READERS):
                    threads.start_soon(
                        trio.to_thread.run_sync, read_pages, mount, one.plain, seed, counts, stop
                    )
                threads.start_soon(trio.to_thread.run_sync, evict)
                await trio.sleep(seconds)
                stop.set()
        await devices.release(attached)
        nursery.cancel_scope.cancel()
    store.close()
    os.close(group)
    counted = ", ".join(f"{counts[name]} {name}" for name in ("reads", "wrong", "errors"))
    print(f"idle for {min_idle_s:g} s: {counted}; {cache.stats.evicted} spans evicted")


if __name__ == "__main__":
    for text in sys.argv[2:] or ["0", "0.001", "0.01", "0.05", "1"]:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as where:
            trio.run(race, Path(where), float(text), float(sys.argv[1]) if sys.argv[1:] else 10.0)
