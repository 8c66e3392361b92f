"""Ways to cut and compress layers, and what a start without a profile takes with each."""

import time
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import zstandard

from veneer.convert.cut import FRAME_SIZE, SMALL_FILE, SpanCutter
from veneer.convert.frames import LEVEL
from veneer.events import Progress, Reporter, silent
from veneer.index.tar import TarParser
from veneer.lab.model import Cut, Line, Touch, model_demand
from veneer.lab.records import Network
from veneer.lab.sweep_record import Trial
from veneer.lab.sweep_subject import KIB, MIB, Subject, compress_spans, size_name
from veneer.oci.digest import Digest

__all__ = ["sweep_layers", "sweep_streams"]

#: Stands for all layers at once.
_WHOLE = Digest.of(b"")

FRAME_SIZES = (32 * KIB, 64 * KIB, FRAME_SIZE, 256 * KIB, 512 * KIB, MIB)
SMALL_FILES = (16 * KIB, SMALL_FILE, 128 * KIB)
LEVELS = (1, 3, LEVEL, 9, 12, 15, 19)
#: From here on a level is so slow that a sample has to do.
_SLOW_LEVEL, _SLOW_SAMPLE = 12, 16


def sweep_layers(
    subject: Subject, networks: Sequence[Network], *, sample: int = 1, report: Reporter = silent
) -> Iterator[Trial]:
    """Cut and compress the layers in different ways; starts fetch what they read, with no profile."""
    ways = [
        ("frame size", FRAME_SIZE, size, size_name(size), (size, min(SMALL_FILE, size), LEVEL))
        for size in FRAME_SIZES
    ]
    ways += [
        ("small files", SMALL_FILE, size, size_name(size), (FRAME_SIZE, size, LEVEL)) for size in SMALL_FILES
    ]
    ways += [("level", LEVEL, level, str(level), (FRAME_SIZE, SMALL_FILE, level)) for level in LEVELS]
    known: dict[tuple[int, int, int], Trial] = {}
    usual: dict[Digest, Cut] = {}
    for number, (group, default, value, name, way) in enumerate(ways):
        report(Progress("sweep", "layers", number, len(ways), unit="ways"))
        made = known.get(way) or known.setdefault(way, _layer_trial(subject, networks, way, sample, usual))
        yield Trial(
            group,
            name,
            float(value),
            value == default,
            made.spans,
            made.size,
            made.stored,
            made.sampled,
            made.compress_s,
            made.decode_s,
            made.decoded,
            made.starts,
        )
    report(Progress("sweep", "layers", len(ways), len(ways), unit="ways"))


def sweep_streams(subject: Subject, networks: Sequence[Network]) -> Iterator[Trial]:
    """The layers as ordinary images have them, each one stream: to be fetched as a whole."""
    ways = {
        "gzip -6": lambda data: zlib.compress(data, 6),
        "zstd -3": zstandard.ZstdCompressor(level=3).compress,
    }
    size = sum(map(len, subject.layers.values()))
    for name, compress in ways.items():
        began = time.process_time()
        stored = sum(len(compress(data)) for data in subject.layers.values())
        spent = time.process_time() - began
        pull = [Touch(0.0, _WHOLE, 0, 1)]
        starts = {
            network.name: model_demand(
                pull, {_WHOLE: Cut([0, 1], [stored])}, Line.of(network), window=lambda _: (0, 1)
            ).to_json()
            for network in networks
        }
        count = len(subject.layers)
        yield Trial("one stream", name, None, False, count, size, stored, 1.0, spent, 0.0, 0, starts)


def _layer_trial(
    subject: Subject,
    networks: Sequence[Network],
    way: tuple[int, int, int],
    sample: int,
    usual: dict[Digest, Cut],
) -> Trial:
    """One way: frame size, small files, level. ``usual`` gets the cuts by default, and helps to estimate."""
    frame_size, small_file, level = way
    slow = max(sample, _SLOW_SAMPLE) if level >= _SLOW_LEVEL else sample
    compressor = zstandard.ZstdCompressor(level=level)
    cuts: dict[Digest, Cut] = {}
    compress_s = decode_s = 0.0
    spans = size = stored = decoded = 0
    compressed = 0.0
    for layer, data in subject.layers.items():
        starts = _starts(data, frame_size, small_file)
        whole = Cut(starts, [1] * (len(starts) - 1))
        needed = {
            number
            for touch in subject.touches
            if touch.layer == layer
            for number in whole.covering(touch.offset, touch.offset + touch.length)
        }
        alike = usual.get(layer)
        reference = alike.stored if alike is not None and alike.starts == starts else ()
        made = compress_spans([data[a:b] for a, b in pairwise(starts)], needed, compressor, slow, reference)
        cuts[layer] = Cut(starts, made.stored)
        spans += len(made.stored)
        size += len(data)
        stored += sum(made.stored)
        compressed += made.sampled * len(data)
        compress_s += made.compress_s
        decode_s += made.decode_s
        decoded += made.decoded
    if way == (FRAME_SIZE, SMALL_FILE, LEVEL):
        usual.update(cuts)
    rate = decode_s / decoded if decoded else 0.0
    outcomes = {
        network.name: model_demand(
            subject.touches,
            cuts,
            Line.of(network),
            window=subject.fresh().window,
            reach=Line.of(network).reach,
            decode_s=rate,
        ).to_json()
        for network in networks
    }
    return Trial(
        "",
        "",
        None,
        False,
        spans,
        size,
        stored,
        compressed / max(1, size),
        compress_s,
        decode_s,
        decoded,
        outcomes,
    )


def _starts(data: bytes, frame_size: int, small_file: int) -> list[int]:
    cutter = SpanCutter(frame_size, small_file)
    return [0, *cutter.advance(TarParser().feed(data), len(data)), *cutter.finish(len(data))]
