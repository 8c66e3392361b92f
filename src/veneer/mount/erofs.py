"""Mounting a metadata image over device files, and trying out whether this machine can.

Never ``mount -t erofs FILE``: mount(8) makes a loop device of the file.

Every function here blocks; the event loop that serves the devices must not call them.
"""

import errno
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import trio

from veneer.erofs.ondisk import BLOCK, DeviceSlot
from veneer.erofs.writer import write_erofs
from veneer.errors import MountError
from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import Codec, Device, ImageIndex, LayerIndex, SpanTable
from veneer.index.tar_entry import TarEntry
from veneer.mount.fsmount import attach, unattached
from veneer.mount.superblocks import Superblocks
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER

__all__ = [
    "check_size",
    "erofs_over",
    "hold_watched",
    "mount_erofs",
    "mount_watched",
    "nameless",
    "one_file",
    "takes_direct_io",
    "try_erofs",
]

_HINTS = {
    errno.ENODEV: "the kernel has no EROFS; load the module erofs",
    errno.ENOTBLK: "it takes Linux 6.12, and a cache directory on ext4, xfs or btrfs",
    errno.EPERM: "it takes root outside of user namespaces (CAP_SYS_ADMIN)",
    errno.ENOSYS: "something forbids fsopen(2), such as the seccomp profile of a container",
}


def mount_erofs(image: Path, devices: Iterable[Path], target: Path) -> None:
    """Mount ``image`` over ``devices``, one for each of its slots, on ``target``. Raises MountError."""
    with erofs_over(image, devices) as mount:
        try:
            attach(mount, target)
        except OSError as error:
            raise MountError(f"cannot mount EROFS on {target}: {error.strerror}") from error


def mount_watched(
    image: Path,
    devices: Iterable[Path],
    target: Path,
    superblocks: Superblocks,
    *,
    direct_io: bool = False,
) -> trio.Event:
    """The same, and an event for the end of the new file system. Raises MountError.

    With ``direct_io``, what is read of the devices is not kept in the page cache a second time: see
    :func:`takes_direct_io`.
    """
    with erofs_over(image, devices, direct_io=direct_io) as mount:
        try:
            # Before anybody can use it, and so before it can end.
            gone = superblocks.watch(mount)
            attach(mount, target)
        except OSError as error:
            raise MountError(f"cannot mount EROFS on {target}: {error.strerror}") from error
    return gone


def hold_watched(image: Path, devices: Iterable[Path], superblocks: Superblocks) -> tuple[trio.Event, int]:
    """The same without a place: the descriptor that is returned keeps the mount. Raises MountError."""
    with erofs_over(image, devices) as mount:
        try:
            return superblocks.watch(mount), os.dup(mount)
        except OSError as error:
            raise MountError(f"cannot mount EROFS: {error.strerror}") from error


def takes_direct_io(device: Path) -> bool:
    """Whether a file can be read past the page cache by blocks of EROFS, smaller than those of some disks.

    Raises OSError when it cannot be read at all.
    """
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page)[BLOCK : 2 * BLOCK] as part:
            return os.preadv(fd, [part], BLOCK) == BLOCK
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)


def check_size(slot: DeviceSlot, device: Path) -> None:
    """Raise MountError if a file ends before the device does, for the rest of which EROFS would show zeros."""
    if device.stat().st_size < slot.size:
        raise MountError(f"the device file {device.readlink()} is shorter than the {slot.size} bytes it has")


@cache
def try_erofs(directory: Path) -> None:
    """Mount an image of one file that is kept in ``directory``, and read the file; leaves no trace.

    Raises MountError when that does not work. What has worked is not tried again by this process.
    """
    content = bytes(range(256)) * (BLOCK // 256)
    image = write_erofs(one_file(content))
    with ExitStack() as stack:
        try:
            paths = [stack.enter_context(nameless(data, directory)) for data in (image.data, content)]
        except OSError as error:
            raise MountError(f"cannot write to {directory}: {error.strerror}") from error
        mount = stack.enter_context(erofs_over(paths[0], paths[1:]))
        try:
            file = os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
            stack.callback(os.close, file)
            found = os.pread(file, 2 * BLOCK, 0)
        except OSError as error:
            raise MountError(f"cannot read from EROFS: {error.strerror}") from error
        if found != content:
            raise MountError("EROFS reads other bytes than were written")


@contextmanager
def erofs_over(image: Path, devices: Iterable[Path], *, direct_io: bool = False) -> Iterator[int]:
    """The descriptor of a mount that is in no directory yet. Raises MountError."""
    parameters: Sequence[tuple[str, Path | None]] = [
        ("source", image),
        *(("device", device) for device in devices),
        ("ro", None),
        *([("directio", None)] if direct_io else []),
    ]
    with ExitStack() as stack:
        try:
            mount = stack.enter_context(unattached("erofs", parameters))
        except OSError as error:
            raise MountError(
                f"cannot mount EROFS: {error.strerror}", hint=_HINTS.get(error.errno or 0)
            ) from error
        yield mount


@contextmanager
def nameless(data: bytes, directory: Path) -> Iterator[Path]:
    """A path to a file that is in no directory."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(data)
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")


def one_file(content: bytes) -> ImageIndex:
    """The tree of a device that is nothing but the content of ``file``."""
    builder = TreeBuilder()
    builder.add(
        TarEntry(
            path=b"file",
            kind="file",
            mode=0o400,
            uid=0,
            gid=0,
            mtime_ns=0,
            size=len(content),
            data=0,
            stored_size=len(content),
            link=b"",
            rdev=(0, 0),
            xattrs={},
            segments=None,
            header=0,
        )
    )
    digest, size = Digest.of(content), len(content)
    spans = SpanTable(array("q", [0, size]), array("q", [0]), array("q", [size]), digest.raw, (Codec("raw"),))
    device = Device(Descriptor(OCI_LAYER, digest, size), digest, spans, digest)
    return merge([LayerIndex(builder.finish(), device)])
