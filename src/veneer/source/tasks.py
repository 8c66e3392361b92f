"""Several requests at once with one outcome: all results, or the error that a single one would have raised.

trio reports failures of concurrent tasks as exception groups, because there may be several. For independent
requests of one operation the first is the reason and the rest are its consequence.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from veneer.errors import VeneerError

__all__ = ["open_nursery", "run_all"]

T = TypeVar("T")


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises the first foreseen error bare; anything unforeseen stays in its group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        foreseen, others = group.split(VeneerError)
        if foreseen is None or others is not None:
            raise
        raise _first(foreseen) from group


def _first(group: BaseExceptionGroup[VeneerError]) -> VeneerError:
    error: VeneerError | BaseExceptionGroup[VeneerError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def run_all(calls: Sequence[Callable[[], Awaitable[T]]], *, at_once: int | None = None) -> list[T]:
    """The results of all calls, in order; at most ``at_once`` run at a time, and start in order."""
    results: dict[int, T] = {}
    slots = trio.Semaphore(at_once or max(1, len(calls)))

    async def run(number: int) -> None:
        try:
            results[number] = await calls[number]()
        finally:
            slots.release()

    async with open_nursery() as nursery:
        for number in range(len(calls)):
            await slots.acquire()
            nursery.start_soon(run, number)
    return [results[number] for number in range(len(calls))]
