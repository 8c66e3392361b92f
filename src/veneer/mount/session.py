"""One live mount: the FUSE session, the overlay over it, and how both end.

pyfuse3 serves one file system per process, so there is at most one session at a time. The event loop never
touches its own mount: every system call on it goes through a thread, because answering it is the loop's own
work.

A session ends when its file system is gone: unmounted through :meth:`MountSession.unmount`, by anybody's
``umount``, or when the last user of a lazily detached mount has left. Leaving the context ends it in any
case, by detaching whatever is still mounted.
"""

import errno
import logging
import os
import select
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import pyfuse3
import trio

from veneer.errors import MountError, VeneerError
from veneer.mount import kernel
from veneer.mount.access import check_fuse, fuse_options, others_allowed
from veneer.mount.fuse import TreeOperations
from veneer.mount.overlay import Upper, discard, mount_overlay, prepare_upper
from veneer.mount.users import users_of

__all__ = ["MountSession", "mounted"]

log = logging.getLogger(__name__)

D = TypeVar("D")

#: Requests served at once. Cold reads wait for the network here, and one more request than this would make
#: a look-up wait behind them; each costs one coroutine and a few touched pages of its buffer.
MAX_TASKS = 512


class MountSession:
    """A mount that is being served. Belongs to the event loop that made it."""

    def __init__(self, mountpoint: Path, lower: Path | None) -> None:
        self.mountpoint = mountpoint
        #: Set when nobody can reach the file system any more.
        self.ended = trio.Event()
        self._lower = lower
        self._unmounting = trio.Lock()
        # What is mounted there after that is somebody else's.
        self._detached = False

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmount, or with ``lazy`` only make it unreachable for newcomers.

        Does nothing when that has been done before. Raises MountError, with nothing changed, when the mount is
        in use.
        """
        async with self._unmounting:
            if not self._detached:
                await trio.to_thread.run_sync(self._unmount, lazy)
                self._detached = True

    def _unmount(self, lazy: bool) -> None:
        try:
            kernel.unmount_ours(self.mountpoint, lazy=lazy)
            if self._lower is not None:
                # Nobody is meant to be in the private mount below; whoever is must not keep the rest.
                kernel.unmount_ours(self._lower, lazy=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise MountError(f"cannot unmount {self.mountpoint}: {error.strerror}") from error
            users = ", ".join(users_of(self.mountpoint)) or "a process that is not visible from here"
            raise MountError(
                f"cannot unmount {self.mountpoint}: it is in use by {users}",
                hint="end what uses it, or unmount with --lazy",
            ) from error

    async def _follow_overlay(self) -> None:
        """End the session when somebody unmounts the overlay by hand."""
        with open("/proc/self/mountinfo", "rb") as table, select.epoll() as changes:  # noqa: ASYNC230 - procfs
            # The table itself always polls readable; through epoll only its changes (POLLPRI) count.
            changes.register(table.fileno(), select.EPOLLPRI)
            while any(entry.ours for entry in kernel.mounts_at(self.mountpoint)):
                await trio.lowlevel.wait_readable(changes.fileno())
                changes.poll(0)
        await self.unmount(lazy=True)


@asynccontextmanager
async def mounted(
    operations: TreeOperations[D], mountpoint: Path, *, lower: Path | None = None, upper: Upper | None = None
) -> AsyncIterator[MountSession]:
    """Serve a tree on ``mountpoint``, or on ``lower`` with an overlay of ``upper`` on ``mountpoint``.

    Args:
        operations: the tree.
        mountpoint: an existing directory.
        lower: an existing private directory for the tree below an overlay.
        upper: what is written; given exactly when ``lower`` is.

    Raises:
        MountError: this machine or user cannot mount, or not there.
    """
    if (lower is None) != (upper is None):
        raise ValueError("an overlay takes a lower and an upper directory")
    session = MountSession(mountpoint, lower)
    failure: VeneerError | None = None
    _initialise(operations, lower or mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, session)
            try:
                if lower is not None and upper is not None:
                    await trio.to_thread.run_sync(prepare_upper, upper, operations.index)
                    await trio.to_thread.run_sync(mount_overlay, lower, upper, mountpoint)
                    nursery.start_soon(session._follow_overlay)
                yield session
            except VeneerError as error:
                failure = error  # raised below, outside of the nursery, which would wrap it in a group
            finally:
                with trio.CancelScope(shield=True):
                    await session.unmount(lazy=True)
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
        if upper is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(discard, upper)
    if failure is not None:
        raise failure


async def _serve(session: MountSession) -> None:
    await pyfuse3.main(max_tasks=MAX_TASKS)
    session.ended.set()


def _initialise(operations: TreeOperations[D], target: Path) -> None:
    check_fuse()
    root = os.geteuid() == 0
    said: list[str] = []
    try:
        with _captured_stderr(said):
            pyfuse3.init(operations, str(target), fuse_options(root=root, allow_other=others_allowed()))
    except RuntimeError as error:
        reason = "; ".join(said) or str(error)
        raise MountError(f"cannot mount on {target}: {reason}", hint="run veneer doctor") from error


@contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """What C code writes to file descriptor 2, which is the only place where libfuse says why it failed."""
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                file.seek(0)
                lines += filter(None, file.read().decode(errors="replace").split("\n"))
    finally:
        os.close(saved)
