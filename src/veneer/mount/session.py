"""One live mount: the tree that a backend shows, the overlay over it, and how both end.

A session ends when its file system is gone. Being unmounted, through :meth:`MountSession.unmount` or by
anybody's ``umount``, is not always the end: it may be mounted elsewhere, in the mount namespace of a container
for example, and a lazily detached one has users. Leaving the context ends it in any case, by detaching whatever
is still mounted.
"""

import errno
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.base import Mounter
from veneer.mount.overlay import mount_overlay, prepare_upper
from veneer.mount.superblocks import Superblocks
from veneer.mount.upper import Upper, discard
from veneer.mount.users import Holder, holders_of, users_of
from veneer.mount.watch import MountTableWatch
from veneer.source.tasks import open_nursery
from veneer.timing import UNTIMED, Timing

__all__ = ["MountSession", "mounted"]

log = logging.getLogger(__name__)


class MountSession:
    """A mount that is being served. Belongs to the event loop that made it."""

    def __init__(self, mountpoint: Path, lower: Path | None, *, alone: bool = True) -> None:
        """``alone``: nobody else has what is mounted on ``lower``."""
        self.mountpoint = mountpoint
        #: Set when nobody can reach the file system any more.
        self.ended = trio.Event()
        #: Set when it is not mounted there any more; what is mounted there after that is somebody else's.
        self.detached = trio.Event()
        self._lower = lower
        self._alone = alone
        self._unmounting = trio.Lock()
        #: Numbers of its file systems, once it has been unmounted.
        self._devices: set[str] = set()

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmount, or with ``lazy`` only make it unreachable for newcomers.

        Does nothing when that has been done before. Raises MountError, with nothing changed, when the mount is
        in use.
        """
        async with self._unmounting:
            if not self.detached.is_set():
                await trio.to_thread.run_sync(self._unmount, self.mountpoint, lazy)
                self.detached.set()

    def _unmount(self, mountpoint: Path | None, lazy: bool) -> None:
        """Unmount what is there and what is below; only that when somebody has unmounted it by hand."""
        below = self._lower
        for place in (mountpoint, below if self._alone else None):
            if place is not None:
                self._devices |= {entry.device for entry in kernel.mounts_at(place) if entry.ours}
        try:
            if mountpoint is not None:
                kernel.unmount_ours(mountpoint, lazy=lazy)
            if below is not None:
                # Nobody is meant to be in the private mount below; whoever is must not keep the rest.
                kernel.unmount_ours(below, lazy=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise MountError(f"cannot unmount {self.mountpoint}: {error.strerror}") from error
            users = ", ".join(users_of(self.mountpoint)) or "a process that is not visible from here"
            raise MountError(
                f"cannot unmount {self.mountpoint}: it is in use by {users}",
                hint="end what uses it, or unmount with --lazy",
            ) from error

    def holders(self) -> list[Holder]:
        """What keeps the file system after it has been unmounted, as far as can be seen. Blocks."""
        return holders_of(self._devices) if self._devices else []

    async def _follow_superblock(self, over: trio.Event) -> None:
        """End the session when the last user of the overlay has left."""
        await over.wait()
        # Whoever unmounted it by hand left the private mount below.
        await self.unmount(lazy=True)
        self.ended.set()

    async def _follow_place(self, watch: MountTableWatch) -> None:
        """Notice that somebody unmounts it by hand."""
        device = await watch.gone(self.mountpoint)
        async with self._unmounting:
            if not self.detached.is_set():
                self._devices |= {device} if device else set()
                await trio.to_thread.run_sync(self._unmount, None, True)
                self.detached.set()


def _overlaid(
    lower: Path, upper: Upper, mountpoint: Path, existing: bool, superblocks: Superblocks | None
) -> trio.Event | None:
    """Mount the overlay unless it should be there, and return an event for its end if it is and can be told."""
    if not existing:
        prepare_upper(upper, lower)
        mount_overlay(lower, upper, mountpoint)
    elif not any(entry.ours and entry.fstype == "overlay" for entry in kernel.mounts_at(mountpoint)):
        return None
    if superblocks is None:
        return None
    try:
        return superblocks.watch(mountpoint)
    except OSError as error:
        raise MountError(f"cannot watch {mountpoint}: {error.strerror}") from error


@asynccontextmanager
async def mounted(
    mounter: Mounter,
    mountpoint: Path,
    *,
    lower: Path | None = None,
    upper: Upper | None = None,
    existing: bool = False,
    watch: MountTableWatch | None = None,
    superblocks: Superblocks | None = None,
    timing: Timing = UNTIMED,
) -> AsyncIterator[MountSession]:
    """Show a tree on ``mountpoint``, or on ``lower`` with an overlay of ``upper`` on ``mountpoint``.

    Args:
        mounter: the backend with the tree.
        mountpoint: an existing directory.
        lower: an existing private directory for the tree below an overlay.
        upper: what is written; given exactly when ``lower`` is.
        existing: all of it has been mounted by an earlier process, and is only to be followed.
        watch: is being served, for whoever has many mounts.
        superblocks: notices the end of the overlay, which is that of the session: its lower tree may be in use
            elsewhere.
        timing: notes the phases.

    Raises:
        MountError: this machine or user cannot mount, or not there.
    """
    if (lower is None) != (upper is None):
        raise ValueError("an overlay takes a lower and an upper directory")
    session = MountSession(mountpoint, lower, alone=superblocks is None)
    began = time.monotonic()
    try:
        async with mounter.shown(lower or mountpoint, session.ended.set), open_nursery() as nursery:
            timing.add("show", began, time.monotonic())
            try:
                if lower is not None and upper is not None:
                    with timing.phase("overlay"):
                        over = await trio.to_thread.run_sync(
                            _overlaid, lower, upper, mountpoint, existing, superblocks
                        )
                    if over is not None:
                        nursery.start_soon(session._follow_superblock, over)
                if watch is None:
                    watch = MountTableWatch()
                    await nursery.start(watch.serve)
                nursery.start_soon(session._follow_place, watch)
                yield session
            finally:
                with trio.CancelScope(shield=True):
                    await session.unmount(lazy=True)
                nursery.cancel_scope.cancel()
    finally:
        if upper is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(discard, upper)
