"""Where a mount may go. Every function here blocks."""

import os
from pathlib import Path

from veneer.errors import MountError
from veneer.mount import kernel

__all__ = ["prepare_mountpoint"]


def prepare_mountpoint(mountpoint: Path) -> bool:
    """Check that a mount may go on ``mountpoint``; make it if it is missing, and say whether that was so.

    Args:
        mountpoint: absolute, without symbolic links.

    Raises:
        MountError: something is mounted there, or it is not an empty directory.
    """
    if found := kernel.mounts_at(mountpoint):
        raise MountError(
            f"{mountpoint} is a mount point already ({found[-1].fstype})",
            hint=f"veneer umount {mountpoint}" if found[-1].ours else "choose another directory",
        )
    try:
        mountpoint.mkdir()
    except FileExistsError:
        pass
    except OSError as error:
        raise MountError(f"cannot make {mountpoint}: {error.strerror}") from error
    else:
        return True
    try:
        empty = not os.listdir(mountpoint)
    except OSError as error:
        raise MountError(f"cannot use {mountpoint} as a mount point: {error.strerror}") from error
    if not empty:
        # What lies there would be hidden; nobody means that.
        raise MountError(f"{mountpoint} is not empty", hint="choose an empty or a new directory")
    return False
