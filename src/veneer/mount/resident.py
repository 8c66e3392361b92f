"""The backend erofs-fanotify as a mounter: devices held, EROFS over them, and what a restart finds of both.

A mounter shows its tree in one place, or is *held* in none, for others to show (:mod:`veneer.mount.shared`).
What is mounted outlives the process that made it. Another one takes it over by holding the same devices again;
between the two, the kernel's questions wait in the group that their supervisor keeps open.

Invariant: devices are let go only when the file system over them is gone, however long that takes.

A little longer than other modules here: what a mount takes, and what a restart finds of it, belong together.
"""

import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from veneer.errors import CacheError, IntegrityError, MountError, UnsupportedFormat, VeneerError
from veneer.mount import kernel
from veneer.mount.backends import Subject
from veneer.mount.base import Choice
from veneer.mount.bdi import ASKED_KB, read_ahead_setting, set_read_ahead, stop_read_ahead
from veneer.mount.erofs_fanotify import mount_guarded
from veneer.mount.filetable import FileTable
from veneer.mount.hot import HotFile, read_in
from veneer.mount.interest import Interest
from veneer.mount.metadata import MetadataImage, kept_image, metadata_image, mount_kept
from veneer.mount.packed import Packed, follow_next_start, follow_start
from veneer.mount.precontent import GuardedDevices, PreContentStats
from veneer.mount.scribe import Scribe
from veneer.mount.scribe_main import Commission, Pack
from veneer.mount.superblocks import Superblocks, listed_superblocks, vanished
from veneer.mount.tail import tail_file
from veneer.oci.digest import Digest
from veneer.prefetch.recorder import Recorder
from veneer.source.tasks import open_nursery
from veneer.store.spanstore import AttachedDevice, SpanStore
from veneer.timing import UNTIMED, Timing

__all__ = ["Existing", "Guards", "HeldTree", "ResidentMounter"]

log = logging.getLogger(__name__)

#: Returns when a file system is gone.
_End = Callable[[], Awaitable[None]]

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

#: One mount at a time, so that what is new in the list is ours.
_mounting = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Guards:
    """What all mounts of the daemon share.

    Args:
        devices: answers the kernel's questions.
        superblocks: notices the end of file systems.
        scribe: writes metadata images.
        unguarded: mounts of an earlier daemon have had nobody to ask for a while.
        kept: devices of mounts that could not be served again, held for good.
    """

    devices: GuardedDevices
    superblocks: Superblocks
    scribe: Scribe = field(default_factory=Scribe)
    unguarded: bool = False
    kept: list[AsyncExitStack] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Existing:
    """A mount that an earlier process made.

    Args:
        superblocks: how the kernel called it then; more than one when somebody else mounted at that moment.
    """

    superblocks: tuple[str, ...]


class ResidentMounter:
    """One image for the kernel to read by itself. See :class:`~veneer.mount.base.Mounter`.

    Args:
        guards: shared with all other mounts.
        subject: the image; its store is the only one of its cache directory in this process.
        files: its files by place.
        cache_dir: for the metadata image.
        choice: how it came to this backend.
        existing: the mount is there already.
        record: note what is read. Of a mount that is there already, nobody knows what was read before.
        packed: the pack to use; a mount that is there already uses it.
        timing: notes the phases.

    Attributes:
        packed: the pack that is used.
        recorder: what was noted, from the time when the mount is there.
        interest: whether anybody has it, so that there is a start to fetch a pack for.
    """

    def __init__(
        self,
        guards: Guards,
        subject: Subject[AttachedDevice],
        store: SpanStore,
        files: FileTable,
        *,
        cache_dir: Path,
        choice: Choice,
        existing: Existing | None = None,
        record: bool = False,
        packed: Packed | None = None,
        timing: Timing = UNTIMED,
    ) -> None:
        if record and existing is not None:
            raise ValueError("what an existing mount has read is not known")
        self.choice = choice
        self.packed = packed
        self.recorder: Recorder | None = None
        self.interest = Interest()
        self.inodes = 0
        self.stats: PreContentStats = guards.devices.stats
        #: Names of the file system in the kernel's list, once it is mounted.
        self.superblocks: tuple[str, ...] = existing.superblocks if existing else ()
        #: Where the files are that tell of users, once :attr:`planned` is set; what is not there is empty.
        self.accounts: dict[bytes, list[tuple[AttachedDevice, int, int]]] = {}
        self.planned = trio.Event()
        self._hot: Sequence[HotFile] = ()
        #: Whether somebody may have read zeros for bytes that were not there; such a mount is to be given up.
        self.tainted = False
        self._guards = guards
        self._subject = subject
        self._store = store
        self._files = files
        self._cache_dir = cache_dir
        self._existing = existing
        self._record = record
        self._timing = timing

    @property
    def direct(self) -> Collection[int]:
        """See :class:`~veneer.mount.base.Mounter`."""
        return [number for number, device in enumerate(self._subject.attached) if device.complete]

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`. Leaving waits until the last user has left."""
        async with self._there(target) as shown, open_nursery() as nursery:

            async def follow() -> None:
                await shown.end()
                gone()

            nursery.start_soon(follow)
            shown.handed_over = True
            yield
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def held(self, found: Path | None = None) -> AsyncIterator["HeldTree"]:
        """Hold the tree without a place of its own; one that exists already was ``found`` somewhere.

        Leaving lets go of it, and waits until the last user of any place has left. Raises MountError.
        """
        async with self._there(found) as shown:
            shown.handed_over = shown.mount is None
            yield HeldTree(shown.mount, shown.end, shown.attached, shown.read_ahead)

    @asynccontextmanager
    async def _there(self, target: Path | None) -> AsyncIterator["_Shown"]:
        """The tree, mounted on ``target`` or in no directory, and its start followed."""
        async with AsyncExitStack() as stack:
            try:
                shown = await self._set_up(stack, target)
            except BaseException:
                if self._existing is not None:
                    # It is mounted, and whoever reads it has to be kept from holes: its devices stay held.
                    self._guards.kept.append(stack.pop_all())
                raise
            async with open_nursery() as nursery:
                if self.packed is not None:
                    what = self.packed, self._store, self._guards.devices, shown.attached
                    nursery.start_soon(
                        follow_start, *what, shown.read_ahead, self.interest, partial(self._read_in, shown.root)
                    )
                yield shown
                nursery.cancel_scope.cancel()

    async def _set_up(self, stack: AsyncExitStack, target: Path | None) -> "_Shown":
        """Hold the devices and mount, or find the mount; ``stack`` undoes it all."""
        devices, layers = self._guards.devices, self._subject.attached
        opened: list[Callable[[], None]] = []
        if self._existing is None:
            opened += await self._begin_pack(stack)
        written: list[MetadataImage] = []

        async def write_metadata() -> None:
            with self._timing.phase("metadata"):
                written.append(await self._metadata())

        async with open_nursery() as nursery:
            nursery.start_soon(write_metadata)
            with self._timing.phase("guard"):
                opened.append(await stack.enter_async_context(self._holding(layers, self._files)))
        metadata = written[0]
        self.inodes, self._hot = metadata.inodes, metadata.hot
        if self._existing is not None and self.packed is not None:
            # Last: what it does not give comes from the layers, which may be read when they are held.
            opened.append(await stack.enter_async_context(self._holding([self.packed.attached])))
        attached = [*layers, self.packed.attached] if self.packed else layers
        self.accounts = {
            path: [(attached[extent.device], extent.offset, extent.length) for extent in extents]
            for path, extents in metadata.accounts.items()
        }
        self.planned.set()
        if self._existing is None:
            # Only now: a descriptor that asks is exchanged when its device is held.
            with self._timing.phase("tail"):
                tail = await tail_file(metadata, self._store, attached)
            with self._timing.phase("mount"):
                end, mount = await trio.to_thread.run_sync(self._mount, metadata, attached, tail, target)
        else:
            end, mount = await trio.to_thread.run_sync(self._find, target), None
            await self._mend(attached)
        shown = _Shown(target, mount, end, attached)
        stack.push_async_callback(shown.leave)
        if self._record and shown.root is not None:
            await trio.to_thread.run_sync(stop_read_ahead, shown.root, self.superblocks)
            self.recorder = Recorder(trio.current_time())
            stack.enter_context(devices.recording(attached, self.recorder))
        shown.read_ahead = await trio.to_thread.run_sync(self._begin_start, shown.root, attached)
        for tell in opened:
            tell()
        return shown

    def _holding(
        self, attached: Sequence[AttachedDevice], files: FileTable | None = None
    ) -> AbstractAsyncContextManager[Callable[[], None]]:
        return self._guards.devices.holding(self._store, attached, files, self._subject.name)

    async def _begin_pack(self, stack: AsyncExitStack) -> list[Callable[[], None]]:
        """Have the pack fetched while everything else is made; without it when it cannot be mounted."""
        if (packed := self.packed) is None:
            return []
        try:
            opened = await stack.enter_async_context(self._holding([packed.attached]))
        except (CacheError, MountError, UnsupportedFormat) as error:
            self._give_up_pack(error)
            return []
        packed.prefetch(self._store)
        return [opened]

    async def _metadata(self) -> MetadataImage:
        if self.packed is not None:
            try:
                return await self._metadata_with(self._packs)
            except (IntegrityError, UnsupportedFormat) as error:
                if self._existing is not None:
                    raise
                self._give_up_pack(error)
        return await self._metadata_with([])

    @property
    def _packs(self) -> list[Pack]:
        return [Pack(self.packed.descriptor, self.packed.data)] if self.packed else []

    def _made_of(self, packs: Sequence[Pack]) -> tuple[Digest, int, Path, Sequence[Pack]]:
        return self._subject.identity, len(self._subject.devices), self._cache_dir, packs

    async def _metadata_with(self, packs: Sequence[Pack]) -> MetadataImage:
        """The image from last time, or a new one by the process that writes them, as far as it can."""
        subject, what = self._subject, self._made_of(packs)
        kept = await trio.to_thread.run_sync(kept_image, *what)
        if kept is not None:
            return kept
        if subject.artifact is None:
            return await trio.to_thread.run_sync(metadata_image, subject.index, *what)
        try:
            return await self._guards.scribe.write(Commission(subject.artifact, *what))
        except IntegrityError:
            # The image says whose index it is, and takes note of it; if it is a pack's, there is a tree.
            await trio.to_thread.run_sync(subject.index)
            raise

    def _give_up_pack(self, error: VeneerError) -> None:
        self.packed = None
        log.warning("image=%s the pack is not used cause=%r", self._subject.name, error.message)

    def begin_next_start(self, tree: "HeldTree") -> Callable[[], Awaitable[None]] | None:
        """Have the kernel read nothing ahead for another start from a tree that is held. Blocks.

        Returns what is to be run after that, if it matters.
        """
        packed, setting = self.packed, tree.read_ahead
        if packed is None or setting is None or all(device.complete for device in tree.attached):
            return None
        try:
            set_read_ahead(setting, ASKED_KB)
        except MountError as error:
            log.info("image=%s the kernel reads ahead cause=%r", self._subject.name, error.message)
            return None
        what = packed, self._guards.devices, tree.attached, setting
        return partial(follow_next_start, *what, self.interest)

    def _begin_start(self, root: Path | None, attached: Sequence[AttachedDevice]) -> Path | None:
        """With a pack, have the kernel read nothing ahead for now. Returns where to undo that, if it worked.

        Where every device is complete, what it reads ahead costs nobody anything.
        """
        if self.packed is None or root is None or not self.superblocks:
            return None
        if self._existing is None and all(device.complete for device in attached):
            return None
        try:
            setting = read_ahead_setting(root, self.superblocks)
            if self._existing is None:
                set_read_ahead(setting, ASKED_KB)
        except (MountError, OSError) as error:
            log.info("image=%s the kernel reads ahead cause=%r", self._subject.name, str(error))
            return None
        return setting

    def _read_in(self, root: Path | None) -> None:
        """Have the kernel read what the pack has, in a mount that is new. Blocks."""
        if root is not None and self._existing is None:
            read_in(root, self._hot)

    def _mount(
        self,
        metadata: MetadataImage,
        attached: Sequence[AttachedDevice],
        tail: Path | None,
        target: Path | None,
    ) -> tuple[_End, int | None]:
        with _mounting:
            before = listed_superblocks()
            end, mount = mount_kept(
                metadata,
                partial(metadata_image, self._subject.index, *self._made_of(self._packs)),
                lambda image: mount_guarded(image, attached, tail, target, self._guards.superblocks),
            )
            self.superblocks = tuple(sorted(listed_superblocks() - before))
        return end.wait, mount

    def _find(self, target: Path | None) -> _End:
        if target is not None and any(entry.ours for entry in kernel.mounts_at(target)):
            return self._guards.superblocks.watch(target).wait
        return partial(vanished, self.superblocks)

    async def _mend(self, attached: Sequence[AttachedDevice]) -> None:
        """Forget what the kernel may have cached of holes while nobody kept it from reading them."""
        if self._guards.unguarded and not all(device.complete for device in attached):
            self.tainted = True
            log.critical(
                "image=%s had no guard for a while: who read from it may have seen zeros; giving the mount up",
                self._subject.name,
            )
            await trio.to_thread.run_sync(forget_zeros)


def forget_zeros() -> None:
    """Have the kernel forget what it may have read of holes while nobody kept it from that. Blocks."""
    _DROP_CACHES.write_text("1")


@dataclass(frozen=True, slots=True)
class HeldTree:
    """A tree that is mounted, and whose devices are held.

    Args:
        mount: descriptor of a mount of it that is in no directory; None for one that was found.
        end: returns when its file system is gone.
        attached: the devices it reads.
        read_ahead: the setting of the kernel's read-ahead, where it matters to a start.
    """

    mount: int | None
    end: _End
    attached: Sequence[AttachedDevice]
    read_ahead: Path | None


@dataclass(slots=True)
class _Shown:
    """A mount that is there.

    Args:
        target: where; None if it is, or was found, in no directory.
        mount: its descriptor, if it is in none.
        end: returns when it is gone.
        attached: the devices it reads.
        read_ahead: the setting of the kernel's read-ahead, where it is to be put back after the start.
        handed_over: whoever asked for it unmounts it.
    """

    target: Path | None
    mount: int | None
    end: _End
    attached: Sequence[AttachedDevice]
    read_ahead: Path | None = None
    handed_over: bool = False

    @property
    def root(self) -> Path | None:
        """A path of its root."""
        return self.target if self.mount is None else Path(f"/proc/self/fd/{self.mount}")

    async def leave(self) -> None:
        """Wait until it is gone, having unmounted it if nobody else will."""
        with trio.CancelScope(shield=True):
            if self.mount is not None:
                # The last mount of it, maybe: the kernel puts its inodes away.
                await trio.to_thread.run_sync(os.close, self.mount)
            elif not self.handed_over and (target := self.target) is not None:
                await trio.to_thread.run_sync(lambda: kernel.unmount_ours(target, lazy=True))
            await self.end()
