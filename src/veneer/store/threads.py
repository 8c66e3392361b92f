"""The threads that hash, decode and write for one store, and the files that have to wait for them.

A device that is given up is closed only when no thread can still be using its file: the number of a closed
descriptor soon belongs to another file. Used from the store's own thread only.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from veneer.store.devicefile import DeviceFile

__all__ = ["Threads"]

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """As many threads as there are processors."""

    def __init__(self) -> None:
        self.limiter = trio.CapacityLimiter(os.cpu_count() or 1)
        self._calls: set[object] = set()
        self._retired: list[tuple[DeviceFile, set[object]]] = []

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in a thread. A cancellation waits for its end."""
        with self.using():
            return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self.limiter)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Keep every file open that is so now."""
        call = object()
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.remove(call)
            for file, calls in self._retired:
                calls.discard(call)
                if not calls:
                    file.close()
            self._retired = [(file, calls) for file, calls in self._retired if calls]

    def retire(self, file: DeviceFile) -> None:
        """Close a file, which no new call will use, once every call that runs now has ended."""
        if self._calls:
            self._retired.append((file, set(self._calls)))
        else:
            file.close()

    def close(self) -> None:
        """Close what is left; no call may be running."""
        for file, _ in self._retired:
            file.close()
        self._retired = []
