"""All mounts of the daemon: made, restored after a restart of this process, ended.

A mount's record names everything that is needed to serve it again; with it lies the request, whose image is
pinned to the manifest that was mounted. So a restart needs local copies of manifest and index, and no registry.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from veneer.daemon.holdings import Holdings
from veneer.daemon.one import Service, subject
from veneer.daemon.place import Place
from veneer.daemon.request import MountInfo, MountRequest
from veneer.daemon.restorable import Restorable, note_cache
from veneer.daemon.restoring import Restoring, release
from veneer.daemon.serving import Mounting, serve
from veneer.daemon.trees import Tree, Trees
from veneer.errors import MountError, VeneerError
from veneer.events import Reporter, silent
from veneer.image import Image
from veneer.mount.base import Choice
from veneer.mount.fsmount import can_clone
from veneer.mount.kernel import mounts_at
from veneer.mount.resident import Guards, ResidentMounter
from veneer.mount.scribe_main import Commission, Pack
from veneer.mount.shared import SharedMounter
from veneer.mount.watch import MountTableWatch
from veneer.source.tasks import open_nursery
from veneer.timing import Timing

__all__ = ["Residents"]

log = logging.getLogger(__name__)

#: What a container leaves, or an unmount by hand, is undone in milliseconds, unless something else uses it.
SETTLE_S = 2.0


class Residents:
    """The mounts that this process serves. Belongs to one event loop.

    Args:
        run_dir: where they are recorded.
        nursery: owns them.
        guards: what their devices are served by.
        watch: notices unmounts by hand.
        log_file: where this process logs to.
    """

    def __init__(
        self, run_dir: Path, nursery: trio.Nursery, guards: Guards, watch: MountTableWatch, log_file: Path
    ) -> None:
        self._busy = 0
        self._changed = trio.Event()
        self.holdings = Holdings(nursery)
        self.trees = Trees(nursery, self.holdings, self._count)
        self.holdings.let_go, self.holdings.let_go_soon = self.trees.let_go, self.trees.let_go_soon
        self._services: set[Service] = set()
        # Of all mounts, from before there is anything in them until they have been cleaned up.
        self._places: set[Place] = set()
        #: Those of them that have been mounted.
        self._shown: set[Place] = set()
        self._noted: set[Path] = set()
        self._noting = trio.Lock()
        self._run_dir = run_dir
        self._nursery = nursery
        self._guards = guards
        self._watch = watch
        self._log_file = log_file
        self.restoring = Restoring(run_dir, nursery, guards, self._serve_again, self._count)

    async def mount(self, request: MountRequest, choice: Choice, report: Reporter = silent) -> MountInfo:
        """Mount an image. Returns when the mount can be used. Raises VeneerError."""
        began = trio.current_time()
        service: Service = await self._nursery.start(self._live, request, choice, report)
        info = service.made = service.info(trio.current_time() - began)
        log.info(
            "mounted id=%s image=%s digest=%s mountpoint=%r seconds=%.3f",
            info.id,
            info.image,
            info.digest,
            info.mountpoint,
            info.seconds,
        )
        return info

    async def until_empty(self) -> None:
        """Wait until nothing is mounted."""
        while self._busy:
            await self._changed.wait()

    @property
    def services(self) -> dict[str, Service]:
        """What is mounted, by name, which changes when a mount is detached."""
        return {service.place.record.id: service for service in self._services}

    @property
    def count(self) -> int:
        """Mounts that are there, or being made."""
        return self._busy

    async def changed(self) -> None:
        """Wait until a mount comes or goes."""
        await self._changed.wait()

    async def cleaned_up(self, place: Place) -> None:
        """Wait until a mount that has ended has left nothing."""
        while place in self._places:
            await self.changed()

    async def _vacated(self, mountpoint: Path) -> None:
        """Wait, but not for long, until what somebody has just unmounted there by hand has left nothing."""

        def is_leaving() -> bool:
            there = any(place.record.mountpoint == mountpoint for place in self._shown)
            return there and not any(entry.ours for entry in mounts_at(mountpoint))

        with trio.move_on_after(SETTLE_S):
            while is_leaving():
                await self.changed()

    async def settle(self) -> None:
        """Wait, but not for long, until the mounts of containers whose owners have ended are gone."""
        over = {place for place in self._places if place.is_over}
        with trio.move_on_after(SETTLE_S):
            while over & self._places:
                await self.changed()

    async def _serve_again(
        self, place: Place, request: MountRequest, choice: Choice, existing: Restorable
    ) -> None:
        await self._nursery.start(partial(self._live, request, choice, silent, place=place, existing=existing))

    async def _live(
        self,
        request: MountRequest,
        choice: Choice,
        report: Reporter,
        *,
        place: Place | None = None,
        existing: Restorable | None = None,
        task_status: trio.TaskStatus[Service],
    ) -> None:
        """One mount from beginning to end. An error before it is there goes to whoever asked for it."""
        self._count(1)
        started, timing = False, Timing()

        async def claimed(claim: Callable[[], Place]) -> None:
            nonlocal place
            if not request.container:
                await self._vacated(request.mountpoint)
            place = await trio.to_thread.run_sync(claim)
            self._places.add(place)

        try:
            holding = None
            try:
                async with open_nursery() as nursery:
                    if place is None:
                        claim = partial(Place.claimed, request, daemon=True)
                        nursery.start_soon(claimed, claim)
                    else:
                        self._places.add(place)
                    await (self.trees.let_go() if request.record else self.trees.let_go_deleted())
                    # What is there has to be served as it was made; what is recorded must not go to a pack.
                    pack = existing.pack if existing else None if request.record else request.workload
                    holding, before = await self.holdings.take(
                        request.image,
                        request.settings,
                        report,
                        pack,
                        timing,
                        partial(self._write_ahead, request),
                        existing.index if existing else None,
                    )
                if place is None:
                    raise AssertionError("a claim that failed has raised")

                def ready(service: Service) -> None:
                    nonlocal started
                    started = True
                    self._shown.add(mounting.place)
                    timing.mark("mounted")
                    task_status.started(service)

                mounting = Mounting(request, choice, place, holding, before, timing, existing)
                await self._serve(mounting, ready)
            finally:
                with trio.CancelScope(shield=True):
                    if place is not None and (started or existing is None):
                        await trio.to_thread.run_sync(release, place)
                    if holding is not None:
                        self.holdings.give_back(holding)
                    if place is not None:
                        self._places.discard(place)
                        self._shown.discard(place)
        except VeneerError as error:
            if not started:
                raise
            log.error("mount ended image=%s cause=%r", request.image, error.message)
        except Exception as error:
            # A bug met by one mount must not end what serves all others.
            log.exception("bug in the mount of image=%s", request.image)
            if not started:
                cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                raise MountError(f"internal error: {cause!r}", hint="please report this") from error
        finally:
            self._count(-1)

    async def _serve(self, mounting: Mounting, ready: Callable[[Service], None]) -> None:
        tree = await self._tree(mounting)
        try:
            if tree is None:
                mounter: ResidentMounter | SharedMounter = self._mounter(mounting)
            else:
                mounter = SharedMounter(mounting.choice, tree.shared)
            await serve(
                mounting,
                mounter,
                guards=self._guards,
                watch=self._watch,
                log_file=self._log_file,
                services=self._services,
                ready=ready,
            )
        finally:
            if tree is not None:
                self.trees.give_back(tree)

    def _mounter(self, mounting: Mounting) -> ResidentMounter:
        request, holding = mounting.request, mounting.holding
        return ResidentMounter(
            self._guards,
            subject(holding.image, holding.store, holding.attached),
            holding.store,
            holding.files,
            cache_dir=request.settings.cache_dir,
            choice=mounting.choice,
            existing=mounting.existing,
            record=request.record and mounting.existing is None,
            packed=holding.packed,
            timing=mounting.timing,
        )

    async def _tree(self, mounting: Mounting) -> Tree | None:
        """The tree that a place shares with others; None for one of its own.

        Whether a place is in use is known only from an overlay on top. What is recorded has to be read anew.
        """
        request, place, holding = mounting.request, mounting.place, mounting.holding
        if place.record.upper is None:
            return None
        if mounting.existing is not None:
            return self.trees.found(holding, self._mounter(mounting), place.tree)
        if request.record or not can_clone():
            return None
        cache_dir = request.settings.cache_dir
        async with self._noting:
            if cache_dir not in self._noted:
                await trio.to_thread.run_sync(note_cache, self._run_dir, cache_dir)
                self._noted.add(cache_dir)
        return self.trees.take(holding, partial(self._mounter, mounting))

    def _write_ahead(self, request: MountRequest, image: Image) -> None:
        """Have the metadata image written while devices are made."""
        if image.artifact is not None:
            packs = [Pack(image.pack.named.descriptor, image.pack.data)] if image.pack else []
            cache_dir = request.settings.cache_dir
            commission = Commission(image.artifact, image.identity, len(image.devices), cache_dir, packs)
            self._nursery.start_soon(self._guards.scribe.write_ahead, commission)

    def _count(self, change: int) -> None:
        self._busy += change
        self._changed.set()
        self._changed = trio.Event()
