"""Measure what users wait for and pay with. Everything runs on this machine over loopback.

Figures that are compared come from runs that take turns; ratios are medians of the ratios of each turn. Drops
the page cache of the whole machine many times: for a machine that does nothing else.
"""

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.converting import conversion, index
from benchmarks.figures import Bench
from benchmarks.images import Images
from benchmarks.reading import pulling, reading, requests
from benchmarks.serving import serving, stop_daemon
from benchmarks.starting import listing, mounting, starting
from benchmarks.trees import Trees, data, execution, random_reads, tree
from mounts import keep_mounts_private, unmount_below

BACKENDS = ("fuse", "erofs-fuse", "erofs-fanotify")
_Section = Callable[[Bench, Images, Trees], None]
SECTIONS: dict[str, tuple[str, _Section]] = {
    "convert": ("conversion", lambda bench, images, _: conversion(bench, images)),
    "index": ("size of the index, and decoding it", lambda bench, images, _: index(bench, images)),
    "list": ("veneer ls and cat", lambda bench, images, _: listing(bench, images)),
    "mount": ("time to mount", lambda bench, images, _: mounting(bench, images)),
    "start": ("a container, near and far", lambda bench, images, _: starting(bench, images)),
    "read": ("first read of /usr from a registry", reading),
    "pull": ("the same next to a pull by containerd", pulling),
    "requests": ("device requests of reading in order", requests),
    "tree": ("lstat and readdir", lambda bench, _, trees: tree(bench, trees)),
    "data": ("files in order, one reader and four", lambda bench, _, trees: data(bench, trees)),
    "random": ("4 KiB at random", lambda bench, _, trees: random_reads(bench, trees)),
    "exec": ("starting a program", lambda bench, _, trees: execution(bench, trees)),
    "serve": ("memory, descriptors, veneer status", lambda bench, images, _: serving(bench, images)),
}


def parse() -> argparse.Namespace:
    """The command line."""
    about = "\n".join(f"  {name:10} {text}" for name, (text, _) in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=f"sections:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("section", nargs="*", metavar="SECTION", help="what to measure (default: everything)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each long measurement (default 3)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas (default: all)")
    parser.add_argument(
        "--directory", type=Path, default=Path("build/bench"), help="for everything that is made"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    options.section = options.section or list(SECTIONS)
    options.backends = tuple(options.backends.split(","))
    if unknown := {*options.section} - {*SECTIONS} | {*options.backends} - {*BACKENDS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    """Run the sections that were asked for."""
    options = parse()
    directory = options.directory.absolute()
    if directory.exists():
        sys.exit(f"{directory} exists: another run, or what is left of one (look for mounts below it)")
    directory.mkdir(parents=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"# {platform.release()}, {os.cpu_count()} cores, {processor and processor[1]}, {options.runs} runs")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        stack.callback(unmount_below, directory)
        stack.callback(stop_daemon, directory / "run")
        bench = Bench(directory, options.runs, options.backends, stack)
        images = Images(bench)
        trees = Trees(bench, images)
        for name in options.section:
            SECTIONS[name][1](bench, images, trees)
    if options.json:
        options.json.write_text(bench.to_json())
    return 0


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    keep_mounts_private()
    sys.exit(main())
