"""Mounts of scripts: out of everybody's way, and gone at the end."""

import ctypes
import os
import subprocess
from pathlib import Path

__all__ = ["keep_mounts_private", "unmount_below"]

_CLONE_NEWNS = 0x20000


def keep_mounts_private() -> None:
    """Go on in a mount namespace of our own, as processes started from here on do.

    Whoever starts a container elsewhere would otherwise hold copies of our mounts, which then cannot end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def unmount_below(directory: Path) -> None:
    """Detach all mounts below a directory, the latest first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        target = line.split()[1].encode().decode("unicode_escape")
        if Path(target).is_relative_to(directory):
            subprocess.run(["umount", "--lazy", target], check=True)
