"""Conversion, and the index that it makes."""

import shutil
import statistics
from functools import partial

import trio

from benchmarks.figures import Bench, timed
from benchmarks.images import COUNTS, SAMPLE, Images, apart, write_huge
from veneer.image import open_image
from veneer.index.merge import merge
from veneer.index.wire import PackedIndex
from veneer.settings import Settings

__all__ = ["conversion", "index"]


def conversion(bench: Bench, images: Images) -> None:
    """Convert the sample image, and one of a huge file, layout to layout."""
    times, peaks = [], []
    for number in range(bench.runs):
        shutil.rmtree(bench.directory / "lazy", ignore_errors=True)
        arguments = ("convert", "--json", f"oci:{SAMPLE}:python", f"oci:{bench.directory}/lazy:x")
        result = bench.veneer(*arguments, cache=f"convert{number}")
        times.append(result.seconds)
        peaks.append(result.peak_mib)
    facts = images.inspect(f"oci:{images.sample_layout}:x")
    speed = facts["size"] / statistics.median(times) / 1e6
    bench.report("convert", "sample image, tar bytes a second", speed, "MB/s")
    bench.report("convert", "peak memory", max(peaks), "MiB")
    before = sum(path.stat().st_size for path in (SAMPLE / "blobs/sha256").iterdir())
    bench.report("convert", "stored size next to the gzip image", facts["stored_size"] / before, "x")
    source, result_layout = bench.directory / "huge", bench.directory / "huge-out"
    apart(write_huge, source)
    result = bench.veneer("convert", f"oci:{source}:x", f"oci:{result_layout}:x", cache="huge")
    bench.report("convert", "peak memory, one file of 1 GiB in an uncompressed layer", result.peak_mib, "MiB")
    shutil.rmtree(source)
    shutil.rmtree(result_layout)


def index(bench: Bench, images: Images) -> None:
    """Size of the index and speed of decoding it."""

    async def load(reference: str) -> bytes:
        async with open_image(reference, Settings.from_environment()) as image:
            descriptor = image.index_descriptor
            assert descriptor is not None  # what convert writes has an index
            return await image.repository.blob(descriptor).read(0, descriptor.size)

    subjects = [("sample image", f"oci:{images.sample_layout}:x")]
    subjects += [(f"{count:,} files", images.files(count)) for count in COUNTS]
    for name, reference in subjects:
        data = trio.run(load, reference)
        layers = PackedIndex.parse(data).layers()
        rows = sum(len(layer.tree) for layer in layers)
        spans = sum(len(layer.device.spans) for layer in layers)
        # The digests of spans cannot be compressed and are the larger part of a span's share.
        bench.report("index", f"{name}: whole index ({rows:,} entries, {spans:,} spans)", len(data), "B")
        bench.report("index", f"{name}: a file, when a span counts 40 B", (len(data) - 40 * spans) / rows, "B")
        seconds = timed(partial(_decode_and_merge, data), 4 * bench.runs + 1)
        bench.report("index", f"{name}: decode and merge", 1e3 * seconds, "ms")


def _decode_and_merge(data: bytes) -> None:
    """What opening an image does with its index."""
    packed = PackedIndex.parse(data)
    merge(packed.layers(), packed.policy)
