"""A writable layer over a mounted image: overlayfs through mount(2).

The merged root takes its attributes from the upper directory, so a fresh upper directory is given those of
the image's root first, as the mounted image shows them. Optional features that change what is written to the
upper directory, or that break when it is used again with another lower one, are off explicitly, whatever the
kernel's defaults are:

- ``redirect_dir=off``: renaming a directory of the image answers EXDEV, as it does under containerd, and
  tools copy; a redirect followed on the next mount would trust what a container wrote.
- ``metacopy=off``: a file whose data stayed in the image would be lost with it.
- ``index=off``: an upper directory can be used with a newer version of the image.
- ``xino=off``: with it, inode numbers have their highest bit set. Programs for 32 bits then fail in ``stat``
  (EOVERFLOW), and those that keep them in doubles take all files for one. Without it files of the image
  and files written later differ in ``st_dev``, which is what overlays over several file systems do.
"""

import os
import re
import shutil
import stat
from pathlib import Path

from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.upper import Upper

__all__ = ["mount_overlay", "prepare_upper"]

#: On a mounted file system it is this host's word for that, and no attribute of the image.
_LABEL = "security.selinux"
_FEATURES = b"redirect_dir=off,metacopy=off,index=off,xino=off"


def prepare_upper(upper: Upper, lower: Path) -> None:
    """Make the directories of a layer; a fresh one gets the attributes of the image on ``lower``. Blocks."""
    try:
        upper.directory.mkdir(parents=True, exist_ok=True)
        # A work directory left by a crash holds nothing that anyone can use.
        shutil.rmtree(upper.work, ignore_errors=True)
        upper.work.mkdir()
        if upper.directory.stat().st_dev != upper.work.stat().st_dev:
            raise MountError(
                f"{upper.directory} is a mount point itself",
                hint="give a directory inside of it to --upper",
            )
        if not any(upper.directory.iterdir()):
            _copy_root(lower, upper.directory)
    except OSError as error:
        raise MountError(f"cannot prepare the upper directory {upper.directory}: {error.strerror}") from error


def mount_overlay(lower: Path, upper: Upper, mountpoint: Path) -> None:
    """Mount ``upper`` over ``lower`` on ``mountpoint``. Blocks. Raises MountError."""
    options = b",".join(
        (
            b"lowerdir=" + _escape(lower, b"\\,:"),
            b"upperdir=" + _escape(upper.directory, b"\\,"),
            b"workdir=" + _escape(upper.work, b"\\,"),
            _FEATURES,
            *((b"volatile",) if upper.private else ()),
        )
    )
    kernel.mount(mountpoint, "overlay", options)


def _escape(path: Path, special: bytes) -> bytes:
    return re.sub(b"([" + re.escape(special) + b"])", rb"\\\1", os.fsencode(os.path.abspath(path)))


def _copy_root(lower: Path, directory: Path) -> None:
    root = lower.lstat()
    os.chown(directory, root.st_uid, root.st_gid)
    directory.chmod(stat.S_IMODE(root.st_mode))
    for name in os.listxattr(lower):
        if name != _LABEL:
            os.setxattr(directory, name, os.getxattr(lower, name))
    os.utime(directory, ns=(root.st_mtime_ns, root.st_mtime_ns))
