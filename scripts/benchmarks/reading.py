"""First reads: from a registry, next to a pull of the same image, and counted in requests of the kernel."""

import os
import statistics
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from servers import containerd

from benchmarks.figures import Bench, drop_page_cache, timed, usage
from benchmarks.images import Images
from benchmarks.trees import Trees, files_below, read_files

__all__ = ["pulling", "reading", "requests"]

#: Reading all of /usr, next to a pull of the image.
_PULL_AIM = 0.5
#: Device requests for each 64 KiB of a file that is read in order, the last part counted as a whole one.
_UNIT, _REQUESTS_AIM = 64 << 10, 1.0
_LARGEST = 20
_AIMED = ("erofs-fuse", "erofs-fanotify")


@dataclass(frozen=True)
class FirstRead:
    """Seconds of the mount command and of reading, bytes read, and requests to the registry meanwhile."""

    mount_s: float
    seconds: float
    size: int
    requests: int


def reading(bench: Bench, images: Images, _trees: Trees) -> None:
    """Read all of /usr from the embedded registry on loopback, with nothing cached."""
    what = "/usr from the registry, nothing cached"
    for backend in bench.backends:
        reads = []
        for run in range(bench.runs):
            drop_page_cache()
            reads.append(_first_read(bench, backend, images.sample, f"read-{backend}-{run}"))
        median = statistics.median(read.seconds for read in reads)
        bench.report("read", f"{what}: requests", reads[-1].requests, "", subject=backend)
        bench.report("read", what, median, "s", subject=backend)
        bench.report("read", what, reads[-1].size / median / 1e6, "MB/s", subject=backend)


def pulling(bench: Bench, images: Images, _trees: Trees) -> None:
    """Mount and read all of /usr from docker-registry, next to ``ctr image pull`` of the same image."""
    repository = images.docker
    place = bench.directory / "containerd"
    place.mkdir()
    pulls: dict[str, list[float]] = {"lazy": [], "gzip": []}
    firsts: dict[str, list[FirstRead]] = {backend: [] for backend in bench.backends}
    with containerd(place) as address:
        for run in range(bench.runs):
            for form, times in pulls.items():
                drop_page_cache()
                times.append(_pull(address, f"{repository}:{form}"))
            for backend, reads in firsts.items():
                drop_page_cache()
                reads.append(_first_read(bench, backend, f"{repository}:lazy", f"pull-{backend}-{run}"))
    for form, times in pulls.items():
        what = f"ctr image pull, {'zstd' if form == 'lazy' else form} layers"
        bench.report("pull", what, statistics.median(times), "s")
    for backend, reads in firsts.items():
        aim = _PULL_AIM if backend in _AIMED else None
        seconds = [read.seconds for read in reads]
        tell = partial(bench.report, "pull", unit="s", subject=backend)
        ratio = _ratio(seconds, pulls["lazy"])
        tell("read all of /usr, next to the zstd pull", statistics.median(seconds), ratio=ratio, most=aim)
        with_mount = [read.seconds + read.mount_s for read in reads]
        ratio = _ratio(with_mount, pulls["lazy"])
        tell("the same with the mount command", statistics.median(with_mount), ratio=ratio)


def _ratio(mine: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))


def requests(bench: Bench, images: Images, trees: Trees) -> None:
    """Count the device requests of reading in order, on an empty cache."""
    for backend in bench.backends:
        if backend not in _AIMED:
            continue
        cache, point = f"requests-{backend}", bench.directory / "mnt"
        bench.veneer("mount", "--read-only", "--backend", backend, images.sample, point, cache=cache)
        worst, total, units = 0.0, 0, 0
        for name in trees.names.largest[:_LARGEST]:
            before = device_requests(_report(bench, point, cache))
            read_files(point, (name,))
            count = device_requests(_report(bench, point, cache)) - before
            parts = -(-os.path.getsize(point / name) // _UNIT)
            worst, total, units = max(worst, count / parts), total + count, units + parts
        _tell(bench, backend, f"{_LARGEST} largest files", total / units)
        _tell(bench, backend, "the worst of them", worst)
        before = device_requests(_report(bench, point, cache))
        rest = trees.names.largest[_LARGEST:]
        read_files(point, rest)
        count = device_requests(_report(bench, point, cache)) - before
        parts = sum(-(-os.path.getsize(point / name) // _UNIT) for name in rest)
        _tell(bench, backend, f"the other {len(rest):,} files", count / parts)
        # Nothing is asked for of a device that is complete.
        complete = sum(layer["complete"] for layer in _report(bench, point, cache)["layers"])
        bench.report("requests", "complete devices after that", complete, "", subject=backend)
        bench.veneer("umount", point, cache=cache)


def _tell(bench: Bench, backend: str, what: str, value: float) -> None:
    bench.report("requests", f"for 64 KiB in order, {what}", value, "", subject=backend, most=_REQUESTS_AIM)


def device_requests(report: dict[str, Any]) -> int:
    """Requests of the kernel for bytes of devices, as a mount's report counts them."""
    kernel = report["kernel"]
    count: int = kernel["events" if "events" in kernel else "reads"]
    return count


def _first_read(bench: Bench, backend: str, reference: str, cache: str) -> FirstRead:
    """Mount an image with an empty cache, read /usr, unmount."""
    point = bench.directory / "mnt"
    mount = bench.veneer("mount", "--read-only", "--backend", backend, reference, point, cache=cache)
    sizes = list[int]()
    # In the order of the mount's own directories, as tar and find would.
    seconds = timed(lambda: sizes.append(read_files(point, list(files_below(point / "usr", point)))), 1)
    requests = _report(bench, point, cache)["store"]["requests"]
    bench.veneer("umount", point, cache=cache)
    return FirstRead(mount.seconds, seconds, sizes[0], requests)


def _report(bench: Bench, point: Path, cache: str) -> dict[str, Any]:
    """What ``veneer status`` says of the mount on ``point``."""
    document = bench.json("status", "--json", cache=cache)
    mounts = document["mounts"] if isinstance(document, dict) else document
    report: dict[str, Any] = next(mount["report"] for mount in mounts if mount["mountpoint"] == str(point))
    return report


def _pull(address: Path, reference: str) -> float:
    """Seconds of a pull into an empty store, unpacking included; the store is empty again afterwards."""
    ctr = ("ctr", "--address", str(address))
    seconds = usage([*ctr, "images", "pull", "--plain-http", reference]).seconds
    usage([*ctr, "images", "rm", "--sync", reference])
    left = subprocess.run([*ctr, "content", "ls", "-q"], capture_output=True, text=True, check=True).stdout
    if left.strip():
        raise OSError(f"containerd still has {left}")
    return seconds
