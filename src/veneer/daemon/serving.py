"""One mount of the daemon while it is there: from its mounter to its end.

Not here: what many mounts share, and what becomes of one that fails (:mod:`veneer.daemon.residents`).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from veneer.daemon.holdings import Holding
from veneer.daemon.one import Service, place_bundle
from veneer.daemon.place import Place
from veneer.daemon.request import MountRequest
from veneer.daemon.restorable import Restorable, write_state
from veneer.mount.base import Choice
from veneer.mount.completion import complete_devices
from veneer.mount.resident import Guards, ResidentMounter
from veneer.mount.session import mounted
from veneer.mount.shared import SharedMounter
from veneer.mount.watch import MountTableWatch
from veneer.source.tasks import open_nursery
from veneer.timing import Timing

__all__ = ["Mounting", "serve"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Mounting:
    """A mount that is to be made, or that an earlier process made.

    Args:
        request: what was asked for.
        choice: of the backend.
        place: where it is.
        holding: its image and devices.
        before: counts of the image's transport that are not this mount's doing.
        timing: notes the phases.
        existing: it is there already, and this is what is known of it.
    """

    request: MountRequest
    choice: Choice
    place: Place
    holding: Holding
    before: Mapping[str, int]
    timing: Timing
    existing: Restorable | None

    def service(self, mounter: ResidentMounter | SharedMounter, log_file: Path) -> Service:
        """What is known of it from now on."""
        return Service(
            self.place,
            self.holding.image,
            self.holding.store,
            self.holding.attached,
            mounter,
            log_file,
            transport_before=self.before,
            timing=self.timing,
        )

    def write_down(self, superblocks: tuple[str, ...]) -> None:
        """Write down what is needed to serve it again. Blocks."""
        write_state(self.place, self.request, self.choice, self.holding.image, superblocks)


async def serve(
    mounting: Mounting,
    mounter: ResidentMounter | SharedMounter,
    *,
    guards: Guards,
    watch: MountTableWatch,
    log_file: Path,
    services: set[Service],
    ready: Callable[[Service], None],
) -> None:
    """Mount, and serve what is mounted until it has ended.

    Args:
        mounting: which mount.
        mounter: makes it, or has found it.
        guards: what its devices are served by.
        watch: notices unmounts by hand.
        log_file: where this process logs to.
        services: has the mount in it while it is there.
        ready: told once that it is.
    """
    request, record, holding = mounting.request, mounting.place.record, mounting.holding
    service = mounting.service(mounter, log_file)
    written, there = trio.Event(), trio.Event()
    noted, new = mounter.superblocks, mounting.existing is None
    async with open_nursery() as nursery:
        if new:
            # Looking up the user may wait for the network longer than mounting takes.
            nursery.start_soon(_write, mounting, mounter, noted, written)
            # A tree of its own has devices marked that only this tells of. A place of a shared one that is
            # not written down when this process dies is undone: whoever asked for it has no answer yet.
            if not isinstance(mounter, SharedMounter):
                await trio.to_thread.run_sync(mounting.write_down, noted)
            if not request.record:
                nursery.start_soon(service.follow_hint, request, there)
        async with mounted(
            mounter,
            record.mountpoint,
            lower=record.lower,
            upper=record.upper,
            existing=not new,
            watch=watch,
            superblocks=guards.superblocks,
            timing=mounting.timing,
        ) as session:
            service.session = session
            service.recorder = mounter.recorder
            service.packed = mounter.packed.attached if mounter.packed else None
            if new:
                await written.wait()
                if mounter.superblocks != noted:
                    await trio.to_thread.run_sync(mounting.write_down, mounter.superblocks)
            services.add(service)
            nursery.start_soon(service.follow_place)
            try:
                if request.container:
                    nursery.start_soon(service.follow_owner, request.container.owner)
                if request.complete:
                    what = holding.store, holding.attached, guards.devices.consider
                    nursery.start_soon(complete_devices, *what)
                if mounter.tainted:
                    await service.give_up()
                ready(service)
                there.set()
                await session.ended.wait()
            finally:
                services.discard(service)
            nursery.cancel_scope.cancel()
    log.info("unmounted id=%s image=%s", record.id, record.image)


async def _write(
    mounting: Mounting, mounter: ResidentMounter | SharedMounter, noted: tuple[str, ...], written: trio.Event
) -> None:
    """Write down what is for whoever uses the mount, and serves it after this process."""
    holding = mounting.holding
    await mounter.planned.wait()
    with mounting.timing.phase("bundle"):
        where = holding.image, holding.store, mounter.accounts, holding.accounts
        write_bundle = await place_bundle(mounting.request, mounting.place, *where)

        def write_both() -> None:
            if isinstance(mounter, SharedMounter):
                mounting.write_down(noted)
            write_bundle()

        await trio.to_thread.run_sync(write_both)
    written.set()
