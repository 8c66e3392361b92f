"""The backends, and which of them works here.

- ``fuse``: a FUSE file system with all names, attributes and contents. For everybody and every kernel.
- ``erofs-fuse``: the kernel knows names and attributes from a metadata image; only contents that are not in its
  page cache are asked of a FUSE file system with the devices. For root, from Linux 6.12 on.
- ``erofs-fanotify``: the kernel reads the device cache's own files, and asks only for what is not there yet.
  For root, from Linux 6.14 on. All such mounts are served by one daemon; the others here have a process each.

What works is found out by trying it, never from a version number.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import trio

from veneer.errors import MountError, UnsupportedFormat
from veneer.events import Notice, Reporter, silent
from veneer.index.model import Device, ImageIndex
from veneer.mount import kernel
from veneer.mount.base import Choice, Mounter
from veneer.mount.devices import DeviceOperations
from veneer.mount.erofs import mount_erofs, try_erofs
from veneer.mount.erofs_fanotify import try_fanotify
from veneer.mount.filetable import FileTable
from veneer.mount.fuse import DeviceReader, FuseStats, TreeOperations
from veneer.mount.fusectl import allow_requests
from veneer.mount.metadata import MetadataImage, metadata_image
from veneer.mount.server import MAX_TASKS, serve_fuse
from veneer.oci.digest import Digest

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
    """

    name: str
    devices: Sequence[Device]
    index: Callable[[], ImageIndex]
    identity: Digest
    store: DeviceReader[D]
    attached: Sequence[D]
    artifact: bytes | None = None


class FuseMounter(Generic[D]):
    """The whole tree by FUSE."""

    def __init__(self, subject: Subject[D], index: ImageIndex, choice: Choice) -> None:
        self.choice = choice
        self.inodes = sum(map(bool, index.nlink))
        self.operations = TreeOperations(index, subject.store, subject.attached, image=subject.name)
        self.stats: FuseStats = self.operations.stats

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`."""
        async with serve_fuse(self.operations, target, gone):
            yield


class ErofsFuseMounter(Generic[D]):
    """A metadata image over devices that FUSE serves.

    The devices are visible, in a directory of their own, for as long as it takes to mount EROFS over them.
    It has them open then, which keeps their file system alive as long as its own and no longer.

    Args:
        subject: the image.
        metadata: its metadata image.
        devices: a private directory, which is made if it is missing.
        choice: how it came to this backend.
    """

    def __init__(self, subject: Subject[D], metadata: MetadataImage, devices: Path, choice: Choice) -> None:
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
        self._metadata = metadata
        self._devices = devices

    @asynccontextmanager
    async def shown(self, target: Path, gone: Callable[[], None]) -> AsyncIterator[None]:
        """See :class:`~veneer.mount.base.Mounter`."""
        await trio.to_thread.run_sync(lambda: self._devices.mkdir(mode=0o700, exist_ok=True))
        async with serve_fuse(self.operations, self._devices, gone):
            try:
                await trio.to_thread.run_sync(self._mount, target)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(lambda: kernel.unmount_ours(self._devices, lazy=True))
            yield

    def _mount(self, target: Path) -> None:
        try:
            allow_requests(self._devices, MAX_TASKS)
        except OSError as error:
            log.warning("few reads at a time: no access to fusectl cause=%r", error.strerror)
        devices = (self._devices / str(number) for number in range(len(self._metadata.devices)))
        mount_erofs(self._metadata.path, devices, target)


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
        try:
            metadata = await trio.to_thread.run_sync(
                metadata_image, subject.index, subject.identity, len(subject.devices), cache_dir
            )
        except (MountError, UnsupportedFormat) as error:
            if wanted != "auto":
                raise
            choice = Choice("fuse", f"erofs-fuse cannot show this image: {error.message}")
        else:
            if metadata.dropped:
                report(Notice(f"{metadata.dropped} extended attributes left out, which EROFS cannot hold"))
            return ErofsFuseMounter(subject, metadata, devices, choice)
    if wanted == "auto" and os.geteuid() == 0:
        report(Notice(f"using the slower backend fuse: {choice.reason}"))
    return FuseMounter(subject, await trio.to_thread.run_sync(subject.index), choice)
