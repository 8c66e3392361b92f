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

import contextlib
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import MountError, UsageError
from veneer.mount import kernel

__all__ = ["Upper", "discard", "mount_overlay", "prepare_upper", "private_upper"]

_FEATURES = b"redirect_dir=off,metacopy=off,index=off,xino=off"


@dataclass(frozen=True, slots=True)
class Upper:
    """A writable layer.

    Args:
        directory: holds what was written, in overlayfs's own form.
        work: scratch space of the kernel, on the same file system, used by one mount at a time.
        private: nobody wants the contents after the mount: they need not survive a crash.
    """

    directory: Path
    work: Path
    private: bool = False

    @classmethod
    def at(cls, directory: Path) -> "Upper":
        """The layer that a user keeps in ``directory``; its scratch space is made next to it."""
        directory = Path(os.path.abspath(directory))
        if not directory.name:
            raise UsageError(f"{directory} cannot be an upper directory")
        return cls(directory, directory.with_name(f".{directory.name}.veneer-work"))


def private_upper(parent: Path) -> Upper:
    """A layer under ``parent``, a directory of its own that goes with it."""
    return Upper(parent / "upper", parent / "work", private=True)


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


def discard(upper: Upper) -> None:
    """Remove what only the kernel or a private layer needed; blocks."""
    shutil.rmtree(upper.work, ignore_errors=True)
    if upper.private:
        shutil.rmtree(upper.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            upper.directory.parent.rmdir()


def _escape(path: Path, special: bytes) -> bytes:
    return re.sub(b"([" + re.escape(special) + b"])", rb"\\\1", os.fsencode(os.path.abspath(path)))


def _copy_root(lower: Path, directory: Path) -> None:
    root = lower.lstat()
    os.chown(directory, root.st_uid, root.st_gid)
    directory.chmod(stat.S_IMODE(root.st_mode))
    for name in os.listxattr(lower):
        os.setxattr(directory, name, os.getxattr(lower, name))
    os.utime(directory, ns=(root.st_mtime_ns, root.st_mtime_ns))
