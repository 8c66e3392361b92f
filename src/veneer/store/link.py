"""What requests to one registry cost: round-trip time and bandwidth, as seen by whoever fetches from it.

The time of a request is taken to be ``rtt + length * concurrency / bandwidth``: requests that run together
share the link. Bandwidth comes from a weighted least-squares line through the recent requests, which forgets
old ones; the round trip is the time to the first byte in the faster ones of them, as busy processors and full
queues only ever add to it. From them follow the two sizes that coalescing needs: requests, not bytes, are the
scarce resource on a long link, and the other way round on a short one.
"""

from collections import deque

import trio

__all__ = ["LinkEstimate", "worth_bringing"]

#: Start values, for a registry in the same region: 20 ms and 25 MB/s.
_START_RTT_S = 0.020
_START_S_PER_BYTE = 1 / 25e6
#: Weight of older requests, a request: about the last 20 count.
_FORGET = 0.95
#: The round trip is seen in the faster quarter of so many requests.
_FIRSTS, _FASTER = 16, 4
#: A range up to this length that comes in one piece is as good as its first byte.
_SHORT = 64 << 10
#: Below this spread of lengths (bytes, squared) a slope is noise, and the earlier one stays.
_LEAST_SPREAD = (64 << 10) ** 2
#: What ranges of this length took says how fast the link is at least, whatever shorter ones do.
_LONG, _LONGS = 1 << 20, 4
#: As long as there was none, so do so many shorter ones, by as much as comes behind the first piece: what is
#: waited for before that is the other side's processor.
_TAIL, _TAILS = 64 << 10, 3
#: One stall must not look like a slow link: longer times count as this multiple of what was expected.
_SURPRISE = 8
_RTT_BOUNDS_S = (20e-6, 5.0)
_S_PER_BYTE_BOUNDS = (1 / 20e9, 1 / 10e3)
#: A range is at least two usual spans, and never so long that a demand read queues behind it for long.
_LEAST_RANGE, _MOST_RANGE = 256 << 10, 4 << 20
#: Nobody waits for completion, so its ranges may be longer and fewer.
_BACKGROUND_FACTOR = 4
#: A reader does not notice that a demand comes so much later.
_LEAST_BULK_S = 0.050
_LEAST_GAP, _MOST_GAP = 4 << 10, 1 << 20
#: Asking takes time besides the round trip: our own processor's, for the request and for the reader that waits,
#: and more of a registry's than the first byte tells. It is given as the stored bytes that are verified, kept
#: and decoded meanwhile: a slower processor does both more slowly. Measured as a whole (decision 0024).
_ASKING = 1280 << 10
#: For what lies behind a demand, so much of what lies before it comes too: a reader has to wait for that.
_BEFORE = 1 / 8
#: Requests after which the estimate is more than a guess.
_LEAST_OBSERVED = 4
#: How much longer than any before it a range may become on the strength of the estimate.
_GROWTH = 4


class LinkEstimate:
    """The line through recent (length, seconds); shared by all sources behind one link.

    Whoever sends a request says when it begins and ends.
    """

    def __init__(self) -> None:
        #: Requests under way, and those of them that a reader waits for.
        self.running = self.demanded = 0
        #: Requests for what nobody asked for yet (:mod:`veneer.store.bulk`), sent or about to be.
        self.bulk = 0
        #: Where to wait for one of these numbers to fall.
        self.freed = trio.lowlevel.ParkingLot()
        self.rtt_s = _START_RTT_S
        self.s_per_byte = _START_S_PER_BYTE
        #: Processor time that verifying, decoding and keeping takes, a stored byte.
        self.check_s_per_byte = 0.0
        # The start values weigh as much as one request of a usual range.
        self._observed = self._longest = 0
        self._checked = self._check_s = 0.0
        self._weight = 1.0
        self._mean_length = float(_LEAST_RANGE)
        self._mean_time = self.rtt_s + self._mean_length * self.s_per_byte
        self._spread = 0.0
        self._covariance = 0.0
        self._firsts: deque[float] = deque(maxlen=_FIRSTS)
        #: Seconds a byte of the latest long ranges, round trips included.
        self._longs: deque[float] = deque(maxlen=_LONGS)
        #: The same of the latest shorter ones, without what came before the first piece.
        self._tails: deque[float] = deque(maxlen=_TAILS)

    def begin(self, *, demand: bool) -> int:
        """Count a request, and say how many there are now."""
        self.running += 1
        self.demanded += demand
        return self.running

    def end(self, *, demand: bool) -> int:
        """Count it no longer, and say how many there were."""
        self.running -= 1
        self.demanded -= demand
        self.freed.unpark_all()
        return self.running + 1

    def observe(
        self,
        length: int,
        elapsed_s: float,
        concurrency: float = 1.0,
        *,
        first_s: float | None = None,
        first_length: int = 0,
    ) -> None:
        """Count one request that brought ``length`` bytes while ``concurrency`` requests ran.

        If they came in several pieces, ``first_s`` is when the first one came, and ``first_length`` its length.
        """
        effective = length * max(1.0, concurrency)
        time = min(elapsed_s, _SURPRISE * (self.rtt_s + effective * self.s_per_byte))
        self._observed += 1
        self._longest = max(self._longest, length)
        self._weight = self._weight * _FORGET + 1
        from_mean = effective - self._mean_length
        self._mean_length += from_mean / self._weight
        time_from_mean = time - self._mean_time
        self._mean_time += time_from_mean / self._weight
        self._spread = self._spread * _FORGET + from_mean * (effective - self._mean_length)
        self._covariance = self._covariance * _FORGET + from_mean * (time - self._mean_time)
        # Requests of one length say nothing about the slope; the term below holds on to what was known.
        slope = (self._covariance + _LEAST_SPREAD * self.s_per_byte) / (self._spread + _LEAST_SPREAD)
        # Nor may the line say that a request of no bytes takes less than no time.
        slope = min(slope, self._mean_time / self._mean_length)
        # Times of short requests are those of the other side's processors, more than of the link.
        if length >= _LONG:
            self._longs.append(time / effective)
        elif first_s is not None and length - first_length >= _TAIL:
            self._tails.append((elapsed_s - first_s) / (length - first_length))
        if self._longs:
            slope = min(slope, max(self._longs))
        elif len(self._tails) == _TAILS:
            slope = min(slope, max(self._tails))
        self.s_per_byte = _clamp(slope, *_S_PER_BYTE_BOUNDS)
        if first_s is None:
            first_s = elapsed_s if length <= _SHORT else self._mean_time - self.s_per_byte * self._mean_length
        self._firsts.append(first_s)
        faster = sorted(self._firsts)[(len(self._firsts) - 1) // _FASTER]
        self.rtt_s = _clamp(faster, *_RTT_BOUNDS_S)

    def observe_check(self, length: int, cpu_s: float) -> None:
        """Count ``length`` stored bytes that took so long to verify, decode and keep."""
        self._checked = self._checked * _FORGET + length
        self._check_s = self._check_s * _FORGET + cpu_s
        self.check_s_per_byte = min(self._check_s / self._checked, _S_PER_BYTE_BOUNDS[1])

    @property
    def bandwidth_delay(self) -> float:
        """Bytes that arrive in one round trip."""
        return self.rtt_s / self.s_per_byte

    @property
    def range_limit(self) -> int:
        """Longest range worth asking for while a reader waits: its bytes take as long as asking does."""
        return int(_clamp(self.bandwidth_delay, _LEAST_RANGE, _MOST_RANGE))

    @property
    def reach(self) -> tuple[int, int]:
        """How long a range may grow by what nobody asked for yet: bytes before a demand, and behind it.

        In all that is what comes, and is verified, in the time that asking takes: a guess never costs more than
        asking again would. On a near link it is the verifying that limits it.
        """
        if self._observed < _LEAST_OBSERVED:
            return 0, 0
        # Bandwidth is a guess for lengths far from those that were seen.
        most = _GROWTH * self._longest
        return worth_bringing(self.rtt_s, self.s_per_byte, self.check_s_per_byte, most=most)

    @property
    def background_limit(self) -> int:
        """The same when nobody waits."""
        return min(_BACKGROUND_FACTOR * self.range_limit, _MOST_RANGE)

    @property
    def bulk_limit(self) -> int:
        """Longest range of bulk: a demand that comes right after it waits for it, two round trips at most."""
        seconds = max(_LEAST_BULK_S, 2 * self.rtt_s)
        return int(_clamp(seconds / self.s_per_byte, _LEAST_RANGE, _MOST_RANGE))

    @property
    def is_wide(self) -> bool:
        """Whether the longest range takes so little time that a demand need not care."""
        return self._observed >= _LEAST_OBSERVED and _MOST_RANGE * self.s_per_byte <= _LEAST_BULK_S

    @property
    def gap_limit(self) -> int:
        """Bytes that may be fetched for nothing to save a request: half a round trip's, as requests overlap."""
        return int(_clamp(self.bandwidth_delay / 2, _LEAST_GAP, _MOST_GAP))


def worth_bringing(
    rtt_s: float, s_per_byte: float, check_s_per_byte: float, *, most: int = _MOST_RANGE
) -> tuple[int, int]:
    """Stored bytes that a miss brings along, before it and behind.

    Args:
        rtt_s: a round trip.
        s_per_byte: of the link; 0 where it takes no time.
        check_s_per_byte: processor time that verifying, decoding and keeping takes.
        most: at most so many.
    """
    slower = max(s_per_byte, check_s_per_byte)
    delay = (rtt_s + _ASKING * check_s_per_byte) / slower
    behind = int(min(delay, _MOST_RANGE, most))
    return int(behind * _BEFORE), behind


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))
