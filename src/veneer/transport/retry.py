"""The one retry policy: what is tried again, how often, how long, and when it is given up.

An error is worth another try when its class says so (``temporary``): no connection, a reset, a stall, a
truncated body, 429, 500, 502, 503, 504. Everything else is final at once. Time is trio's, so tests run on a
mock clock. Not for: deciding that two servers hold the same bytes; fail-over is a BlobSource of its own.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import trio

from veneer.errors import RateLimited, RegistryError, Unavailable

__all__ = ["MIN_RATE", "Attempts", "Patience", "TransportStats", "parse_retry_after"]

_Result = TypeVar("_Result")

#: First pause. Long enough for a restarting connection tracker, short enough not to be noticed.
_FIRST_PAUSE_S = 0.1
#: Longest pause of our own choice: a registry that is back is found again within this time.
_MAX_PAUSE_S = 5.0
#: Longest pause that a server may ask for in one Retry-After; more would look like a hang.
_MAX_RETRY_AFTER_S = 60.0
#: Bytes of progress that make an operation's patience fresh again. Smaller steps do not: a server that
#: resets after every few bytes must not keep an operation alive for ever.
_PROGRESS = 256 << 10
#: Bytes a second below which a transfer counts as stalled, and which large transfers get extra time for.
MIN_RATE = 8 << 10


@dataclass(slots=True)
class TransportStats:
    """What a transport has done so far. Plain counters that only ever grow.

    Args:
        requests: HTTP requests sent, redirects, tokens and repeats included.
        bytes_received: body bytes received, of errors too.
        retries: pauses before another try.
    """

    requests: int = 0
    bytes_received: int = 0
    retries: int = 0

    def to_json(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Patience:
    """How much an operation may cost before it fails: at most ``tries`` tries within ``deadline_s`` seconds."""

    tries: int
    deadline_s: float

    def for_transfer(self, length: int) -> "Patience":
        """The same with the time that ``length`` bytes take at the slowest acceptable rate."""
        return Patience(self.tries, self.deadline_s + length / MIN_RATE)


class Attempts:
    """The tries that one operation has left. Belongs to one task.

    Either :meth:`run` does everything, or a loop of its own calls :meth:`recover` with each error and
    :meth:`progress` with the bytes that it will not have to ask for again.
    """

    def __init__(self, patience: Patience, stats: TransportStats) -> None:
        self._patience = patience
        self._stats = stats
        self._failures = 0
        self._progress = 0
        self._deadline = trio.current_time() + patience.deadline_s
        self._last: RegistryError | None = None

    async def run(self, operation: Callable[[], Awaitable[_Result]], what: str) -> _Result:
        """The first result of ``operation``, which is called again after temporary failures."""
        with self.bounded(what):
            while True:
                try:
                    return await operation()
                except RegistryError as error:
                    await self.recover(error)
        raise AssertionError("unreachable: bounded() returns only after its body")

    async def recover(self, error: RegistryError) -> None:
        """Sleep until the next try, or raise ``error`` when there is none."""
        self._failures += 1
        self._last = error
        if not error.temporary or self._failures >= self._patience.tries:
            raise error
        pause = self._pause(error)
        if trio.current_time() + pause >= self._deadline:
            raise error  # sleeping would only delay the same answer
        self._stats.retries += 1
        await trio.sleep(pause)

    def progress(self, length: int) -> None:
        """Note ``length`` new bytes; enough of them make the patience fresh again."""
        self._progress += length
        if self._progress >= _PROGRESS:
            self._progress = 0
            self._failures = 0
            self._deadline = max(self._deadline, trio.current_time() + self._patience.deadline_s)

    @contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Cancel the body at the deadline and raise Unavailable instead; ``what`` names it."""
        with trio.move_on_at(self._deadline) as scope:
            yield
        if scope.cancelled_caught:
            before = f"; before that: {self._last.message}" if self._last else ""
            raise Unavailable(
                f"{what}: not finished within {self._patience.deadline_s:g} s{before}",
                hint="check the network, or allow more time",
            ) from self._last

    def _pause(self, error: RegistryError) -> float:
        pause = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
        # Jitter: clients that failed together must not come back together.
        pause *= random.uniform(0.5, 1.0)
        if isinstance(error, RateLimited | Unavailable) and error.retry_after_s is not None:
            pause = max(pause, min(error.retry_after_s, _MAX_RETRY_AFTER_S))
        return pause


def parse_retry_after(value: str, now: datetime | None = None) -> float | None:
    """Seconds to wait that a Retry-After header asks for, or None when there is none that makes sense."""
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter for numbers that no date can have
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
