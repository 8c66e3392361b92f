"""What is known of one mount, and what can be asked of it, whoever serves it."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from veneer.container.bundle import Whereabouts, image_user
from veneer.container.runtime import delete_container, may_be_left
from veneer.container.spec import command_of, runtime_spec, write_bundle
from veneer.container.users import ContainerUser
from veneer.daemon.control import Operation
from veneer.daemon.describe import mount_info, mount_report
from veneer.daemon.hint import follow_hint
from veneer.daemon.place import Place
from veneer.daemon.report import HintReport, MountReport
from veneer.daemon.request import RECORDED, MountInfo, MountRequest
from veneer.errors import MountError
from veneer.image import Image
from veneer.mount.backends import Subject
from veneer.mount.base import Mounter
from veneer.mount.session import MountSession
from veneer.mount.state import Process
from veneer.mount.users import Holder, users_of
from veneer.prefetch.profile import DEFAULT_WORKLOAD
from veneer.prefetch.recorder import Recorder
from veneer.store.attached import AttachedDevice
from veneer.store.spanstore import SpanStore
from veneer.timing import Timing
from veneer.timing.gather import record_of
from veneer.timing.record import TimedDevice, TimingRecord

__all__ = ["Service", "place_bundle", "stopped", "subject"]

log = logging.getLogger(__name__)

#: What nobody uses ends when it is unmounted, and the kernel says so at once.
END_S = 0.1
#: How long the end of what has been unmounted may take before it is called detached.
LINGER_S = 2.0


def stopped(report: MountReport | None, users: Sequence[str] | None) -> dict[str, object]:
    """What to answer who had a mount stopped: ``users`` is what :meth:`Service.end` said."""
    return {"type": "stopped", "report": report and report.to_json(), "users": users}


def subject(image: Image, store: SpanStore, attached: Sequence[AttachedDevice]) -> Subject[AttachedDevice]:
    """An open image as backends see it."""
    return Subject(
        image.name,
        image.devices,
        lambda: image.index,
        image.identity,
        store,
        attached,
        image.artifact,
        store.freeze,
    )


async def place_bundle(
    request: MountRequest,
    place: Place,
    image: Image,
    store: SpanStore,
    known: Whereabouts | None = None,
    accounts: dict[str, ContainerUser] | None = None,
) -> Callable[[], None]:
    """What writes the bundle of a mount that is a container's root, and blocks; nothing for other mounts.

    ``accounts`` has users of the image that have been looked up before, and is told of new ones.
    """
    if request.container is None:
        return lambda: None
    options = request.container.options
    user = None if accounts is None else accounts.get(options.user)
    if user is None:
        user = await image_user(image, store, options, known)
        if accounts is not None:
            accounts[options.user] = user
    record = place.record
    spec = runtime_spec(image.config, options, user, root=os.fspath(record.mountpoint), name=record.id)
    return partial(write_bundle, place.directory, spec)


class Service:
    """What is known about one mount while it is served.

    Args:
        place: where it is.
        image: what is mounted.
        store: where its bytes are.
        attached: its devices.
        mounter: how it is mounted.
        log: what its process has to say.
        store_before: counts of the store that are not this mount's doing; by default those so far.
        transport_before: counts of the image's transport that are not this mount's doing.
        timing: has noted the phases.

    Attributes:
        session: the mount, once it is there.
        made: what whoever asked for it was told.
        packed: device of the pack that files are mapped to.
        recorder: what it has read since, if that is noted.
        hint: what is fetched first.
    """

    def __init__(
        self,
        place: Place,
        image: Image,
        store: SpanStore,
        attached: Sequence[AttachedDevice],
        mounter: Mounter,
        log: Path,
        *,
        store_before: Mapping[str, int] | None = None,
        transport_before: Mapping[str, int] | None = None,
        timing: Timing,
    ) -> None:
        self.session: MountSession | None = None
        self.made: MountInfo | None = None
        self.recorder: Recorder | None = None
        self.packed: AttachedDevice | None = None
        self.hint: HintReport | None = None
        self.place = place
        self._image = image
        self._store = store
        self._attached = attached
        self._mounter = mounter
        self._log = log
        self._timing = timing
        self._store_before = store.stats.to_json() if store_before is None else store_before
        self._transport_before = transport_before or {}

    async def follow_hint(self, request: MountRequest, mounted: trio.Event) -> None:
        """Fetch what is known of the start, once there is something to be had."""

        def told(hint: HintReport) -> None:
            self.hint = hint

        config, container = self._image.config, request.container
        words = command_of(config, container.options) if container else config.entrypoint + config.cmd
        cache_dir, workload = request.settings.cache_dir, request.workload
        await follow_hint(self._image, self._store, self._attached, cache_dir, workload, words, mounted, told)

    def info(self, seconds: float) -> MountInfo:
        """What to tell whoever asked for the mount."""
        return mount_info(
            self.place.record,
            self._image,
            choice=self._mounter.choice,
            log=self._log,
            directory=self.place.directory,
            transport=self._transport(),
            seconds=seconds,
        )

    def _transport(self) -> dict[str, int]:
        return _since(self._transport_before, self._image.transport_stats.to_json())

    async def unmount(self, *, lazy: bool) -> None:
        """Have nobody come to it any more. Raises MountError, also when it is in use and not ``lazy``."""
        if self.session is None:
            raise MountError("the mount is not ready yet")
        await self.session.unmount(lazy=lazy)

    async def give_up(self) -> None:
        """Have nobody come to it any more, and free its place, whoever uses it."""
        await self.unmount(lazy=True)
        if self.session is not None:
            await self._free_place(await trio.to_thread.run_sync(self.session.holders))

    async def end(self, *, lazy: bool) -> list[str] | None:
        """Unmount it, and wait for its end, but not for long.

        Returns None when it has ended. If it has not, it is served until its last user has left, and its place
        is free; then who uses it, as far as can be told. Raises MountError like :meth:`unmount`.
        """
        # Of what is mounted nowhere, it cannot be told any more who has files open.
        before = await trio.to_thread.run_sync(users_of, self.place.record.mountpoint) if lazy else []
        await self.unmount(lazy=lazy)
        holders = await self._outlived(bool(before))
        return None if holders is None else before + [holder.text for holder in holders]

    async def follow_place(self) -> None:
        """Free the place of a mount that has been unmounted, by whomever, and is in use still."""
        if (session := self.session) is not None:
            await session.detached.wait()
            try:
                await self._outlived(False)
            except MountError as error:
                log.error("%s", error.message)

    async def _outlived(self, used: bool) -> list[Holder] | None:
        """Free the place if the file system does not end now, and say where it is mounted. None if it ends.

        ``used``: somebody has files open.
        """
        if (session := self.session) is None:
            raise MountError("the mount is not ready yet")
        if await self.ended(END_S):
            return None
        holders = await trio.to_thread.run_sync(session.holders)
        # It may take its time to end, or its users cannot be seen.
        if await self.ended(0 if holders or used else LINGER_S):
            return None
        await self._free_place(holders)
        users = ", ".join(holder.text for holder in holders)
        log.info("unmounted and in use still, serving it on id=%s users=%r", self.place.record.id, users)
        return holders

    async def _free_place(self, holders: Sequence[Holder]) -> None:
        seen_elsewhere = any(holder.elsewhere for holder in holders)
        await trio.to_thread.run_sync(partial(self.place.retire, seen_elsewhere=seen_elsewhere))

    async def ended(self, within_s: float) -> bool:
        """Wait for the end of what has been unmounted: whether nobody had it any more within this time."""
        if self.session is None:
            raise MountError("the mount is not ready yet")
        with trio.move_on_after(within_s):
            await self.session.ended.wait()
        return self.session.ended.is_set()

    async def follow_owner(self, owner: Process) -> None:
        """End the mount when whoever runs the container has ended, and the container if it is left."""
        if (process := owner.opened()) is not None:
            try:
                await trio.lowlevel.wait_readable(process)
            finally:
                os.close(process)
        container = self.place.record.container
        if container is not None and may_be_left(*container):
            log.warning("whoever ran the container has gone")
            await trio.to_thread.run_sync(delete_container, *container)
        await self.leave()

    async def leave(self) -> None:
        """End the mount, now that its container has ended."""
        try:
            await self.unmount(lazy=False)
        except MountError:
            # Busy: something that left the container uses it still.
            await self.unmount(lazy=True)

    def control(self) -> Mapping[str, Operation]:
        """The operations of the control socket."""

        async def status(_request: dict[str, object]) -> dict[str, object]:
            return self.report().to_json()

        async def stop(request: dict[str, object]) -> dict[str, object]:
            lazy = request.get("lazy") is True
            log.info("unmount asked for lazy=%s", lazy)
            report = self.report()
            return stopped(report, await self.end(lazy=lazy))

        async def timing(_request: dict[str, object]) -> dict[str, object]:
            return self.timed()

        return {"status": status, "stop": stop, "timing": timing}

    def timed(self) -> dict[str, object]:
        """The answer to who asks what took how long."""
        devices = [(device, "layer") for device in self._attached]
        if self.packed is not None:
            devices.append((self.packed, "pack"))
        record: TimingRecord = record_of(
            self._timing,
            self._store.log,
            {
                one.device.key.hex: TimedDevice(
                    str(one.device.blob.digest), kind, one.size, one.device.blob.size
                )
                for one, kind in devices
            },
            image=self.place.record.image,
            digest=str(self._image.manifest.digest),
            backend=self._mounter.choice.backend,
        )
        return {"type": "timing", "record": record.to_json()}

    async def recorded(self) -> dict[str, object]:
        """Write what has been read so far to :data:`RECORDED`: it may be too much for an answer."""
        if (recorder := self.recorder) is None:
            raise MountError(
                "what the mount reads is not recorded, or not any more since the daemon was restarted",
                hint="record again",
            )

        def write() -> None:
            profile = recorder.profile(DEFAULT_WORKLOAD, str(self._image.manifest.digest), ())
            (self.place.directory / RECORDED).write_bytes(profile.to_json())

        try:
            await trio.to_thread.run_sync(write)
        except OSError as error:
            raise MountError(f"cannot write what was recorded: {error.strerror}") from error
        return {"type": "recorded", "lost": recorder.lost, "shared": recorder.shared}

    def report(self) -> MountReport:
        """The mount and its counters."""
        return mount_report(
            self.place.record,
            self._image,
            self._attached,
            choice=self._mounter.choice,
            inodes=self._mounter.inodes,
            store=_since(self._store_before, self._store.stats.to_json()),
            transport=self._transport(),
            kernel=self._mounter.stats.to_json(),
            direct=self._mounter.direct,
            packed=self.packed,
            hint=self.hint,
        )


def _since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in now.items()}
