"""What mounts cost while they are served: memory, descriptors, and asking about them."""

import json
import os
import re
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from benchmarks.figures import MIN_TURNS, Bench, timed
from benchmarks.images import Images, apart, many_files
from veneer.convert.convert import convert
from veneer.settings import Settings
from veneer.testing.images import write_image

__all__ = ["serving", "stop_daemon"]

#: Mounts at once; of backends with a process each, fewer.
MANY, FEW = 100, 10
_RESIDENT = "erofs-fanotify"
_FILES = 200
_STATUS_AIM_MS = 60.0


def serving(bench: Bench, _images: Images) -> None:
    """Mount many images at once; look at who serves them."""
    layout, points = bench.directory / "many", bench.directory / "many-mnt"
    points.mkdir()
    apart(_write_images, layout, bench.directory / "convert")
    for backend in bench.backends:
        _serve(bench, backend, layout, points)
    median = 1e3 * timed(lambda: bench.veneer("status", cache="none"), max(bench.runs, MIN_TURNS))
    bench.report("serve", "veneer status", median, "ms", subject="nothing mounted", most=_STATUS_AIM_MS)


def _serve(bench: Bench, backend: str, layout: Path, points: Path) -> None:
    count = MANY if backend == _RESIDENT else FEW
    cache, walls, first = f"many-{backend}", [], (0.0, 0)
    pids: set[int] = set()
    for number in range(count):
        choice = ("--json", "--backend", backend)
        reference, point = f"oci:{layout}:i{number}", points / str(number)
        result = bench.veneer("mount", *choice, reference, point, cache=cache)
        walls.append(result.seconds)
        pids |= _servers(bench, json.loads(result.output))
        for path in (point / "usr/lib").rglob("*.py"):
            path.read_bytes()
        if number == 0:
            first = _weigh(pids)
    memory, descriptors = _weigh(pids)
    status = timed(lambda: bench.veneer("status", cache=cache), max(bench.runs, MIN_TURNS))
    more = count - 1
    tell = partial(bench.report, "serve", subject=f"{backend}, {count} mounts")
    tell("the command for one mount", 1e3 * statistics.median(walls), "ms")
    tell("processes", len(pids), "")
    tell("memory, all files read", memory, "MiB")
    tell("memory for each mount more than the first", (memory - first[0]) / more, "MiB")
    tell("descriptors", descriptors, "")
    tell("descriptors for each mount more than the first", (descriptors - first[1]) / more, "")
    tell("veneer status", 1e3 * status, "ms", most=_STATUS_AIM_MS if backend == _RESIDENT else None)
    for number in range(count):
        bench.veneer("umount", points / str(number), cache=cache)


def stop_daemon(run_dir: Path) -> None:
    """End the daemon of the run directory, if there is one, and wait for its processes."""
    try:
        recorded = json.loads((run_dir / "daemon.json").read_text())
    except FileNotFoundError:
        return
    ends = [os.pidfd_open(recorded[role]) for role in ("worker", "standby", "supervisor")]
    os.kill(recorded["supervisor"], 15)

    async def wait() -> None:
        for end in ends:
            await trio.lowlevel.wait_readable(end)

    trio.run(wait)


def _write_images(layout: Path, cache_dir: Path) -> None:
    """Images that share nothing."""
    settings = replace(Settings.from_environment(), cache_dir=cache_dir)

    async def work() -> None:
        for number in range(MANY):
            write_image([many_files(_FILES, seed=number + 1)], layout.with_name("many-source"), "x", "none")
            source = f"oci:{layout.with_name('many-source')}:x"
            await convert(source, f"oci:{layout}:i{number}", settings)

    trio.run(work)


def _servers(bench: Bench, info: dict[str, Any]) -> set[int]:
    """The processes that serve a mount."""
    if info["backend"] != _RESIDENT:
        return {info["pid"]}
    recorded = json.loads((bench.directory / "run/daemon.json").read_text())
    return {recorded[role] for role in ("worker", "standby", "supervisor")}


def _weigh(pids: set[int]) -> tuple[float, int]:
    """Resident memory in MiB and open descriptors of processes together."""
    memory, descriptors = 0, 0
    for pid in pids:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        memory += int(found[1]) if found else 0
        descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    return memory / 1024, descriptors
