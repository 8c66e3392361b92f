"""The kernel's read-ahead of one mounted file system.

Each EROFS superblock has a setting of its own, which files take over when they are opened. Newer kernels tell
which one belongs to a mount; with others, it is the one that appeared when the mount was made.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from veneer.errors import MountError

__all__ = ["ASKED_KB", "NORMAL_KB", "read_ahead_setting", "set_read_ahead", "stop_read_ahead"]

#: What a file system starts with.
NORMAL_KB = 128
#: With this, the kernel reads what is asked for and hardly more: the page that was touched, or up to 128 KiB of
#: a read(2) at once. With 0 it would read page by page, each of them a question.
ASKED_KB = mmap.PAGESIZE >> 10

_SETTINGS = Path("/sys/class/bdi")
#: FS_IOC_GETFSSYSFSPATH, and its struct fs_sysfs_path: a length, then that many bytes of a name of up to 128.
_GET_NAME, _ANSWER = 0x80811501, 129


def stop_read_ahead(root: Path, appeared: Sequence[str]) -> None:
    """Have the kernel read only what is asked for of files that are opened from now on. Blocks.

    ``root`` and ``appeared`` are those of :func:`read_ahead_setting`. Raises MountError.
    """
    set_read_ahead(read_ahead_setting(root, appeared), ASKED_KB)


def set_read_ahead(setting: Path, kilobytes: int) -> None:
    """Change a setting for files that are opened from now on. Blocks; raises MountError."""
    try:
        setting.write_text(str(kilobytes))
    except OSError as error:
        raise MountError(f"cannot change the read-ahead: {setting}: {error.strerror}") from error


def read_ahead_setting(root: Path, appeared: Sequence[str]) -> Path:
    """Where the kernel has the setting of a mount. Blocks.

    Args:
        root: where the file system is mounted.
        appeared: names of the superblocks that came with it; more than one when others mounted at that moment.

    Raises:
        MountError: it cannot be told which setting that is.
    """
    name = _name(root) or (appeared[0] if len(appeared) == 1 else None)
    if name is None:
        raise MountError(
            f"cannot tell which of {', '.join(appeared) or 'no'} superblocks is the one on {root}",
            hint="others mounted EROFS at the same moment; try again",
        )
    return _SETTINGS / name / "read_ahead_kb"


def _name(root: Path) -> str | None:
    """What the kernel calls the superblock; None where it does not tell."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        answer = fcntl.ioctl(fd, _GET_NAME, bytes(_ANSWER))
    except OSError:
        return None
    finally:
        os.close(fd)
    return os.fsdecode(answer[1 : 1 + answer[0]]).rpartition("/")[2]
