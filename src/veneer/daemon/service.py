"""One mount from request to end: the place where image, store, FUSE tree and overlay are put together.

A mount's record exists before anything is mounted and until everything is gone; an error on the way leaves
nothing behind.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from veneer.daemon.control import Operation, serve_control
from veneer.daemon.mountpoint import prepare_mountpoint
from veneer.daemon.report import LayerReport, MountReport
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import MountError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.mount.backends import Subject, open_mounter
from veneer.mount.base import Mounter
from veneer.mount.overlay import Upper, private_upper
from veneer.mount.session import MountSession, mounted
from veneer.mount.state import (
    MountRecord,
    claim,
    detach,
    directory_of,
    mount_id,
    release,
    retire,
    this_process,
)
from veneer.source.tasks import open_nursery
from veneer.store.attached import AttachedDevice
from veneer.store.spanstore import SpanStore, open_store

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
    began = trio.current_time()
    settings = request.settings
    place = await trio.to_thread.run_sync(_Claim, request)
    try:
        claimed(place.directory)
        async with open_nursery() as nursery:
            signals = await nursery.start(_Signals().follow, nursery.cancel_scope)
            async with AsyncExitStack() as stack:
                store = await stack.enter_async_context(open_store(settings))
                image = await stack.enter_async_context(open_image(request.image, settings, report=report))
                pairs = zip(image.index.devices, image.sources, strict=True)
                attached = [store.attach(device, source) for device, source in pairs]
                mounter = await open_mounter(
                    settings.backend,
                    Subject(image.name, image.index, image.index_descriptor.digest, store, attached),
                    cache_dir=settings.cache_dir,
                    devices=place.devices,
                    report=report,
                )
                service = _Service(place, image, store, attached, mounter)
                session = await stack.enter_async_context(
                    mounted(mounter, place.mountpoint, lower=place.lower, upper=place.upper)
                )
                service.session = session
                signals.service = service
                await nursery.start(serve_control, place.directory, service.control())
                ready(service.info(trio.current_time() - began))
                await session.ended.wait()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(place.release)


class _Claim:
    """The place of one mount: its record, its directory and its mount point. All methods block."""

    def __init__(self, request: MountRequest) -> None:
        settings, mountpoint = request.settings, request.mountpoint
        name, process = mount_id(mountpoint), this_process()
        directory = directory_of(settings.run_dir, name)
        upper: Upper | None = None
        if request.upper:
            upper = Upper.at(request.upper)
        elif request.writable:
            # The last mount there may have been detached and still write to its own.
            upper = private_upper(settings.cache_dir / "uppers" / f"{name}-{process.pid}")
        self._run_dir = settings.run_dir
        self.record = MountRecord(
            id=name,
            kind="mount",
            image=request.image,
            mountpoint=mountpoint,
            process=process,
            lower=directory / "lower" if upper else None,
            devices=directory / "devices",
            upper=upper,
            made_mountpoint=prepare_mountpoint(mountpoint),
        )
        try:
            claim(settings.run_dir, self.record)
        except MountError:
            if self.record.made_mountpoint:
                mountpoint.rmdir()
            raise
        if self.lower:
            self.lower.mkdir()

    @property
    def directory(self) -> Path:
        """For log and socket."""
        return directory_of(self._run_dir, self.record.id)

    @property
    def mountpoint(self) -> Path:
        """Where the tree is seen."""
        return self.record.mountpoint

    @property
    def lower(self) -> Path | None:
        """Where it is below an overlay."""
        return self.record.lower

    @property
    def devices(self) -> Path:
        """Where devices are shown while they are being mounted."""
        return self.directory / "devices"

    @property
    def upper(self) -> Upper | None:
        """What the overlay writes to."""
        return self.record.upper

    def retire(self) -> None:
        """Let another mount have the place."""
        if self.record.kind != "detached":
            self.record = retire(self._run_dir, self.record)

    def release(self) -> None:
        """Undo everything."""
        detach(self.record)
        release(self._run_dir, self.record)


class _Service:
    """What is known about one mount while it is served."""

    def __init__(
        self,
        claim: _Claim,
        image: Image,
        store: SpanStore,
        attached: Sequence[AttachedDevice],
        mounter: Mounter,
    ) -> None:
        self.session: MountSession | None = None
        self._claim = claim
        self._image = image
        self._store = store
        self._attached = attached
        self._mounter = mounter

    def info(self, seconds: float) -> MountInfo:
        """What to tell whoever asked for the mount."""
        record, transport = self._claim.record, self._image.transport_stats
        return MountInfo(
            id=record.id,
            image=record.image,
            digest=str(self._image.manifest.digest),
            mountpoint=os.fspath(record.mountpoint),
            pid=record.process.pid,
            backend=self._mounter.choice.backend,
            backend_reason=self._mounter.choice.reason,
            writable=record.upper is not None,
            upper=None if record.upper is None or record.upper.private else os.fspath(record.upper.directory),
            index_origin=self._image.index_origin,
            log=os.fspath(self._claim.directory / "log"),
            requests=transport.requests,
            bytes_received=transport.bytes_received,
            seconds=round(seconds, 4),
        )

    async def unmount(self, *, lazy: bool) -> None:
        """End the mount. Lazily, it is served on until its last user has left, and its place is free."""
        if self.session is None:
            raise MountError("the mount is not ready yet")
        await self.session.unmount(lazy=lazy)
        if lazy:
            await trio.to_thread.run_sync(self._claim.retire)

    def control(self) -> Mapping[str, Operation]:
        """The operations of the control socket."""

        async def status(_request: dict[str, object]) -> dict[str, object]:
            return self._report().to_json()

        async def stop(request: dict[str, object]) -> dict[str, object]:
            lazy = request.get("lazy") is True
            log.info("unmount asked for lazy=%s", lazy)
            await self.unmount(lazy=lazy)
            return {"type": "stopped"}

        return {"status": status, "stop": stop}

    def _report(self) -> MountReport:
        image, transport = self._image, self._image.transport_stats
        layers = tuple(
            LayerReport(
                digest=str(attached.device.blob.digest),
                size=attached.size,
                cached=0 if attached.file is None else attached.file.map.present_bytes,
                spans=len(attached.spans),
            )
            for attached in self._attached
        )
        return MountReport(
            digest=str(image.manifest.digest),
            backend=self._mounter.choice.backend,
            backend_reason=self._mounter.choice.reason,
            index_origin=image.index_origin,
            writable=self._claim.record.upper is not None,
            uptime_s=round(time.time() - self._claim.record.since, 1),
            inodes=sum(1 for links in image.index.nlink if links),
            layers=layers,
            store=self._store.stats.to_json(),
            fuse=self._mounter.stats.to_json(),
            transport={
                "requests": transport.requests,
                "bytes_received": transport.bytes_received,
                "retries": transport.retries,
            },
        )


class _Signals:
    """Ends a mount on request: at once while it is being made, then in order."""

    def __init__(self) -> None:
        self.service: _Service | None = None

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
    async def _unmount(service: _Service, name: str) -> None:
        log.info("unmounting signal=%s", name)
        try:
            await service.unmount(lazy=False)
        except MountError as error:
            log.warning("detaching, and serving whoever is left cause=%r", error.message)
            await service.unmount(lazy=True)
