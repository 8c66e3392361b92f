"""Trees that several places have at the same time, or one after the other: one file system, one page cache.

A :class:`SharedTree` is mounted in no directory, until it is let go; each place has a clone of that mount,
under an overlay of its own. Whether a place is in use is seen from its overlay: what is below is others', too.

Invariant: the devices of a tree are held until its file system is gone, whoever let go of it when.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from veneer.errors import MountError, VeneerError
from veneer.mount.base import Choice
from veneer.mount.fsmount import attach, clone
from veneer.mount.packed import Packed
from veneer.mount.precontent import PreContentStats
from veneer.mount.resident import HeldTree, ResidentMounter
from veneer.source.tasks import open_nursery
from veneer.store.spanstore import AttachedDevice

__all__ = ["SharedMounter", "SharedTree"]

log = logging.getLogger(__name__)


class SharedTree:
    """One tree. Belongs to one event loop.

    Args:
        mounter: of the tree.
        found: where it is mounted already. Such a tree is in its places, and gets no more.
    """

    def __init__(self, mounter: ResidentMounter, found: Path | None = None) -> None:
        self.mounter = mounter
        #: Set when it is there, or cannot be made.
        self.made = trio.Event()
        #: Set when its file system is gone and nothing is held for it any more.
        self.gone = trio.Event()
        self._found = found
        self._held: HeldTree | None = None
        self._starts: trio.Nursery | None = None
        #: Whether it has had a place, and whether a later start is being followed.
        self._placed = self._following = False
        self._failure: VeneerError | None = None
        self._over = trio.Event()

    async def keep(self) -> None:
        """Make it, and hold it until it is let go of and its last user has left."""
        try:
            async with self.mounter.held(self._found) as self._held, open_nursery() as self._starts:
                self.made.set()
                await self._over.wait()
                self._starts.cancel_scope.cancel()
        except VeneerError as error:
            if self.made.is_set():
                raise
            self._failure = error
        except Exception as error:
            if self.made.is_set():
                raise
            log.exception("bug while a tree was made")
            self._failure = MountError(f"internal error: {error!r}", hint="please report this")
        finally:
            self.made.set()
            self.gone.set()

    def rest(self) -> None:
        """Fetch nothing ahead while no place has it."""
        self.mounter.interest.rest()

    def go_on(self) -> None:
        """Go on with what rests: it has a place again."""
        self.mounter.interest.go_on()

    def let_go(self) -> None:
        """Keep it no longer than its places do."""
        self._over.set()

    async def held(self) -> HeldTree:
        """The tree, once it is there. Raises VeneerError when it could not be made."""
        await self.made.wait()
        if self._failure is not None:
            raise self._failure
        if self._held is None:
            raise MountError("the daemon is being stopped", hint="try again in a moment")
        return self._held

    async def place(self, held: HeldTree, target: Path) -> None:
        """Put a clone of the mount on ``target``, for a container to start from. Raises MountError."""
        if held.mount is None:
            return
        # One that is being followed already ends the small read-ahead for this one, too.
        again, self._placed = self._placed and not self._following, True
        follow = await trio.to_thread.run_sync(self._place, held, held.mount, target, again)
        if follow is not None and self._starts is not None and not self._over.is_set():
            # It goes on when the container has ended before the kernel reads ahead again.
            self._following = True
            self._starts.start_soon(self._follow, follow)

    async def _follow(self, start: Callable[[], Awaitable[None]]) -> None:
        await start()
        self._following = False

    def _place(
        self, held: HeldTree, mount: int, target: Path, again: bool
    ) -> Callable[[], Awaitable[None]] | None:
        try:
            with clone(mount) as copy:
                attach(copy, target)
        except OSError as error:
            raise MountError(f"cannot mount EROFS on {target}: {error.strerror}") from error
        return self.mounter.begin_next_start(held) if again else None

    @property
    def attached(self) -> Sequence[AttachedDevice]:
        """The devices that it reads, once it is there."""
        return () if self._held is None else self._held.attached


class SharedMounter:
    """One place of a tree. See :class:`~veneer.mount.base.Mounter`.

    Args:
        choice: how this place came to its backend.
        tree: which is kept for as long as this is used.
    """

    recorder = None

    def __init__(self, choice: Choice, tree: SharedTree) -> None:
        self.choice = choice
        self.stats: PreContentStats = tree.mounter.stats
        #: See :class:`~veneer.mount.resident.ResidentMounter`.
        self.planned = tree.mounter.planned
        self._tree = tree

    @property
    def inodes(self) -> int:
        """Number of inodes that it shows."""
        return self._tree.mounter.inodes

    @property
    def direct(self) -> Collection[int]:
        """Devices that the kernel reads without asking anybody."""
        return self._tree.mounter.direct

    @property
    def packed(self) -> Packed | None:
        """The pack that is used, once the tree is there."""
        return self._tree.mounter.packed

    @property
    def superblocks(self) -> tuple[str, ...]:
        """Names of the file system in the kernel's list, once the tree is there."""
        return self._tree.mounter.superblocks

    @property
    def accounts(self) -> Mapping[bytes, Sequence[tuple[AttachedDevice, int, int]]]:
        """See :class:`~veneer.mount.resident.ResidentMounter`."""
        return self._tree.mounter.accounts

    @property
    def tainted(self) -> bool:
        """See :class:`~veneer.mount.resident.ResidentMounter`."""
        return self._tree.mounter.tainted

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`. Leaving waits for nobody: the tree is not this place's."""
        held = await self._tree.held()
        await self._tree.place(held, target)

        async def follow() -> None:
            await held.end()
            gone()

        async with open_nursery() as nursery:
            nursery.start_soon(follow)
            yield
            nursery.cancel_scope.cancel()
