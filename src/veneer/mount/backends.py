"""The backends, and which of them works here.

- ``fuse``: a FUSE file system with all names, attributes and contents. For everybody and every kernel.
- ``erofs-fuse``: the kernel knows names and attributes from a metadata image; only contents that are not in its
  page cache are asked of a FUSE file system with the devices, or read from the device cache's own files where
  they are complete when it is mounted. For root, from Linux 6.12 on.
- ``erofs-fanotify``: the kernel reads the device cache's own files, and asks only for what is not there yet.
  For root, from Linux 6.14 on. All such mounts are served by one daemon; the others here have a process each.

What works is found out by trying it, never from a version number.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import trio

from veneer.erofs.ondisk import BLOCK
from veneer.errors import CacheError, MountError, UnsupportedFormat
from veneer.events import Notice, Reporter, silent
from veneer.index.model import Device, ImageIndex
from veneer.mount import kernel
from veneer.mount.base import Choice, Mounter
from veneer.mount.devices import DeviceOperations
from veneer.mount.erofs import check_size, mount_erofs, mount_watched, takes_direct_io, try_erofs
from veneer.mount.erofs_fanotify import try_fanotify
from veneer.mount.filetable import FileTable
from veneer.mount.fuse import DeviceReader, FuseStats, TreeOperations
from veneer.mount.fusectl import allow_requests
from veneer.mount.metadata import MetadataImage, metadata_image, mount_kept
from veneer.mount.server import MAX_TASKS, serve_fuse
from veneer.mount.superblocks import Superblocks
from veneer.oci.digest import Digest
from veneer.source.tasks import open_nursery
from veneer.store.pin import Freeze

__all__ = [
    "ErofsFuseMounter",
    "FuseMounter",
    "Subject",
    "choose",
    "choose_for_daemon",
    "open_mounter",
]

log = logging.getLogger(__name__)

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Subject(Generic[D]):
    """An image to mount.

    Args:
        name: for messages and the log.
        devices: what its tree is over.
        index: gives the tree. May be called in any thread and more than once; takes long the first time.
        identity: digest of what the tree was made of.
        store: where the bytes are.
        attached: what ``store`` calls the devices, in the same order.
        artifact: the index as one blob, for a process that writes metadata images; None where it is none.
        freeze: keeps a complete device as it is, for the kernel to read its file; None if it is not complete.
    """

    name: str
    devices: Sequence[Device]
    index: Callable[[], ImageIndex]
    identity: Digest
    store: DeviceReader[D]
    attached: Sequence[D]
    artifact: bytes | None = None
    freeze: Callable[[D], Freeze | None] = lambda _device: None


class FuseMounter(Generic[D]):
    """The whole tree by FUSE."""

    def __init__(self, subject: Subject[D], index: ImageIndex, choice: Choice) -> None:
        self.choice = choice
        self.inodes = sum(map(bool, index.nlink))
        self.direct: Collection[int] = ()
        self.operations = TreeOperations(index, subject.store, subject.attached, image=subject.name)
        self.stats: FuseStats = self.operations.stats

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`."""
        async with serve_fuse(self.operations, target, gone):
            yield


class ErofsFuseMounter(Generic[D]):
    """A metadata image over device files: the cache's own where a device is complete, and FUSE's otherwise.

    Devices that FUSE serves are visible, in a directory of their own, for as long as it takes to mount EROFS
    over them. It has them open then, which keeps their file system alive as long as its own and no longer. Of
    what it reads from the cache the kernel asks nobody, whatever becomes of this process; so such devices are
    frozen until the file system is gone.

    Args:
        subject: the image.
        metadata: its metadata image.
        write: gives the same metadata image once more. Blocks.
        devices: a private directory, which is made if it is missing.
        choice: how it came to this backend.
    """

    def __init__(
        self,
        subject: Subject[D],
        metadata: MetadataImage,
        write: Callable[[], MetadataImage],
        devices: Path,
        choice: Choice,
    ) -> None:
        self.choice = choice
        self.inodes = metadata.inodes
        self.operations = DeviceOperations(
            subject.devices,
            FileTable(subject.index),
            subject.store,
            subject.attached,
            slots=metadata.devices,
            copies=metadata.copies,
            image=subject.name,
        )
        self.stats: FuseStats = self.operations.stats
        self._subject = subject
        self._metadata = metadata
        self._write = write
        self._devices = devices
        self._frozen: dict[int, Freeze] = {}

    @property
    def direct(self) -> Collection[int]:
        """See :class:`~veneer.mount.base.Mounter`."""
        return self._frozen.keys()

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`. Who is still there afterwards reads on what is frozen."""
        end: trio.Event | None = None
        superblocks = await trio.to_thread.run_sync(self._freeze)
        try:
            async with open_nursery() as nursery:
                if superblocks is not None:
                    await nursery.start(superblocks.serve)
                needs_fuse = superblocks is None or len(self._frozen) < len(self._metadata.devices)
                async with self._serving(gone) if needs_fuse else nullcontext():
                    try:
                        end = await trio.to_thread.run_sync(self._mount, target, superblocks)
                    finally:
                        with trio.CancelScope(shield=True):
                            await trio.to_thread.run_sync(lambda: kernel.unmount_ours(self._devices, lazy=True))
                    if end is not None:
                        nursery.start_soon(_follow, end, gone)
                    try:
                        yield
                    finally:
                        if superblocks is not None:
                            superblocks.take_news()
                nursery.cancel_scope.cancel()
        finally:
            # Of a file system that is still used, the files stay and say so.
            for frozen in self._frozen.values():
                if end is None or end.is_set():
                    frozen.release()
                else:
                    frozen.close()
            self._frozen = {}

    @asynccontextmanager
    async def _serving(self, gone: Callable[[], None]) -> AsyncIterator[None]:
        await trio.to_thread.run_sync(lambda: self._devices.mkdir(mode=0o700, exist_ok=True))
        async with serve_fuse(self.operations, self._devices, gone):
            yield

    def _freeze(self) -> Superblocks | None:
        """Freeze what is complete. Returns what notices the end of the file system, if anything is."""
        try:
            for number, attached in enumerate(self._subject.attached):
                slot = self._metadata.devices[number]
                # Of a file EROFS sees whole blocks only.
                if slot.size % BLOCK == 0 and (frozen := self._subject.freeze(attached)) is not None:
                    self._frozen[number] = frozen
                    check_size(slot, frozen.data)
            return Superblocks() if self._frozen else None
        except (CacheError, MountError, OSError) as error:
            log.warning("complete devices are served like all others cause=%r", str(error))
            while self._frozen:
                self._frozen.popitem()[1].release()
            return None

    def _mount(self, target: Path, superblocks: Superblocks | None) -> trio.Event | None:
        """Mount EROFS over the devices. Returns an event for its end, if that is watched."""
        frozen, metadata = self._frozen, self._metadata
        if len(frozen) < len(metadata.devices):
            try:
                allow_requests(self._devices, MAX_TASKS)
            except OSError as error:
                log.warning("few reads at a time: no access to fusectl cause=%r", error.strerror)
        devices = [
            frozen[number].data if number in frozen else self._devices / str(number)
            for number in range(len(metadata.devices))
        ]

        def mount(image: MetadataImage) -> trio.Event | None:
            if superblocks is None:
                mount_erofs(image.path, devices, target)
                return None
            return mount_watched(image.path, devices, target, superblocks, direct_io=self._direct_io())

        return mount_kept(metadata, self._write, mount)

    def _direct_io(self) -> bool:
        """Whether EROFS should read the cache's files past their page cache, having one of its own above."""
        sizes = {number: self._metadata.devices[number].size for number in self._frozen}
        largest = max(sizes, key=sizes.__getitem__)
        try:
            return takes_direct_io(self._frozen[largest].data)
        except OSError as error:
            log.info("the device cache is read through the page cache cause=%r", error.strerror)
            return False


async def _follow(end: trio.Event, gone: Callable[[], None]) -> None:
    await end.wait()
    gone()


def choose(wanted: str, cache_dir: Path) -> Choice:
    """The backend of a process that serves one mount, when ``wanted`` is asked for. Blocks.

    Args:
        wanted: one of :data:`~veneer.settings.BACKENDS`.
        cache_dir: of the image to be mounted.

    Raises MountError when that one does not work here.
    """
    if wanted == "erofs-fanotify":
        raise MountError(f"the backend {wanted} is served by the daemon only", hint="start veneer daemon")
    if wanted == "fuse":
        return Choice("fuse", "asked for")
    if (choice := _without_root(wanted)) is not None:
        return choice
    failure = _failure(try_erofs, cache_dir)
    if failure is None:
        return Choice("erofs-fuse", "asked for" if wanted == "erofs-fuse" else "a trial mount worked")
    if wanted == "erofs-fuse":
        raise failure
    return Choice("fuse", _told("erofs-fuse", failure))


def choose_for_daemon(wanted: str, cache_dir: Path) -> Choice:
    """What the daemon does when ``wanted`` is asked for. Blocks.

    The answer is ``erofs-fanotify``, which it serves itself, or what to ask of a process of its own (that may
    be ``auto``), and why. Raises MountError when what is wanted does not work here.
    """
    if wanted not in ("auto", "erofs-fanotify"):
        return Choice(wanted, "asked for")
    if (choice := _without_root(wanted)) is not None:
        return choice
    failure = _failure(try_fanotify, cache_dir)
    if failure is None:
        return Choice("erofs-fanotify", "a trial mount worked" if wanted == "auto" else "asked for")
    if wanted == "erofs-fanotify":
        raise failure
    return Choice("auto", _told("erofs-fanotify", failure))


def _without_root(wanted: str) -> Choice | None:
    """What is left for those who are not root; None for root."""
    if os.geteuid() == 0:
        return None
    if wanted == "auto":
        return Choice("fuse", "only root can mount EROFS")
    raise MountError(f"the backend {wanted} needs root", hint="use --backend fuse")


def _failure(attempt: Callable[[Path], None], cache_dir: Path) -> MountError | None:
    """How a trial mount failed, if it did."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        attempt(cache_dir)
    except OSError as error:
        return MountError(f"cannot make {cache_dir}: {error.strerror}")
    except MountError as error:
        return error
    return None


def _told(backend: str, failure: MountError) -> str:
    hint = f" ({failure.hint})" if failure.hint else ""
    return f"a trial mount of {backend} failed: {failure.message}{hint}"


async def open_mounter(
    wanted: str, subject: Subject[D], *, cache_dir: Path, devices: Path, report: Reporter = silent
) -> Mounter:
    """A mounter for an image, by the backend that is asked for or, with ``auto``, the best that works.

    Args:
        wanted: one of :data:`~veneer.settings.BACKENDS`.
        subject: the image.
        cache_dir: on a real file system, for metadata images.
        devices: a directory for the time of mounting.
        report: is told why it is not the best backend, when it could have been.

    Raises:
        MountError: the backend does not work here.
        UnsupportedFormat: it cannot show this image.
    """
    choice = await trio.to_thread.run_sync(choose, wanted, cache_dir)
    if choice.backend != "fuse":
        write = partial(metadata_image, subject.index, subject.identity, len(subject.devices), cache_dir)
        try:
            metadata = await trio.to_thread.run_sync(write)
        except (MountError, UnsupportedFormat) as error:
            if wanted != "auto":
                raise
            choice = Choice("fuse", f"erofs-fuse cannot show this image: {error.message}")
        else:
            if metadata.dropped:
                report(Notice(f"{metadata.dropped} extended attributes left out, which EROFS cannot hold"))
            return ErofsFuseMounter(subject, metadata, write, devices, choice)
    if wanted == "auto" and os.geteuid() == 0:
        report(Notice(f"using the slower backend fuse: {choice.reason}"))
    return FuseMounter(subject, await trio.to_thread.run_sync(subject.index), choice)
