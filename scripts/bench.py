"""Measure what users wait for and pay with: conversion, index, listing, mounting, starting, reading.

Everything runs on this machine over loopback; figures that compare are medians of runs that take turns.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from servers import VENEER, server

from veneer.image import open_image
from veneer.index.merge import merge
from veneer.index.wire import unpack_index
from veneer.settings import Settings
from veneer.testing.images import write_image
from veneer.testing.tars import TarItem

SAMPLE = Path("build/sample").absolute()
START = ("python3", "-c", "import json, ssl, urllib.request, email; print(1)")
BACKENDS = ("erofs-fuse", "fuse")
NETWORKS = ((0.0, 0.0), (10.0, 1000.0), (50.0, 100.0))


@dataclass
class Bench:
    """Where the measuring happens, and what came out: (section, measure, value, unit)."""

    directory: Path
    runs: int
    rows: list[tuple[str, str, float, str]] = field(default_factory=list)

    def report(self, section: str, measure: str, value: float, unit: str) -> None:
        """Print one figure and keep it."""
        self.rows.append((section, measure, value, unit))
        digits = 0 if value >= 100 else 1 if value >= 10 else 3
        print(f"{section:10} {measure:58} {value:12,.{digits}f} {unit}", flush=True)

    def environment(self, cache: str) -> dict[str, str]:
        """Of a veneer command with a cache of its own."""
        # Modules are compiled once, as they are where veneer is installed.
        own = {
            "PYTHONDONTWRITEBYTECODE": "",
            "VENEER_CACHE_DIR": f"{self.directory}/{cache}",
            "VENEER_RUN_DIR": f"{self.directory}/run",
        }
        return os.environ | own

    def veneer(self, *arguments: str | Path, cache: str) -> "Usage":
        """Run a veneer command to its end."""
        return usage([VENEER, *arguments], self.environment(cache))


@dataclass(frozen=True)
class Usage:
    """What a process gave and took: its output, seconds of wall clock, and peak memory in MiB."""

    output: str
    seconds: float
    peak_mib: float


def usage(argv: list[str | Path], environment: dict[str, str]) -> Usage:
    """Run a process to its end; it must succeed."""
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.PIPE, env=environment)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, resources = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        if process.returncode:
            sys.exit(f"{argv} failed: {errors.decode()}")
        output.seek(0)
        return Usage(output.read().decode(), seconds, resources.ru_maxrss / 1024)


def timed(function: Callable[[], object], runs: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def drop_page_cache() -> None:
    """Forget all file contents that the kernel has cached."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def many_files(count: int) -> list[TarItem]:
    """A layer of ``count`` files of up to 2 KB, 50 a directory."""
    choose = random.Random(count)
    items = []
    for number in range(count):
        if number % 50 == 0:
            items.append(
                TarItem(b"usr/lib/package%05d" % (number // 50), "dir", 0o755, mtime_ns=number * 10**9)
            )
        path = b"usr/lib/package%05d/module_%04d.py" % (number // 50, number)
        content = choose.randbytes(choose.randrange(64)) * 32
        items.append(TarItem(path, mtime_ns=(1_600_000_000 + number) * 10**9, content=content))
    return items


def write_many(layout: Path, count: int) -> None:
    """An image of ``count`` files."""
    write_image([many_files(count)], layout, "x", "none")


def write_huge(layout: Path) -> None:
    """An image of one file of 1 GiB."""
    content = random.Random(1).randbytes(1 << 20) * 1024
    write_image([(TarItem(b"huge", content=content),)], layout, "x", "none")


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in another process."""
    process = multiprocessing.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")


def conversion(bench: Bench) -> None:
    """Convert the sample image and large synthetic ones, layout to layout."""
    times, peaks = [], []
    for number in range(bench.runs):
        arguments = ("convert", "--json", f"oci:{SAMPLE}:python", f"oci:{bench.directory}/out{number}:x")
        result = bench.veneer(*arguments, cache=f"convert{number}")
        times.append(result.seconds)
        peaks.append(result.peak_mib)
    shutil.copytree(bench.directory / "out0", bench.directory / "registry/lazy")
    shutil.copytree(SAMPLE, bench.directory / "registry/source")
    facts = inspect(bench, "oci:" + str(bench.directory / "out0") + ":x")
    unpacked = facts["size"]
    bench.report(
        "convert", "sample image, tar bytes a second", unpacked / statistics.median(times) / 1e6, "MB/s"
    )
    bench.report("convert", "peak memory", max(peaks), "MiB")
    before = sum(path.stat().st_size for path in (SAMPLE / "blobs/sha256").iterdir())
    bench.report("convert", "stored size next to the gzip image", facts["stored_size"] / before, "x")
    # In processes of their own: what this one had in memory would count as the peak of its children.
    apart(write_huge, bench.directory / "huge")
    result = bench.veneer(
        "convert", f"oci:{bench.directory}/huge:x", f"oci:{bench.directory}/huge-out:x", cache="huge"
    )
    bench.report("convert", "peak memory, one file of 1 GiB in an uncompressed layer", result.peak_mib, "MiB")
    shutil.rmtree(bench.directory / "huge")
    shutil.rmtree(bench.directory / "huge-out")
    for count in (10_000, 50_000):
        source = bench.directory / f"files{count}"
        apart(write_many, source, count)
        bench.veneer("convert", f"oci:{source}:x", f"oci:{source}-lazy:x", cache="files")


def inspect(bench: Bench, reference: str) -> dict[str, Any]:
    """``veneer inspect --json``."""
    document: dict[str, Any] = json.loads(bench.veneer("inspect", "--json", reference, cache="inspect").output)
    return document


def decode_and_merge(data: bytes) -> None:
    """What opening an image does with its index."""
    merge(*unpack_index(data))


def index(bench: Bench) -> None:
    """Size of the index and speed of decoding it."""

    async def load(reference: str) -> bytes:
        async with open_image(reference, Settings.from_environment()) as image:
            descriptor = image.index_descriptor
            return await image.repository.blob(descriptor).read(0, descriptor.size)

    images = [("sample image", f"oci:{bench.directory}/out0:x")]
    images += [(f"{n:,} files", f"oci:{bench.directory}/files{n}-lazy:x") for n in (10_000, 50_000)]
    for name, reference in images:
        data = trio.run(load, reference)
        layers, _ = unpack_index(data)
        rows = sum(len(layer.tree) for layer in layers)
        spans = sum(len(layer.device.spans) for layer in layers)
        # The digests of spans cannot be compressed and are the larger part of a span's share.
        bench.report("index", f"{name}: whole index ({rows:,} entries, {spans:,} spans)", len(data), "B")
        bench.report("index", f"{name}: a file, when a span counts 40 B", (len(data) - 40 * spans) / rows, "B")
        seconds = timed(partial(decode_and_merge, data), 4 * bench.runs + 1)
        bench.report("index", f"{name}: decode and merge", 1e3 * seconds, "ms")


def listing(bench: Bench, registry: str) -> None:
    """List and print files from a registry on loopback."""
    for name, arguments in (("ls /", ("ls", "/")), ("cat of one file", ("cat", "/etc/debian_version"))):
        verb, path = arguments
        cold = [
            bench.veneer(verb, f"{registry}/lazy:x", path, cache=f"{verb}{run}").seconds
            for run in range(bench.runs)
        ]
        warm = [
            bench.veneer(verb, f"{registry}/lazy:x", path, cache=f"{verb}0").seconds for _ in range(bench.runs)
        ]
        bench.report("list", f"{name}, nothing cached", 1e3 * statistics.median(cold), "ms")
        bench.report("list", f"{name}, index cached", 1e3 * statistics.median(warm), "ms")


def mounting(bench: Bench, registry: str) -> None:
    """Time to mount, and the memory of the process that serves the mount."""
    point = bench.directory / "mnt"
    images = [("sample image", f"{registry}/lazy:x")]
    images += [(f"{n:,} files", f"oci:{bench.directory}/files{n}-lazy:x") for n in (10_000, 50_000)]
    for number, (name, reference) in enumerate(images):
        for state in ("index to be fetched", "index cached"):
            walls, inside = [], []
            for run in range(bench.runs):
                cache = f"mount{number}-{run}"
                result = bench.veneer("mount", "--read-only", "--json", reference, point, cache=cache)
                walls.append(result.seconds)
                info = json.loads(result.output)
                inside.append(info["seconds"])
                if run == bench.runs - 1 and state == "index cached":
                    files = sum(1 for _ in os.walk(point))
                    rss = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{info['pid']}/status").read_text())[0])
                    bench.report(
                        "mount", f"{name}: memory after a walk of {files} directories", rss / 1024, "MiB"
                    )
                bench.veneer("umount", point, cache=cache)
            bench.report("mount", f"{name}, {state}: command", 1e3 * statistics.median(walls), "ms")
            bench.report("mount", f"{name}, {state}: request to mount", 1e3 * statistics.median(inside), "ms")


def starting(bench: Bench, registry: str) -> None:
    """Start Python in a container, cold and again, near and far."""
    report = bench.directory / "report.json"
    for rtt_ms, mbit in NETWORKS:
        with ExitStack() as stack:
            host, name = registry, "loopback"
            if rtt_ms:
                name = f"{rtt_ms:g} ms, {mbit:g} Mb/s"
                target = ["--target", registry.rpartition(":")[2], "--rtt-ms", str(rtt_ms), "--mbit", str(mbit)]
                host = stack.enter_context(server(sys.executable, "-m", "veneer.testing.delay", *target))
            for backend in BACKENDS:
                cold, warm, facts = [], [], {}
                for run in range(bench.runs):
                    cache = f"start-{backend}-{rtt_ms}-{run}"
                    choice = ("--backend", backend, "--report", report)
                    arguments = ("run", *choice, f"{host}/lazy:x", "--", *START)
                    drop_page_cache()
                    cold.append(bench.veneer(*arguments, cache=cache).seconds)
                    facts = json.loads(report.read_text())
                    warm.append(bench.veneer(*arguments, cache=cache).seconds)
                what = f"{name}, {backend}"
                bench.report("start", f"{what}: cold, command to exit", statistics.median(cold), "s")
                bench.report("start", f"{what}: cold, requests", facts["requests"], "")
                bench.report("start", f"{what}: cold, fetched", facts["bytes_fetched"] / 1e6, "MB")
                bench.report("start", f"{what}: again", statistics.median(warm), "s")


def walk_all(root: Path) -> int:
    """lstat everything below ``root``; how much there is."""
    count = 0
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            os.lstat(os.path.join(directory, name))
            count += 1
    return count


def read_all(root: Path) -> int:
    """Read every regular file below ``root``; bytes read."""
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path) and os.path.isfile(path):
                with open(path, "rb", buffering=0) as file:
                    while count := len(file.read(1 << 20)):
                        total += count
    return total


@contextmanager
def mounted(bench: Bench, reference: str, backend: str, cache: str) -> Iterator[Path]:
    """A mount for the time of the block."""
    point = bench.directory / "mnt"
    bench.veneer("mount", "--read-only", "--backend", backend, reference, point, cache=cache)
    try:
        yield point
    finally:
        bench.veneer("umount", point, cache=cache)


def reading(bench: Bench, registry: str) -> None:
    """Read all of /usr through a mount, next to the same tree unpacked on the local disk."""
    tree, reference = bench.directory / "tree", f"{registry}/lazy:x"
    tree.mkdir()
    for layer in inspect(bench, reference)["layers"]:
        blob = bench.directory / "out0/blobs" / layer["digest"].replace(":", "/")
        subprocess.run(f"zstd -dc {blob} | tar -xpf - -C {tree} --exclude '.wh.*'", shell=True, check=True)
    for backend in BACKENDS:
        times = []
        for run in range(bench.runs):
            cache = f"read-{backend}-{run}"
            with mounted(bench, reference, backend, cache) as point:
                drop_page_cache()
                began = time.monotonic()
                size = read_all(point / "usr")
                times.append(time.monotonic() - began)
                counters = json.loads(bench.veneer("status", "--json", cache=cache).output)[0]["report"][
                    "store"
                ]
        name = f"/usr, {backend}, cold from the registry"
        bench.report("read", f"{name}: requests", counters["requests"], "")
        bench.report("read", name, statistics.median(times), "s")
        bench.report("read", name, size / statistics.median(times) / 1e6, "MB/s")
    for backend in BACKENDS:
        with mounted(bench, reference, backend, f"read-{backend}-0") as point:
            turns(bench, {f"local tree beside {backend}": tree / "usr", f"{backend}, cached": point / "usr"})


def turns(bench: Bench, roots: dict[str, Path]) -> None:
    """Read trees that take turns: with a cold page cache, again, and their metadata only."""
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(bench.runs):
        for name, root in roots.items():
            drop_page_cache()
            figures.setdefault(("cold page cache", name), []).append(timed(partial(read_all, root), 1))
            figures.setdefault(("warm", name), []).append(timed(partial(read_all, root), 1))
            figures.setdefault(("warm lstat walk", name), []).append(timed(partial(walk_all, root), 1))
    for (what, name), seconds in figures.items():
        bench.report("read", f"/usr, {name}: {what}", statistics.median(seconds), "s")


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[1])
    directory = Path("build/bench").absolute()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    bench = Bench(directory, options.runs)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"# {platform.release()}, {os.cpu_count()} cores, {processor and processor[1]}, {options.runs} runs")
    conversion(bench)
    index(bench)
    with server(VENEER, "registry", "serve", directory / "registry", "--port", "0") as registry:
        listing(bench, registry)
        mounting(bench, registry)
        starting(bench, registry)
        reading(bench, registry)
    if options.json:
        names = ("section", "measure", "value", "unit")
        options.json.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in bench.rows]))
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
