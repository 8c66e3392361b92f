"""First reads: from a registry, next to a pull of the same image, and counted in requests of the kernel."""

import os
import statistics
import subprocess
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


def reading(bench: Bench, images: Images, _trees: Trees) -> None:
    """Read all of /usr from the embedded registry on loopback, with nothing cached."""
    for backend in bench.backends:
        times, requests, size = [], 0, 0
        for run in range(bench.runs):
            drop_page_cache()
            seconds, report, size = _first_read(bench, backend, images.sample, f"read-{backend}-{run}")
            times.append(seconds)
            requests = report["store"]["requests"]
        what, median = "/usr from the registry, nothing cached", statistics.median(times)
        bench.report("read", f"{what}: requests", requests, "", subject=backend)
        bench.report("read", what, median, "s", subject=backend)
        bench.report("read", what, size / median / 1e6, "MB/s", subject=backend)


def pulling(bench: Bench, images: Images, _trees: Trees) -> None:
    """Mount and read all of /usr from docker-registry, next to ``ctr image pull`` of the same image."""
    repository = images.docker
    place = bench.directory / "containerd"
    place.mkdir()
    times: dict[str, list[float]] = {}
    with containerd(place) as address:
        for run in range(bench.runs):
            for form in ("lazy", "gzip"):
                drop_page_cache()
                times.setdefault(_pull_of(form), []).append(_pull(address, f"{repository}:{form}"))
            for backend in bench.backends:
                drop_page_cache()
                cache = f"pull-{backend}-{run}"
                seconds, _, _ = _first_read(bench, backend, f"{repository}:lazy", cache, mounting=True)
                times.setdefault(backend, []).append(seconds)
    pull = times[_pull_of("lazy")]
    for name, values in times.items():
        backend = name if name in bench.backends else ""
        what = "mount and read /usr, next to the pull" if backend else name
        ratio = (
            statistics.median(mine / base for mine, base in zip(values, pull, strict=True)) if backend else None
        )
        aim = _PULL_AIM if backend in _AIMED else None
        bench.report("pull", what, statistics.median(values), "s", subject=backend, ratio=ratio, most=aim)


def _pull_of(form: str) -> str:
    return f"ctr image pull, {'zstd' if form == 'lazy' else form} layers"


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


def _first_read(
    bench: Bench, backend: str, reference: str, cache: str, *, mounting: bool = False
) -> tuple[float, dict[str, Any], int]:
    """Seconds of reading /usr (and of the mount command, if wanted), the mount's report, and bytes read."""
    point = bench.directory / "mnt"
    mount = bench.veneer("mount", "--read-only", "--backend", backend, reference, point, cache=cache)
    size = 0

    def read() -> None:
        nonlocal size
        # In the order of the mount's own directories, as tar and find would.
        size = read_files(point, list(files_below(point / "usr", point)))

    seconds = timed(read, 1)
    report = _report(bench, point, cache)
    bench.veneer("umount", point, cache=cache)
    return seconds + (mount.seconds if mounting else 0.0), report, size


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
