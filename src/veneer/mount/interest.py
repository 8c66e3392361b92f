"""Whether anybody is there for whom background work on a mount is worth while.

A tree that several places share is kept for a while without any of them (:mod:`veneer.mount.shared`). What was
begun for them rests meanwhile, and goes on when there is one again.
"""

from collections.abc import Awaitable, Callable

import trio

__all__ = ["Interest"]


class Interest:
    """Somebody is there, until :meth:`rest`. Belongs to one event loop."""

    def __init__(self) -> None:
        self._there = trio.Event()
        self._there.set()
        self._work: set[trio.CancelScope] = set()

    def rest(self) -> None:
        """Nobody is there any more."""
        if self._there.is_set():
            self._there = trio.Event()
        for scope in self._work:
            scope.cancel()

    def go_on(self) -> None:
        """Somebody is there again."""
        self._there.set()

    async def there(self) -> None:
        """Wait until somebody is there."""
        await self._there.wait()

    async def pursue(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do some work to its end while somebody is there; what nobody waits for is cancelled, and begun again.

        It is begun even if nobody is there: what had been asked for ahead of it is its to withdraw.
        """
        while True:
            with trio.CancelScope() as scope:
                if not self._there.is_set():
                    scope.cancel()
                self._work.add(scope)
                try:
                    await work()
                    return
                finally:
                    self._work.remove(scope)
            await self._there.wait()
