"""Sizes and speeds of a layer by frame size and zstd level: frame_sweep.py TAR. One core, CPU time.

Prints the table of docs/decisions/0003-native-layer-frames.md.
"""

import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import zstandard

from veneer.convert import cut as cutting
from veneer.convert.cut import SpanCutter
from veneer.index.tar import TarParser

LEVELS = (1, 3, 6, 9, 12, 15, 19)
FRAME_SIZES_KIB = (32, 64, 128, 256, 512, 1024)
SMALL_FILES_KIB = (16, 64, 128)
CHOSEN_LEVEL = 9


def spans(data: bytes, frame_size: int, small_file: int) -> list[bytes]:
    """The spans of a tar, were these the constants."""
    with patch.object(cutting, "FRAME_SIZE", frame_size), patch.object(cutting, "SMALL_FILE", small_file):
        cutter = SpanCutter()
        cuts = [0, *cutter.advance(TarParser().feed(data), len(data)), *cutter.finish(len(data))]
    return [data[start:end] for start, end in pairwise(cuts)]


def stored_size(compressor: zstandard.ZstdCompressor, pieces: Sequence[bytes]) -> int:
    """Bytes of all pieces, each a frame of its own."""
    return sum(len(compressor.compress(piece)) for piece in pieces)


def line(name: str, count: int, data: bytes, compress: Callable[[], int]) -> None:
    """Run one measurement and print it as a row."""
    started = time.process_time()
    size = compress()
    seconds = time.process_time() - started
    mb, percent, speed = size / 1e6, 100 * size / len(data), len(data) / 1e6 / seconds
    print(f"| {name} | {count:,} | {mb:.1f} | {percent:.1f} % | {speed:.0f} |", flush=True)


def main(path: Path) -> None:
    """Measure the tar at ``path``."""
    data = path.read_bytes()
    print("| | frames | MB | of the tar | MB/s a core |\n|---|---|---|---|---|")
    line("gzip -6, one stream", 1, data, lambda: len(zlib.compress(data, 6)))
    line("zstd -3, one stream", 1, data, lambda: len(zstandard.compress(data, 3)))
    pieces = spans(data, cutting.FRAME_SIZE, cutting.SMALL_FILE)
    for level in LEVELS:
        compressor = zstandard.ZstdCompressor(level=level)
        line(
            f"zstd -{level}, 128 KiB frames",
            len(pieces),
            data,
            partial(stored_size, compressor, pieces),
        )
    compressor = zstandard.ZstdCompressor(level=CHOSEN_LEVEL)
    for frame_kib in FRAME_SIZES_KIB:
        for small_kib in SMALL_FILES_KIB if frame_kib == 128 else (min(64, frame_kib),):
            pieces = spans(data, frame_kib << 10, small_kib << 10)
            line(
                f"zstd -{CHOSEN_LEVEL}, {frame_kib} KiB frames, small files up to {small_kib} KiB",
                len(pieces),
                data,
                partial(stored_size, compressor, pieces),
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
