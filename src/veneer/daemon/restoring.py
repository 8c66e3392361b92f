"""Serving again what an earlier process mounted, and what becomes of mounts that cannot be served yet.

A mount's local copies may be damaged or gone, and its registry may be gone too. It is tried again every few
seconds then, and its reads fail meanwhile: its devices have marks, and nobody answers for them. They must not
lose those, be it because they look like what is left of mounts that are over, or because other mounts with the
same devices end. After a time without any process of the daemon there are no marks at all, so that all devices
are marked before anything else.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from veneer.container.runtime import delete_container
from veneer.daemon.place import Place
from veneer.daemon.request import MountRequest
from veneer.daemon.restorable import Restorable, is_there, noted_caches, read_state
from veneer.errors import IntegrityError, MountError, VeneerError
from veneer.mount.base import Choice
from veneer.mount.resident import Guards, forget_zeros
from veneer.mount.session import MountSession
from veneer.mount.state import finish_retiring, mount_records
from veneer.mount.superblocks import Superblocks
from veneer.store.pin import is_answered_for

__all__ = ["Restoring", "release"]

log = logging.getLogger(__name__)

#: How often a mount that cannot be served again is tried.
RETRY_S = 5.0

_State = tuple[MountRequest, Choice, Restorable]


@dataclass(eq=False)
class _Unserved:
    """A mount that is not served, if it is there. What was written down of it may be damaged."""

    place: Place
    state: _State | None = None
    damage: VeneerError | None = None
    #: The end of its file system, where only the mount table tells of it: detached, it is in no table.
    gone: trio.Event | None = None
    woken: trio.Event = field(default_factory=trio.Event)

    def read(self) -> None:
        """Find out what was written down. Blocks."""
        try:
            self.state = read_state(self.place)
        except IntegrityError as error:
            self.damage = error

    def is_there(self, superblocks: Superblocks) -> bool:
        """Whether the kernel has it, and somebody may have it. Blocks; raises OSError."""
        if self.state is not None:
            return is_there(self.place, self.state[2])
        if self.damage is None:
            return False
        if self.gone is None and is_there(self.place, None):
            self.gone = superblocks.watch(self.place.tree)
        return self.gone is not None and not self.gone.is_set()

    async def unmount(self, *, lazy: bool) -> None:
        """Unmount it, or detach it and free its place for others. Raises MountError."""
        record = self.place.record
        await MountSession(record.mountpoint, record.lower).unmount(lazy=lazy)
        if lazy:
            await trio.to_thread.run_sync(self.place.retire)
        self.woken.set()


class Restoring:
    """Belongs to one event loop.

    Args:
        run_dir: where mounts are recorded.
        nursery: owns mounts.
        guards: what their devices are served by.
        serve: serves a mount that is there, and returns when it does; raises VeneerError or OSError.
        count: is told of what keeps the daemon from ending.
    """

    def __init__(
        self,
        run_dir: Path,
        nursery: trio.Nursery,
        guards: Guards,
        serve: Callable[[Place, MountRequest, Choice, Restorable], Awaitable[None]],
        count: Callable[[int], None],
    ) -> None:
        self._run_dir = run_dir
        self._nursery = nursery
        self._guards = guards
        self._serve = serve
        self._count = count
        self._unserved: set[_Unserved] = set()

    async def restore(self) -> None:
        """Serve again what is mounted, and clean up what is not there any more."""
        caches = set(await trio.to_thread.run_sync(noted_caches, self._run_dir))
        found = []
        for record in await trio.to_thread.run_sync(mount_records, self._run_dir):
            if record.daemon:
                whole = await trio.to_thread.run_sync(finish_retiring, self._run_dir, record)
                one = _Unserved(Place(self._run_dir, whole))
                found.append(one)
                await trio.to_thread.run_sync(one.read)
                if one.state is not None:
                    caches.add(one.state[0].settings.cache_dir)
        pinned = [
            pin.with_name("data") for cache_dir in caches for pin in (cache_dir / "devices").glob("*/mounted")
        ]
        self._guards.devices.expect(0, pinned)
        if self._guards.unguarded:
            await trio.to_thread.run_sync(self._guard, pinned)
        for one in found:
            if not await self._settle(one):
                self._unserved.add(one)
                self._nursery.start_soon(self._keep_trying, one)
                if self._guards.unguarded:
                    log.critical(
                        "id=%s had no guard for a while: who read from it may have seen zeros; giving it up",
                        one.place.record.id,
                    )
                    await trio.to_thread.run_sync(forget_zeros)
                    await self._detach(one)
        self._guards.devices.expect(len(self._unserved))

    async def unmount(self, name: str, *, lazy: bool) -> bool:
        """Unmount what is not served, and say whether there is such a mount. Raises MountError."""
        for one in self._unserved:
            if one.place.record.id == name:
                await one.unmount(lazy=lazy)
                return True
        return False

    async def unmount_all(self) -> None:
        """Detach everything that is not served."""
        for one in list(self._unserved):
            await self._detach(one)

    async def _settle(self, one: _Unserved) -> bool:
        """Serve a mount again, or clean up after it; False if neither can be done yet."""
        record = one.place.record
        if not await trio.to_thread.run_sync(one.is_there, self._guards.superblocks):
            log.info("cleaning up id=%s image=%s: it is not mounted any more", record.id, record.image)
            await trio.to_thread.run_sync(_clean_up, one.place)
            return True
        try:
            if one.damage is not None:
                raise one.damage
            if one.state is not None:
                await self._serve(one.place, *one.state)
        except (VeneerError, OSError) as error:
            log.error("cannot serve again id=%s image=%s cause=%r", record.id, record.image, str(error))
            if one.place.is_over:
                await self._detach(one)
            return False
        log.info("serving again id=%s image=%s", record.id, record.image)
        return True

    async def _keep_trying(self, one: _Unserved) -> None:
        self._count(1)
        try:
            while True:
                with trio.move_on_after(RETRY_S):
                    await one.woken.wait()
                one.woken = trio.Event()
                if await self._settle(one):
                    break
            self._unserved.remove(one)
            self._guards.devices.expect(len(self._unserved))
        finally:
            self._count(-1)

    async def _detach(self, one: _Unserved) -> None:
        """Have nobody come to it any more; it is there as long as it is in use."""
        record = one.place.record
        try:
            if record.container is not None and one.place.is_over:
                await trio.to_thread.run_sync(delete_container, *record.container)
            await one.unmount(lazy=True)
        except MountError as error:
            log.error("cannot unmount id=%s cause=%r", record.id, str(error))

    def _guard(self, pinned: Sequence[Path]) -> None:
        """Mark every device that a mount may have, but not those of another daemon with the same cache."""
        for data in pinned:
            try:
                if not is_answered_for(data.parent):
                    self._guards.devices.guard(data)
            except OSError as error:
                log.critical("reads of %s cannot be watched cause=%r", data, error.strerror)


def release(place: Place) -> None:
    """Undo all that a place has; what cannot be undone is logged. Blocks."""
    try:
        place.release()
    except (MountError, OSError) as error:
        log.error("cannot clean up id=%s cause=%r", place.record.id, str(error))


def _clean_up(place: Place) -> None:
    if place.record.container is not None:
        delete_container(*place.record.container)
    release(place)
