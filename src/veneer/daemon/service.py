"""One mount in a process of its own, from request to end: image, store, backend and overlay put together.

For backends that FUSE serves: one process serves one FUSE file system, and what fails there fails alone. A
mount's record exists before anything is mounted and until everything is gone; an error on the way leaves
nothing behind.
"""

import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from veneer.daemon.ask import MOUNT_SOCKET
from veneer.daemon.control import listen_in, serve_control
from veneer.daemon.one import Service, place_bundle, subject
from veneer.daemon.place import Place
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import MountError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.image.refute import watch_layers
from veneer.mount.backends import open_mounter
from veneer.mount.base import Mounter
from veneer.mount.completion import complete_devices, prove_when_quiet
from veneer.mount.packed import originals
from veneer.mount.session import mounted
from veneer.source.tasks import open_nursery
from veneer.store.attached import AttachedDevice
from veneer.store.fetch import Priority
from veneer.store.spanstore import SpanStore, open_store
from veneer.timing import Timing

__all__ = ["serve_mount"]

log = logging.getLogger(__name__)


async def serve_mount(
    request: MountRequest,
    ready: Callable[[MountInfo], None],
    *,
    claimed: Callable[[Path], None] = lambda _directory: None,
    report: Reporter = silent,
) -> None:
    """Mount an image and serve it until it is unmounted.

    Args:
        request: what to mount and where.
        ready: called once when the mount can be used.
        claimed: called before that, with the mount's own directory.
        report: notices about the image.

    Raises:
        VeneerError: it could not be mounted.
    """
    began, timing = trio.current_time(), Timing()
    settings = request.settings
    place = await trio.to_thread.run_sync(Place.claimed, request)
    try:
        claimed(place.directory)
        async with open_nursery() as nursery:
            signals = await nursery.start(_Signals().follow, nursery.cancel_scope)
            async with AsyncExitStack() as stack:
                with timing.phase("store"):
                    store = await stack.enter_async_context(open_store(settings))
                image = await stack.enter_async_context(
                    open_image(
                        request.image,
                        settings,
                        keeper=store,
                        pack=request.workload,
                        report=report,
                        timing=timing,
                    )
                )
                pairs = zip(image.devices, image.sources, strict=True)
                with timing.phase("attach"):
                    attached = [store.attach(device, source) for device, source in pairs]
                watch_layers(image, attached, settings.cache_dir)
                if image.pack is not None:
                    # Here a pack only tells what will be read: reads are answered by this process in any case.
                    copied = originals(image.pack.index, store, attached)
                    nursery.start_soon(copied.bring, Priority.PROFILE)
                mounter = await _mounter(request, place, image, store, attached, report, timing)
                service = Service(
                    place,
                    image,
                    store,
                    attached,
                    mounter,
                    place.directory / "log",
                    store_before={},  # it is this mount's alone
                    timing=timing,
                )
                there = trio.Event()
                nursery.start_soon(service.follow_hint, request, there)
                session = await stack.enter_async_context(
                    mounted(
                        mounter,
                        place.record.mountpoint,
                        lower=place.record.lower,
                        upper=place.record.upper,
                        timing=timing,
                    )
                )
                service.session = session
                signals.service = service
                nursery.start_soon(service.follow_place)
                listener = await trio.to_thread.run_sync(listen_in, place.directory, MOUNT_SOCKET)
                nursery.start_soon(serve_control, listener, service.control())
                if request.container:
                    nursery.start_soon(service.follow_owner, request.container.owner)
                timing.mark("mounted")
                if request.complete:
                    nursery.start_soon(complete_devices, store, attached)
                elif mounter.choice.backend == "erofs-fuse":
                    nursery.start_soon(prove_when_quiet, store, attached)
                ready(service.info(trio.current_time() - began))
                there.set()
                await session.ended.wait()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(place.release)


async def _mounter(
    request: MountRequest,
    place: Place,
    image: Image,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    report: Reporter,
    timing: Timing,
) -> Mounter:
    async def write_bundle() -> None:
        with timing.phase("bundle"):
            await trio.to_thread.run_sync(await place_bundle(request, place, image, store))

    # Looking up the user waits for the network, making the metadata image for the processor.
    async with open_nursery() as nursery:
        nursery.start_soon(write_bundle)
        with timing.phase("metadata"):
            return await open_mounter(
                request.settings.backend,
                subject(image, store, attached),
                cache_dir=request.settings.cache_dir,
                devices=place.devices,
                report=report,
            )


class _Signals:
    """Ends a mount on request: at once while it is being made, then in order."""

    def __init__(self) -> None:
        self.service: Service | None = None

    async def follow(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus["_Signals"] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """The first signal unmounts, lazily when the mount is in use; the second ends it at once."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started(self)
            number = await anext(aiter(signals))
            if self.service is not None:
                await self._unmount(self.service, signal.Signals(number).name)
                number = await anext(aiter(signals))
            log.warning("ending at once signal=%s", signal.Signals(number).name)
            scope.cancel()

    @staticmethod
    async def _unmount(service: Service, name: str) -> None:
        log.info("unmounting signal=%s", name)
        try:
            await service.unmount(lazy=False)
        except MountError as error:
            log.warning("detaching, and serving whoever is left cause=%r", error.message)
            await service.unmount(lazy=True)
