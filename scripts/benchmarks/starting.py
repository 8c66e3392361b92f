"""From the command to the answer: listing, mounting, starting a container."""

import json
import statistics
import sys
from contextlib import ExitStack

from servers import server

from benchmarks.figures import Bench, drop_page_cache
from benchmarks.images import COUNTS, Images

__all__ = ["listing", "mounting", "starting"]

START = ("python3", "-c", "import json, ssl, urllib.request, email; print(1)")
#: Round-trip time in ms and bandwidth in Mb/s.
NETWORKS = ((0.0, 0.0), (10.0, 1000.0), (50.0, 100.0))
#: Until the mount, with the index at hand, in ms: of a new image, and when its metadata image is kept.
_AIMS = {10_000: (60.0, 60.0), 100_000: (600.0, 60.0)}
_AIMED = "erofs-fanotify"
#: Mounts are short.
_REPEATS = 3


def listing(bench: Bench, images: Images) -> None:
    """List and print files from a registry on loopback."""
    reference = images.sample
    for name, arguments in (("ls /", ("ls", "/")), ("cat of one file", ("cat", "/etc/debian_version"))):
        verb, path = arguments
        cold = [bench.veneer(verb, reference, path, cache=f"{verb}{n}").seconds for n in range(bench.runs)]
        warm = [bench.veneer(verb, reference, path, cache=f"{verb}0").seconds for _ in range(bench.runs)]
        bench.report("list", f"{name}, nothing cached", 1e3 * statistics.median(cold), "ms")
        bench.report("list", f"{name}, index cached", 1e3 * statistics.median(warm), "ms")


def mounting(bench: Bench, images: Images) -> None:
    """Time to mount: the first time, and when what the mount needs is cached."""
    subjects: list[tuple[str, str, int]] = [("sample image from a registry", images.sample, 0)]
    subjects += [(f"{count:,} files, local index", images.files(count), count) for count in COUNTS]
    point = bench.directory / "mnt"
    for backend in bench.backends:
        for name, reference, count in subjects:
            walls: dict[str, list[float]] = {"first": [], "again": []}
            inside: dict[str, list[float]] = {"first": [], "again": []}
            for run in range(_REPEATS * bench.runs):
                cache = f"mount-{backend}-{count}-{run}"
                for state in ("first", "again"):
                    choice = ("--read-only", "--json", "--backend", backend)
                    result = bench.veneer("mount", *choice, reference, point, cache=cache)
                    walls[state].append(result.seconds)
                    inside[state].append(json.loads(result.output)["seconds"])
                    bench.veneer("umount", point, cache=cache)
            for number, state in enumerate(("first", "again")):
                aim = _AIMS[count][number] if count and backend == _AIMED else None
                mounted, command = (1e3 * statistics.median(times[state]) for times in (inside, walls))
                bench.report("mount", f"{name}, {state}: mounted", mounted, "ms", subject=backend, most=aim)
                bench.report("mount", f"{name}, {state}: command", command, "ms", subject=backend)


def starting(bench: Bench, images: Images) -> None:
    """Start Python in a container, cold and again, near and far."""
    report = bench.directory / "report.json"
    registry, _, name = images.sample.rpartition("/")
    for rtt_ms, mbit in NETWORKS:
        with ExitStack() as stack:
            host, where = registry, "loopback"
            if rtt_ms:
                where = f"{rtt_ms:g} ms, {mbit:g} Mb/s"
                target = ["--target", registry.rpartition(":")[2], "--rtt-ms", str(rtt_ms), "--mbit", str(mbit)]
                host = stack.enter_context(server(sys.executable, "-m", "veneer.testing.delay", *target))
            for backend in bench.backends:
                cold, warm, facts = [], [], {}
                for run in range(bench.runs):
                    cache = f"start-{backend}-{rtt_ms}-{run}"
                    choice = ("--backend", backend, "--report", report)
                    arguments = ("run", *choice, f"{host}/{name}", "--", *START)
                    drop_page_cache()
                    cold.append(bench.veneer(*arguments, cache=cache).seconds)
                    facts = json.loads(report.read_text())
                    warm.append(bench.veneer(*arguments, cache=cache).seconds)
                fetched = facts["bytes_fetched"] / 1e6
                bench.report("start", f"{where}: cold", statistics.median(cold), "s", subject=backend)
                bench.report("start", f"{where}: cold, requests", facts["requests"], "", subject=backend)
                bench.report("start", f"{where}: cold, fetched", fetched, "MB", subject=backend)
                bench.report("start", f"{where}: again", statistics.median(warm), "s", subject=backend)
