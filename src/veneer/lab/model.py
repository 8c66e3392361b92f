"""What a start would take over a line, computed: a trace, how bytes are cut, and a round trip and a bandwidth.

The model of a line is that of :class:`~veneer.store.link.LinkEstimate`: a request costs a round trip, and bytes
share the bandwidth, first come first served. Reads follow one another. Bytes are usable span by span, as they
are with the store. Not modelled: connections that have to be opened, slow start, requests that wait for a slot,
processor time other than that of decoding.

Not for: saying how long a start takes. It says which of two ways of cutting takes longer, and why.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from veneer.lab.records import Network
from veneer.oci.digest import Digest
from veneer.store.link import worth_bringing

__all__ = ["Cut", "Line", "Modelled", "Touch", "model_demand", "model_pack"]


#: Processor time of a stored byte that comes: verifying, decoding, writing.
_CHECK_S_PER_BYTE = 10e-9


@dataclass(frozen=True, slots=True)
class Line:
    """A line: seconds of a round trip, and bytes a second."""

    rtt_s: float
    bytes_per_s: float

    @property
    def reach(self) -> tuple[int, int]:
        """Stored bytes that a miss brings along, before and behind, as a store would have it."""
        return worth_bringing(self.rtt_s, 1 / self.bytes_per_s, _CHECK_S_PER_BYTE)

    @classmethod
    def of(cls, network: Network) -> "Line":
        """That of a network of the lab."""
        return cls(network.rtt_ms / 1e3, network.mbit * 1e6 / 8 if network.mbit else math.inf)


@dataclass(frozen=True, slots=True)
class Touch:
    """A read: ``think_s`` after the one before was answered, of a range of the device of ``layer``."""

    think_s: float
    layer: Digest
    offset: int
    length: int


class Cut:
    """How a device is cut into spans.

    Args:
        starts: where each span begins in the device, and where the last one ends.
        stored: bytes of each as stored.
    """

    def __init__(self, starts: Sequence[int], stored: Sequence[int]) -> None:
        if len(starts) != len(stored) + 1:
            raise ValueError("a cut has one more boundary than spans")
        self.starts = starts
        self.stored = stored

    def covering(self, start: int, end: int) -> range:
        """The spans that have something of a range."""
        return range(
            max(0, bisect_right(self.starts, start) - 1),
            min(len(self.stored), bisect_right(self.starts, end - 1)),
        )


@dataclass(frozen=True, slots=True)
class Modelled:
    """What a start takes by the model.

    Args:
        seconds: all of it.
        wait_s: of that, waiting for bytes.
        waits: how often.
        requests: to the registry.
        bytes: that they bring.
    """

    seconds: float
    wait_s: float
    waits: int
    requests: int
    bytes: int

    def to_json(self) -> dict[str, float]:
        """The facts by name."""
        return asdict(self)


def model_demand(
    touches: Sequence[Touch],
    cuts: Mapping[Digest, Cut],
    line: Line,
    *,
    window: Callable[[Touch], tuple[int, int]],
    reach: tuple[int, int] = (0, 0),
    decode_s: float = 0.0,
) -> Modelled:
    """A start that fetches what is read, when it is read.

    Args:
        touches: the trace.
        cuts: of all its devices.
        line: to the registry.
        window: the range (start, end) of the device worth fetching with a miss.
        reach: stored bytes before and behind a miss that come along in any case.
        decode_s: seconds to decode a stored byte.
    """
    arrivals: dict[Digest, dict[int, float]] = {layer: {} for layer in cuts}
    now = wait_s = free = 0.0
    waits = requests = fetched = 0
    for touch in touches:
        now += touch.think_s
        cut, here = cuts[touch.layer], arrivals[touch.layer]
        wanted = cut.covering(touch.offset, touch.offset + touch.length)
        missing = [n for n in wanted if n not in here]
        if missing:
            low, high = window(touch)
            ahead = cut.covering(min(low, touch.offset), max(high, touch.offset + touch.length))
            fresh = [n for n in ahead if n not in here]
            fresh += _neighbours(cut, missing, here, reach, fresh)
            # What the reader waits for comes first.
            order = sorted(fresh, key=lambda n: (n not in missing, n))
            requests += 1
            at = max(now + line.rtt_s, free)
            for n in order:
                at += cut.stored[n] / line.bytes_per_s
                fetched += cut.stored[n]
                here[n] = at + cut.stored[n] * decode_s
            free = at
        ready = max(here[n] for n in wanted)
        if ready > now:
            waits += 1
            wait_s += ready - now
            now = ready
    return Modelled(now, wait_s, waits, requests, fetched)


def _neighbours(
    cut: Cut,
    missing: Sequence[int],
    here: Mapping[int, float],
    reach: tuple[int, int],
    known: Sequence[int],
) -> list[int]:
    """The spans on both sides of a miss that come along, other than those known to."""
    before, behind = reach
    found: list[int] = []
    for step, room, n in ((1, behind, missing[0] + 1), (-1, before, missing[0] - 1)):
        while 0 <= n < len(cut.stored) and n not in here and cut.stored[n] <= room:
            room -= cut.stored[n]
            found.append(n)
            n += step
    return [n for n in found if n not in known]


def model_pack(
    touches: Sequence[Touch],
    places: Sequence[Sequence[int]],
    stored: Sequence[int],
    line: Line,
    *,
    request_size: int,
    decode_s: float = 0.0,
) -> Modelled:
    """A start whose bytes all come in one pack, asked for at once.

    Args:
        touches: the trace.
        places: for each touch the pack's spans that it needs.
        stored: bytes of each span of the pack, in the order of the pack.
        line: to the registry.
        request_size: bytes of a request; all are sent at once.
        decode_s: seconds to decode a stored byte.
    """
    total = sum(stored)
    ends = list(accumulate(stored))
    decoded = 0.0
    arrivals: list[float] = []
    for n, end in enumerate(ends):
        # Decoding goes on beside the transfer, one span after the other.
        decoded = max(decoded, line.rtt_s + end / line.bytes_per_s) + stored[n] * decode_s
        arrivals.append(decoded)
    now = wait_s = 0.0
    waits = 0
    for touch, spans in zip(touches, places, strict=True):
        now += touch.think_s
        ready = max((arrivals[n] for n in spans), default=0.0)
        if ready > now:
            waits += 1
            wait_s += ready - now
            now = ready
    return Modelled(now, wait_s, waits, -(-total // request_size), total)
