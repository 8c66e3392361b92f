"""A profile: which ranges of an image's layers a start reads, in order of first use. As a value and as JSON.

Ranges are of devices, so of uncompressed layers, and layers are named by diffID: a profile fits every image
that has the layer, however it is stored. The document is specified in ``docs/reference/profile-format.md``.

Invariant: no two uses of a profile overlap.

A profile is a hint and nothing more. Nothing that is read from one is believed to be right, only to be small
enough to look at: whoever uses a range has to hold it against the size of the device.

Not for: the bytes of the ranges.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

from veneer.errors import IntegrityError, UnsupportedFormat, UsageError
from veneer.oci.canonical import Json, canonical_json, parse_json
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_LAYERS
from veneer.oci.mediatypes import VENEER_PROFILE
from veneer.prefetch.ranges import cut_to_first, overlaid

__all__ = [
    "DEFAULT_WORKLOAD",
    "MAX_MS",
    "MAX_PROFILE_SIZE",
    "MAX_RUN",
    "MAX_USES",
    "PROFILE_TYPE",
    "Profile",
    "Use",
    "check_workload",
    "disjoint",
    "merge_profiles",
]

#: In the document; another version has another name.
PROFILE_TYPE = VENEER_PROFILE
#: The workload that is meant when none is named.
DEFAULT_WORKLOAD = "default"
#: 1 GiB in single pages. What reads more than that in as many places is helped by no profile.
MAX_USES = 1 << 18
#: More than as many uses take with the longest numbers there may be.
MAX_PROFILE_SIZE = 32 << 20
#: Neighbours that are used one after the other become one use up to this size: its time is to mean something.
MAX_RUN = 1 << 20

#: Every JSON reader has integers up to this exactly.
_MAX_OFFSET = 1 << 53
#: Eleven days: a start takes less.
MAX_MS = 1e9
_MAX_RUNS = 1_000_000
_MAX_WORDS = 10_000
#: A name becomes a part of file names.
_WORKLOAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEMBERS = ("mediaType", "workload", "image", "command", "runs", "layers", "uses")

N = TypeVar("N", int, float)


class Use(NamedTuple):
    """A range of a layer's device.

    Args:
        layer: its diffID.
        offset: in bytes.
        length: in bytes, at least 1.
        first_ms: when it was read first, since the mount.
        wait_ms: how long that took until its bytes were there; the longest such time of its parts.
    """

    layer: Digest
    offset: int
    length: int
    first_ms: float
    wait_ms: float

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Profile:
    """What one workload of an image reads when it starts.

    Args:
        workload: names it among the others of an image.
        image: digest of the manifest that ran, or "": it tells where the profile is from, not what it fits.
        command: what ran.
        runs: how many were observed; 0 when it was told from the image's files alone.
        uses: in order of first use.

    Raises UsageError when ``workload`` is no such name, or there are too many uses.
    """

    workload: str
    image: str
    command: tuple[str, ...]
    runs: int
    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        check_workload(self.workload)
        if len(self.uses) > MAX_USES:
            raise UsageError(f"a profile of {len(self.uses)} ranges, more than the {MAX_USES} allowed")

    @property
    def static(self) -> bool:
        """Whether nothing was run for it."""
        return self.runs == 0

    @property
    def layers(self) -> tuple[Digest, ...]:
        """The layers that it is about, in order of first use."""
        return tuple(dict.fromkeys(use.layer for use in self.uses))

    @property
    def size(self) -> int:
        """Bytes of all ranges."""
        return sum(use.length for use in self.uses)

    def restricted(self, diff_ids: Iterable[Digest]) -> "Profile":
        """The part that is about these layers."""
        wanted = frozenset(diff_ids)
        return replace(self, uses=tuple(use for use in self.uses if use.layer in wanted))

    def to_json(self) -> bytes:
        """The document; equal profiles have equal ones. Times are rounded to microseconds."""
        numbers = {layer: number for number, layer in enumerate(self.layers)}
        uses = [
            [numbers[u.layer], u.offset, u.length, round(u.first_ms, 3), round(u.wait_ms, 3)] for u in self.uses
        ]
        members = (PROFILE_TYPE, self.workload, self.image, self.command, self.runs, [*map(str, numbers)], uses)
        return canonical_json(dict(zip(_MEMBERS, members, strict=True)))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a document. Of uses that overlap, the later ones lose what an earlier one has.

        Raises:
            UnsupportedFormat: it is of another version.
            IntegrityError: it is no profile, or too large.
        """
        # Twice what uses take: words of a command may have some as well.
        if data.count(b",") > 10 * MAX_USES:
            raise _bad("has more values than are allowed")
        value = parse_json(data, "profile", limit=MAX_PROFILE_SIZE, containers=2 * MAX_USES)
        if not isinstance(value, dict) or "mediaType" not in value:
            raise _bad("is something else")
        if (kind := value["mediaType"]) != PROFILE_TYPE:
            raise UnsupportedFormat(f"profile is of the unknown type {str(kind)[:100]!r}, not {PROFILE_TYPE}")
        if set(value) != set(_MEMBERS):
            raise _bad(f"does not have exactly the members {', '.join(_MEMBERS)}")
        workload, image = _text(value, "workload"), _text(value, "image")
        if not _WORKLOAD.fullmatch(workload):
            raise _bad(f"has the workload {workload[:100]!r}")
        command = _texts(value, "command", _MAX_WORDS)
        runs = _number(value["runs"], 0, _MAX_RUNS, "runs")
        layers = tuple(map(_digest, _texts(value, "layers", MAX_LAYERS)))
        if len(set(layers)) != len(layers):
            raise _bad("names a layer twice")
        uses = disjoint(list(_uses(value["uses"], layers)))
        if len(uses) > MAX_USES:
            raise _bad(f"has {len(uses)} ranges, more than the {MAX_USES} allowed")
        return cls(workload, str(_digest(image)) if image else "", command, runs, uses)


def check_workload(name: str) -> None:
    """Raise UsageError unless a workload may be called so."""
    if not _WORKLOAD.fullmatch(name):
        raise UsageError(
            f"invalid workload {name[:100]!r}",
            hint="up to 64 letters, digits, dots, dashes and underscores, the first one a letter or digit",
        )


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """What several runs of one workload used between them, in the order of the median run.

    The rank of a byte in a run is how many bytes were used before it. Bytes are put in order of the median rank
    in those runs that used them; times are medians likewise. A profile that is of several runs itself counts as
    often; a static one has a say only in what no run has used.

    Raises UsageError when there is none, when they are of different workloads, or when too much comes together.
    """
    if not profiles:
        raise UsageError("there is no profile to merge")
    if len(names := {profile.workload for profile in profiles}) > 1:
        raise UsageError(
            f"the profiles are of different workloads: {', '.join(sorted(names))}",
            hint="give the workload of the result: --workload NAME",
        )
    by_layer: dict[Digest, list[list[tuple[int, int, _Seen]]]] = {}
    for number, profile in enumerate(profiles):
        rank = 0
        for use in profile.uses:
            runs = by_layer.setdefault(use.layer, [[] for _ in profiles])
            runs[number].append((use.offset, use.end, _Seen(rank - use.offset, use.first_ms, use.wait_ms)))
            rank += use.length
    weights = [profile.runs for profile in profiles]
    found: list[tuple[int, Use]] = []
    for layer, runs in by_layer.items():
        for start, end, there in overlaid(runs):
            seen = [(one, weights[number]) for number, one in there.items()]
            rank = _median((one.before + start, weight) for one, weight in seen)
            first_ms = _median((one.first_ms, weight) for one, weight in seen)
            wait_ms = _median((one.wait_ms, weight) for one, weight in seen)
            found.append((rank, Use(layer, start, end - start, first_ms, wait_ms)))
    found.sort(key=lambda item: (item[0], item[1].first_ms, item[1].layer, item[1].offset))
    first = profiles[0]
    image = first.image if all(profile.image == first.image for profile in profiles) else ""
    uses = tuple(_joined(use for _, use in found))
    return Profile(first.workload, image, first.command, min(sum(weights), _MAX_RUNS), uses)


class _Seen(NamedTuple):
    """A use in one run; the rank of a byte is ``before`` and its offset."""

    before: int
    first_ms: float
    wait_ms: float


def _median(values: Iterable[tuple[N, int]]) -> N:
    """The lower median of values that count several times."""
    ordered = sorted(values)
    left = (sum(weight for _, weight in ordered) + 1) // 2
    for value, weight in ordered:
        left -= weight
        if left <= 0:
            return value
    raise ValueError("there is no median of nothing")


def _joined(uses: Iterable[Use]) -> Iterator[Use]:
    """Put together again what boundaries of other runs have cut."""
    last: Use | None = None
    for use in uses:
        if last is not None and last.layer == use.layer and last.end == use.offset:
            length = last.length + use.length
            if length <= MAX_RUN:
                last = last._replace(length=length, wait_ms=max(last.wait_ms, use.wait_ms))
                continue
        if last is not None:
            yield last
        last = use
    if last is not None:
        yield last


def disjoint(uses: Sequence[Use]) -> tuple[Use, ...]:
    """The same without overlaps: each byte is left to the first use that has it.

    Pieces of a use follow one another in its place.
    """
    by_layer: defaultdict[Digest, list[tuple[int, int, int]]] = defaultdict(list)
    for number, use in enumerate(uses):
        by_layer[use.layer].append((use.offset, use.end, number))
    pieces: list[tuple[int, int, int]] = []
    for ranges in by_layer.values():
        pieces += ((number, start, end) for start, end, number in cut_to_first(ranges))
    pieces.sort()
    return tuple(uses[number]._replace(offset=start, length=end - start) for number, start, end in pieces)


# Reading


def _bad(problem: str) -> IntegrityError:
    return IntegrityError(f"profile {problem}")


def _uses(value: Json, layers: Sequence[Digest]) -> Iterator[Use]:
    if not isinstance(value, list) or len(value) > MAX_USES:
        raise _bad(f"has no list of at most {MAX_USES} uses")
    for row in value:
        if not isinstance(row, list) or len(row) != 5:
            raise _bad("has a use that is no list of layer, offset, length, first and wait")
        layer = _number(row[0], 0, len(layers) - 1, "layer of a use")
        offset = _number(row[1], 0, _MAX_OFFSET - 1, "offset of a use")
        length = _number(row[2], 1, _MAX_OFFSET - offset, "length of a use")
        yield Use(layers[layer], offset, length, _time(row[3]), _time(row[4]))


def _number(value: Json, least: int, most: int, what: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _bad(f"has {str(value)[:40]!r} as {what}, which is not from {least} to {most}")
    return value


def _time(value: Json) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_MS:  # type: ignore[operator] # a number by now
        raise _bad(f"has {str(value)[:40]!r} as a time in milliseconds")
    return round(float(value), 3)  # type: ignore[arg-type] # as above


def _text(value: dict[str, Json], name: str) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise _bad(f"has no text as {name}")
    return text


def _texts(value: dict[str, Json], name: str, most: int) -> tuple[str, ...]:
    texts = value[name]
    if not isinstance(texts, list) or len(texts) > most:
        raise _bad(f"has no list of at most {most} texts as {name}")
    out = tuple(text for text in texts if isinstance(text, str))
    if len(out) != len(texts):
        raise _bad(f"has something else than texts in {name}")
    return out


def _digest(text: str) -> Digest:
    try:
        return Digest.parse(text)
    except UsageError as error:
        raise _bad(f"has {error.message}") from error
