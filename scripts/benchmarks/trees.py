"""The same tree several times: on ext4 under overlayfs, and mounted by each backend from a complete cache.

All are writable mounts, as containers have them: an overlay each. They take turns.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks.figures import MIN_TURNS, Bench, drop_page_cache, turns, usage
from benchmarks.images import Images, apart
from veneer.testing.unpack import unpack_layers

__all__ = ["Trees", "data", "execution", "files_below", "random_reads", "read_files", "tree"]

OVERLAY = "ext4 under overlayfs"
#: Aims: seconds of the kernel's own backends next to the overlay's; and speeds next to its speed.
_WARM_AIM, _COLD_AIM, _RANDOM_AIM = 1.1, 0.8, 0.9
_AIMED = ("erofs-fuse", "erofs-fanotify")
_READERS = 4
_LARGEST = 24
_EXECS = 20
_RANDOM_S = 1
#: A walk takes 50 ms.
_SHORT_TURNS = 21
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Names:
    """What is below ``usr`` in the image: directories and regular files as a walk finds them.

    Args:
        directories: relative to the root.
        files: likewise.
        largest: the files again, largest first.
        size: of all files.
    """

    directories: tuple[str, ...]
    files: tuple[str, ...]
    largest: tuple[str, ...]
    size: int


class Trees:
    """The contenders, mounted when they are first asked for."""

    def __init__(self, bench: Bench, images: Images) -> None:
        self._bench = bench
        self._images = images

    @cached_property
    def local(self) -> Path:
        """The image unpacked on the local file system."""
        tree = self._bench.directory / "tree"
        tree.mkdir()
        layers = self._images.inspect(f"oci:{self._images.sample_layout}:x")["layers"]
        blobs = [self._images.sample_layout / "blobs" / layer["digest"].replace(":", "/") for layer in layers]
        apart(_unpack, blobs, tree)
        return tree

    @cached_property
    def names(self) -> Names:
        """What there is to read: in the unpacked tree, where a look does not disturb any contender."""
        directories, sizes = [], {}
        for directory, _, names in os.walk(self.local / "usr"):
            directories.append(os.path.relpath(directory, self.local))
            for name in names:
                path = os.path.join(directory, name)
                if not os.path.islink(path) and os.path.isfile(path):
                    sizes[os.path.relpath(path, self.local)] = os.path.getsize(path)
        largest = sorted(sizes, key=lambda path: -sizes[path])
        return Names(tuple(directories), tuple(sizes), tuple(largest), sum(sizes.values()))

    @cached_property
    def roots(self) -> dict[str, Path]:
        """The root of each contender by its name."""
        bench = self._bench
        upper, work, point = (bench.directory / name for name in ("upper", "work", "overlay"))
        for directory in (upper, work, point):
            directory.mkdir()
        options = f"lowerdir={self.local},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, point], check=True)
        bench.stack.callback(usage, ["umount", point])
        roots = {OVERLAY: point}
        for backend in bench.backends:
            roots[backend] = self._mounted(backend)
        return roots

    def _mounted(self, backend: str) -> Path:
        bench, point, cache = self._bench, self._bench.directory / f"on-{backend}", f"full-{backend}"
        self._images.fill(self._images.sample, cache)
        bench.veneer("mount", "--backend", backend, self._images.sample, point, cache=cache)
        bench.stack.callback(bench.veneer, "umount", point, cache=cache)
        read_files(point, self.names.files)
        return point

    def compare(
        self,
        section: str,
        what: str,
        function: Callable[[Path], object],
        *,
        count: int = 0,
        cold: bool = False,
        most: float | None = None,
        least: float | None = None,
    ) -> None:
        """Time a function on all contenders; report medians, and ratios to the overlay's times.

        With ``least``, ratios are of speeds, as they are in its aim.

        Args:
            section: of the figures.
            what: is measured.
            function: called with a root.
            count: turns; at least :data:`MIN_TURNS` are made.
            cold: whether the page cache is dropped before each call. A call without it is made first if not.
            most: aim for seconds next to the overlay's.
            least: aim for the speed next to the overlay's.
        """
        functions = {name: partial(function, root) for name, root in self.roots.items()}
        if not cold:
            turns(functions, 1)
        count = max(count, MIN_TURNS, self._bench.runs)
        seconds = turns(functions, count, drop_page_cache if cold else None)
        unit, scale = ("ms", 1e3) if statistics.median(seconds[OVERLAY]) < 1 else ("s", 1.0)
        for name, values in seconds.items():
            pairs = zip(seconds[OVERLAY], values, strict=True)
            ratios = [mine / base if least is None else base / mine for base, mine in pairs]
            self._report(section, what, name, scale * statistics.median(values), unit, ratios, most, least)

    def _report(
        self,
        section: str,
        what: str,
        name: str,
        value: float,
        unit: str,
        ratios: list[float],
        most: float | None,
        least: float | None,
    ) -> None:
        ratio = None if name == OVERLAY else statistics.median(ratios)
        if name not in _AIMED:
            most = least = None
        self._bench.report(section, what, value, unit, subject=name, ratio=ratio, most=most, least=least)

    def compare_rates(
        self, section: str, what: str, rate: Callable[[Path], float], *, cold: bool, least: float
    ) -> None:
        """Like :meth:`compare`, for a function that measures a rate by itself."""
        rates: dict[str, list[float]] = {name: [] for name in self.roots}

        def measure(name: str) -> None:
            rates[name].append(rate(self.roots[name]))

        functions = {name: partial(measure, name) for name in self.roots}
        turns(functions, max(MIN_TURNS, self._bench.runs), drop_page_cache if cold else None)
        for name, values in rates.items():
            ratios = [mine / base for base, mine in zip(rates[OVERLAY], values, strict=True)]
            self._report(section, what, name, statistics.median(values), "1/s", ratios, None, least)


def tree(_bench: Bench, trees: Trees) -> None:
    """Names and attributes: ``lstat`` of everything, and ``readdir`` of every directory."""
    directories = trees.names.directories
    trees.compare("tree", "lstat walk, cold", walk, cold=True)
    trees.compare("tree", "lstat walk, warm", walk, count=_SHORT_TURNS, most=_WARM_AIM)
    list_all = partial(list_directories, names=directories)
    trees.compare("tree", f"readdir of {len(directories)} directories, cold", list_all, cold=True)
    trees.compare("tree", f"readdir of {len(directories)} directories, warm", list_all, count=_SHORT_TURNS)


def data(_bench: Bench, trees: Trees) -> None:
    """Contents: every file of /usr in order, by one reader and by four."""
    names = trees.names
    what = f"{len(names.files):,} files, {names.size / 1e6:.0f} MB"
    one, many = partial(read_files, names=names.files), partial(read_parallel, names=names.files)
    trees.compare("data", f"{what}, complete device, cold page cache", one, cold=True, least=_COLD_AIM)
    trees.compare("data", f"{what}, warm", one, count=_SHORT_TURNS, most=_WARM_AIM)
    trees.compare("data", f"{what}, {_READERS} readers, cold page cache", many, cold=True, least=_COLD_AIM)
    trees.compare("data", f"{what}, {_READERS} readers, warm", many, count=_SHORT_TURNS, most=_WARM_AIM)


def random_reads(_bench: Bench, trees: Trees) -> None:
    """4 KiB at random from the largest files, by fio."""
    largest = trees.names.largest[:_LARGEST]
    warm, cold = partial(fio, names=largest, cold=False), partial(fio, names=largest, cold=True)
    for root in trees.roots.values():
        read_files(root, largest)
    trees.compare_rates("random", "4 KiB reads, warm", warm, cold=False, least=_RANDOM_AIM)
    trees.compare_rates(
        "random", "4 KiB reads, complete device, cold page cache", cold, cold=True, least=_COLD_AIM
    )


def execution(_bench: Bench, trees: Trees) -> None:
    """Start a large program, without a container around it."""
    trees.compare("exec", "python3 --version, cold", partial(execute, count=1), cold=True)
    trees.compare("exec", f"python3 --version {_EXECS} times, warm", partial(execute, count=_EXECS))
    modules = ("-c", "import json, ssl, urllib.request, email")
    trees.compare("exec", "python3 with modules, cold", partial(execute, count=1, arguments=modules), cold=True)
    trees.compare("exec", "python3 with modules, warm", partial(execute, count=1, arguments=modules))


def _unpack(blobs: list[Path], tree: Path) -> None:
    argv = ("zstd", "-dcq")
    unpack_layers(
        (subprocess.run([*argv, blob], capture_output=True, check=True).stdout for blob in blobs), tree
    )


def walk(root: Path) -> int:
    """lstat everything below ``usr``; how much there is."""
    count = 0
    for directory, names, files in os.walk(root / "usr"):
        for name in (*names, *files):
            os.lstat(os.path.join(directory, name))
            count += 1
    return count


def list_directories(root: Path, names: tuple[str, ...]) -> None:
    """Read the names in directories."""
    for name in names:
        os.listdir(os.path.join(root, name))


def files_below(top: Path, root: Path) -> Iterator[str]:
    """Regular files below ``top`` as a walk finds them, relative to ``root``."""
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path) and os.path.isfile(path):
                yield os.path.relpath(path, root)


def read_files(root: Path, names: Sequence[str]) -> int:
    """Read files from start to end, in large pieces; bytes read."""
    buffer, total = [memoryview(bytearray(_BUFFER))], 0
    for name in names:
        fd = os.open(os.path.join(root, name), os.O_RDONLY)
        while count := os.readv(fd, buffer):
            total += count
        os.close(fd)
    return total


def read_parallel(root: Path, names: tuple[str, ...]) -> None:
    """The same by several processes, each its part."""
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=read_files, args=(root, names[number::_READERS])) for number in range(_READERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise OSError(f"a reader of {root} failed")


def fio(root: Path, names: tuple[str, ...], *, cold: bool) -> float:
    """Random reads a second; cold: each page once."""
    files = ":".join(str(root / name) for name in names)
    how = () if cold else ("--time_based", f"--runtime={_RANDOM_S}", "--norandommap")
    argv = ("fio", "--name=x", "--readonly", "--rw=randread", "--bs=4k", "--ioengine=psync", "--invalidate=0")
    more = ("--file_service_type=random", f"--filename={files}", "--output-format=json")
    result = json.loads(usage([*argv, *how, *more]).output)
    return float(result["jobs"][0]["read"]["iops"])


def execute(root: Path, count: int, arguments: tuple[str, ...] = ("--version",)) -> None:
    """Run the tree's Python in it."""
    environment: Mapping[str, str] = {"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    for _ in range(count):
        argv: list[str | Path] = ["chroot", root, "/usr/bin/python3", *arguments]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=environment)
