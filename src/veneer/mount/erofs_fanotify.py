"""The backend erofs-fanotify: EROFS over the files of the device cache, which fill as they are read.

What fills them is :mod:`veneer.mount.precontent`, which must hold every device before it is mounted here.

A mount has the kernel's settings as they are. Reading a filled device is then as fast as its file system, cold
or warm. ``-o directio`` would forbid the page cache of the device file, and with it that bytes which have just
been filled in are read from memory: they would be written out first, at every miss. The usual read-ahead of
128 KiB makes one event for that much of a file that is read in order.

Everything here blocks, and must not be called in the event loop that fills the devices.
"""

import errno
import os
import select
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import trio

from veneer.erofs.ondisk import BLOCK
from veneer.erofs.writer import write_erofs
from veneer.errors import MountError
from veneer.mount import fanotify
from veneer.mount.erofs import check_size, erofs_over, hold_watched, mount_watched, nameless, one_file
from veneer.mount.guarded import check_guardable
from veneer.mount.metadata import MetadataImage
from veneer.mount.superblocks import Superblocks
from veneer.mount.tail import tail_file
from veneer.store.spanstore import AttachedDevice

__all__ = ["mount_guarded", "tail_file", "try_fanotify"]

#: For the trial, which takes milliseconds. A kernel that does not ask ends it at once, so that only what hangs
#: takes this long; a machine that is busy must not be taken for one that cannot.
_TRIAL_S = 30.0

_GROUP_HINTS = {
    errno.EINVAL: "it takes Linux 6.14",
    errno.EPERM: "it takes root outside of user namespaces (CAP_SYS_ADMIN)",
    errno.ENOSYS: "the kernel is without fanotify's permission events, or something forbids fanotify_init(2)",
    errno.EMFILE: "raise /proc/sys/fs/fanotify/max_user_groups",
}
_MARK_HINTS = {
    errno.EINVAL: "it takes Linux 6.14",
    errno.EOPNOTSUPP: "it takes a cache directory on ext4, xfs or btrfs",
    errno.ENOSPC: "raise /proc/sys/fs/fanotify/max_user_marks",
}


def mount_guarded(
    metadata: MetadataImage,
    attached: Sequence[AttachedDevice],
    tail: Path | None,
    target: Path | None,
    superblocks: Superblocks,
) -> tuple[trio.Event, int | None]:
    """Mount an image over its devices, all of which are held.

    Args:
        metadata: the image.
        attached: its devices, in order.
        tail: of :func:`~veneer.mount.tail.tail_file`.
        target: an existing directory; None for a mount that is in none.
        superblocks: watches the new file system.

    Returns:
        An event for the end of the file system, and a descriptor that keeps it if there is no ``target``.

    Raises:
        UnsupportedFormat: a device must not be on the disk.
        MountError: it cannot be mounted.
    """
    if len(metadata.devices) != len(attached) + (tail is not None):
        raise ValueError(f"{len(metadata.devices)} slots for {len(attached)} devices and the tail {tail}")
    devices = [Path(f"/proc/self/fd/{check_guardable(one)}") for one in attached]
    if tail is not None:
        devices.append(tail)
    for slot, device in zip(metadata.devices, devices, strict=True):
        check_size(slot, device)
    if target is None:
        return hold_watched(metadata.path, devices, superblocks)
    return mount_watched(metadata.path, devices, target, superblocks), None


def try_fanotify(cache_dir: Path, group: int | None = None) -> None:
    """Mount an image over a file full of holes that is kept in ``cache_dir``, and fill it as it is read.

    Leaves no trace. What has worked is not tried again by this process.

    Args:
        cache_dir: an existing directory.
        group: to be tried, in which nothing is marked yet; a temporary one by default.

    Raises MountError when it does not work.
    """
    if group is None:
        _try_new_group(cache_dir)
    else:
        _try(cache_dir, group)


@cache
def _try_new_group(cache_dir: Path) -> None:
    try:
        group = fanotify.open_group()
    except OSError as error:
        raise MountError(
            f"there are no pre-content events: {error.strerror}", hint=_GROUP_HINTS.get(error.errno or 0)
        ) from error
    try:
        _try(cache_dir, group)
    finally:
        os.close(group)


def _try(cache_dir: Path, group: int) -> None:
    content = bytes(range(256)) * (BLOCK // 256)
    with ExitStack() as stack:
        try:
            image = stack.enter_context(nameless(write_erofs(one_file(content)).data, cache_dir))
            device = stack.enter_context(tempfile.TemporaryFile(dir=cache_dir, buffering=0))
            device.truncate(len(content))
        except OSError as error:
            raise MountError(f"cannot write to {cache_dir}: {error.strerror}") from error
        try:
            fanotify.mark(group, device.fileno())
            stack.callback(fanotify.unmark, group, device.fileno())
        except OSError as error:
            raise MountError(
                f"cannot watch files in {cache_dir}: {error.strerror}", hint=_MARK_HINTS.get(error.errno or 0)
            ) from error
        mount = stack.enter_context(erofs_over(image, [Path(f"/proc/self/fd/{device.fileno()}")]))
        try:
            found = _read_while_filling(mount, group, content)
        except OSError as error:
            raise MountError(
                f"a trial read of a file in {cache_dir} cannot be answered: {error.strerror}"
            ) from error
        if found != content:
            raise MountError("the kernel does not ask before it reads a file that has been marked")


def _read_while_filling(mount: int, group: int, content: bytes) -> bytes:
    """What a reader of the trial's file sees while its events are answered here."""
    found: list[bytes | OSError] = []
    done, tell = os.pipe()

    def read() -> None:
        try:
            file = os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
            try:
                found.append(os.pread(file, 2 * BLOCK, 0))
            finally:
                os.close(file)
        except OSError as error:
            found.append(error)
        finally:
            os.close(tell)

    reader = threading.Thread(target=read, name="trial of fanotify", daemon=True)
    reader.start()
    try:
        while True:
            ready, _, _ = select.select([group, done], [], [], _TRIAL_S)
            if not ready:
                raise MountError("a trial read of a file that is filled on demand did not end")
            if done in ready:
                break
            for event in fanotify.read_events(group):
                if event.fd < 0:
                    raise MountError(f"an event has no descriptor: {os.strerror(-event.fd)}")
                try:
                    os.pwrite(event.fd, content, 0)
                finally:
                    fanotify.answer(group, event.fd)
                    os.close(event.fd)
    finally:
        os.close(done)
    reader.join()
    if isinstance(found[0], OSError):
        raise MountError(f"cannot read from EROFS: {found[0].strerror}") from found[0]
    return found[0]
