"""A store whose idea of idleness has a clock that stands still until it is moved."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from veneer.store.cache import DeviceCache
from veneer.store.owned import MIN_IDLE_S, IdleRule
from veneer.store.spanstore import SpanStore


class Clock:
    """Nanoseconds; starts anywhere but at zero."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float = MIN_IDLE_S) -> None:
        self.now += int(seconds * 1e9)


@asynccontextmanager
async def owning_store(directory: Path, clock: Clock, *, quota: int = 1 << 30) -> AsyncIterator[SpanStore]:
    """A store on ``directory / "cache"``, as :func:`open_store` makes one."""
    cache = DeviceCache(directory / "cache", quota, rule=IdleRule(clock=clock))
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            store = SpanStore(cache, nursery=nursery, read_deadline_s=30)
            # Outside of the nursery: what came along with a read may be in a thread still.
            stack.callback(store.close)
            try:
                yield store
            finally:
                nursery.cancel_scope.cancel()
