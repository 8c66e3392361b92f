"""The images that are measured, made when a section first asks for them.

``lazy:x`` is the sample image (Debian with Python) converted; ``filesN:x`` has N small files.
"""

import multiprocessing
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import trio
from servers import VENEER, docker_registry, server

from benchmarks.figures import Bench, usage
from veneer.image import open_image
from veneer.settings import Settings
from veneer.store.spanstore import open_store
from veneer.testing.images import Layer, write_image
from veneer.testing.tars import TarItem

__all__ = ["COUNTS", "SAMPLE", "Images"]

SAMPLE = Path("build/sample").absolute()
#: Files of the images with many.
COUNTS = (10_000, 100_000)


class Images:
    """References of images, and the registries that they are in."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._directory = bench.directory

    @cached_property
    def sample_layout(self) -> Path:
        """The converted sample image, in a layout of its own, tagged ``x``."""
        layout = self._directory / "lazy"
        if not layout.exists():
            source = f"oci:{SAMPLE}:python"
            self._bench.veneer("convert", "--quiet", source, f"oci:{layout}:x", cache="convert")
        return layout

    @cached_property
    def sample(self) -> str:
        """The converted sample image in the embedded registry."""
        place = self._directory / "registry/lazy"
        shutil.copytree(self.sample_layout, place)
        argv = (VENEER, "registry", "serve", self._directory / "registry", "--port", "0")
        return f"{self._bench.stack.enter_context(server(*argv))}/lazy:x"

    @cached_property
    def docker(self) -> str:
        """The repository of both forms of the sample image in docker-registry, tagged ``lazy`` and ``gzip``."""
        (self._directory / "docker").mkdir()
        host = self._bench.stack.enter_context(docker_registry(self._directory / "docker"))
        name = f"{host}/debian/python"
        self._bench.veneer("convert", "--quiet", f"oci:{SAMPLE}:python", f"{name}:lazy", cache="convert")
        copy = ("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{SAMPLE}:python")
        usage([*copy, f"docker://{name}:gzip"])
        return name

    def files(self, count: int) -> str:
        """The image of ``count`` small files, in a layout."""
        layout = self._directory / f"files{count}"
        if not layout.exists():
            source = self._directory / f"files{count}-source"
            # In processes of their own: what this one had in memory would count as the peak of its children.
            apart(_write_many, source, count)
            self._bench.veneer("convert", "--quiet", f"oci:{source}:x", f"oci:{layout}:x", cache="convert")
            shutil.rmtree(source)
        return f"oci:{layout}:x"

    def inspect(self, reference: str) -> dict[str, Any]:
        """``veneer inspect --json``."""
        document: dict[str, Any] = self._bench.json("inspect", "--json", reference, cache="inspect")
        return document

    def fill(self, reference: str, cache: str) -> None:
        """Bring all of an image into a cache."""
        apart(_fill, reference, self._directory / cache)


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


def _write_many(layout: Path, count: int) -> None:
    write_image([many_files(count)], layout, "x", "none")


def many_files(count: int, seed: int = 0) -> Layer:
    """A layer of ``count`` files of up to 2 KB, 50 a directory."""
    choose = random.Random(count + seed)
    items = []
    for number in range(count):
        if number % 50 == 0:
            directory = b"usr/lib/package%05d" % (number // 50)
            items.append(TarItem(directory, "dir", 0o755, mtime_ns=number * 10**9))
        path = b"usr/lib/package%05d/module_%04d.py" % (number // 50, number)
        content = choose.randbytes(choose.randrange(64)) * 32
        items.append(TarItem(path, mtime_ns=(1_600_000_000 + number) * 10**9, content=content))
    return tuple(items)


def _fill(reference: str, cache_dir: Path) -> None:
    settings = replace(Settings.from_environment(), cache_dir=cache_dir)

    async def work() -> None:
        async with open_store(settings) as store, open_image(reference, settings) as image:
            for device, source in zip(image.index.devices, image.sources, strict=True):
                attached = store.attach(device, source)
                # Only what was proven to be complete is mounted without anybody to ask.
                if not (await store.fetch_rest(attached) and await store.prove(attached)):
                    raise RuntimeError(f"{source.name} did not come as a whole")

    trio.run(work)
