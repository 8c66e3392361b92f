"""Ways to make a pack, and what a start that reads nothing else takes with each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import zstandard

from veneer.convert import pack as packing
from veneer.events import Progress, Reporter, silent
from veneer.lab.model import Cut, Line, Touch, model_pack
from veneer.lab.records import Network
from veneer.lab.sweep_record import Trial
from veneer.lab.sweep_subject import KIB, MIB, Subject, compress_spans, size_name
from veneer.oci.digest import Digest
from veneer.prefetch.pack import MAX_PACK_SIZE
from veneer.prefetch.placement import Range, hot_ranges

__all__ = ["sweep_packs"]

#: First and longest span of a pack; spans grow in between as those of packs do.
PACK_SPANS = (
    (64 * KIB, 64 * KIB),
    (256 * KIB, 256 * KIB),
    (256 * KIB, MIB),
    (MIB, MIB),
    (4 * MIB, 4 * MIB),
)
PACK_LEVELS = (3, 9, 15, packing.LEVEL)
#: As the logarithm that zstd takes; None for what the level says.
PACK_WINDOWS = (17, None, 27)
#: What a touch brings into a pack: so many bytes around it, or None for the whole file.
PACK_GRAINS = (4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, None)
_GROWTH = 4
#: A pack's requests, in stored bytes.
_PACK_REQUEST = 4 * MIB


def sweep_packs(subject: Subject, networks: Sequence[Network], *, report: Reporter = silent) -> Iterator[Trial]:
    """Put a profile's bytes into packs in different ways; starts read nothing else."""
    first, last = PACK_SPANS[2]
    base = _Way(first, last, packing.LEVEL, None, 4 * KIB, "first use")
    ways: list[tuple[str, str, float | None, _Way]] = []
    for low, high in PACK_SPANS:
        name = size_name(low) if low == high else f"{size_name(low)} to {size_name(high)}"
        ways.append(("pack span size", name, float(high), base.but(first=low, last=high)))
    ways += [("pack level", str(level), float(level), base.but(level=level)) for level in PACK_LEVELS]
    for window in PACK_WINDOWS:
        name = "by level" if window is None else f"2^{window} B"
        ways.append(("pack window", name, None, base.but(window=window)))
    for grain in PACK_GRAINS:
        name = "whole files" if grain is None else size_name(grain)
        ways.append(("pack grain", name, None if grain is None else float(grain), base.but(grain=grain)))
    ways += [("pack order", order, None, base.but(order=order)) for order in ("first use", "place")]
    known: dict[_Way, Trial] = {}
    for number, (group, name, value, way) in enumerate(ways):
        report(Progress("sweep", "packs", number, len(ways), unit="ways"))
        made = known.get(way) or known.setdefault(way, _pack_trial(subject, networks, way))
        yield Trial(
            group,
            name,
            value,
            way == base,
            made.spans,
            made.size,
            made.stored,
            made.sampled,
            made.compress_s,
            made.decode_s,
            made.decoded,
            made.starts,
        )
    report(Progress("sweep", "packs", len(ways), len(ways), unit="ways"))


@dataclass(frozen=True, slots=True)
class _Way:
    """How a pack is made: bytes of its first and last spans, level, window, grain and order."""

    first: int
    last: int
    level: int
    window: int | None
    grain: int | None
    order: str

    def but(self, **changes: int | str | None) -> "_Way":
        facts: dict[str, int | str | None] = {name: getattr(self, name) for name in self.__slots__}
        return _Way(**facts | changes)  # type: ignore[arg-type] # fields of a way


def _pack_trial(subject: Subject, networks: Sequence[Network], way: _Way) -> Trial:
    grain = way.grain
    widened = _whole_files(subject) if grain is None else (_aligned(touch, grain) for touch in subject.touches)
    hot = hot_ranges(subject.index, widened, MAX_PACK_SIZE)
    if way.order == "place":
        hot.sort()
    data = b"".join(subject.layers[layer][start : start + length] for layer, start, length in hot)
    starts = list(_pack_starts(len(data), way.first, way.last))
    parameters = zstandard.ZstdCompressionParameters.from_level(way.level)
    if way.window is not None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            way.level, window_log=way.window, enable_ldm=True
        )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    spans = [data[a:b] for a, b in pairwise(starts)]
    made = compress_spans(spans, range(len(spans)), compressor, 1)
    where = _places(hot, Cut(starts, made.stored))
    places = [where(touch) for touch in subject.touches]
    rate = made.decode_s / made.decoded if made.decoded else 0.0
    outcomes = {
        network.name: model_pack(
            subject.touches,
            places,
            made.stored,
            Line.of(network),
            request_size=_PACK_REQUEST,
            decode_s=rate,
        ).to_json()
        for network in networks
    }
    return Trial(
        "",
        "",
        None,
        False,
        len(spans),
        len(data),
        sum(made.stored),
        1.0,
        made.compress_s,
        made.decode_s,
        made.decoded,
        outcomes,
    )


def _aligned(touch: Touch, grain: int) -> Range:
    start = touch.offset // grain * grain
    return Range(touch.layer, start, -(-(touch.offset + touch.length) // grain) * grain - start)


def _whole_files(subject: Subject) -> Iterator[Range]:
    """Of each touch the file that most of it is of."""
    for touch in subject.touches:
        node, start = subject.files.at(subject.keys[touch.layer], touch.offset, touch.length)
        if start:
            yield Range(touch.layer, start, subject.index.size[node])


def _pack_starts(size: int, first: int, last: int) -> Iterator[int]:
    """Where spans begin and the last one ends; they grow as those of packs do."""
    start = 0
    while start < size:
        yield start
        start = min(size, start + min(max(first, start // _GROWTH & -4096), last))
    yield size


def _places(hot: Sequence[Range], cut: Cut) -> Callable[[Touch], list[int]]:
    """Which spans of a pack a touch needs; none for what is not in it, which the tree or a layer has."""
    pages: dict[tuple[Digest, int], int] = {}
    block = 512
    for (layer, offset, length), at in zip(
        hot, accumulate((one.length for one in hot), initial=0), strict=False
    ):
        for n in range(0, length, block):
            pages[layer, offset + n] = at + n

    def find(touch: Touch) -> list[int]:
        first = touch.offset // block * block
        found = {
            number
            for at in range(first, touch.offset + touch.length, block)
            if (place := pages.get((touch.layer, at))) is not None
            for number in cut.covering(place, place + 1)
        }
        return sorted(found)

    return find
