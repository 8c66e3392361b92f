"""The kernel's mount interface: mount(2), umount2(2), and the mount table of this process.

The mount table is the only thing asked about a mount point: ``stat`` on one would wait for the process that
serves it, which may be this one.

Every function here blocks; an event loop calls them in a thread.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import MountError

if TYPE_CHECKING:
    import ctypes

__all__ = [
    "EROFS_SUFFIX",
    "FUSE_TYPE",
    "SOURCE",
    "MountEntry",
    "mount",
    "mount_table",
    "mounts_at",
    "our_mountpoints",
    "our_mounts_of",
    "unmount_ours",
]

#: File system type of our FUSE mounts in the mount table (``-o subtype=veneer``).
FUSE_TYPE = "fuse.veneer"
#: Source of our mounts in the mount table, by which clean-up knows an overlay for ours.
SOURCE = "veneer"
#: The source of an EROFS mount is the path of its metadata image; those of ours end in this.
EROFS_SUFFIX = ".veneer-erofs"
#: Each row of ours has it, in its type or source.
_NAME = b"veneer"

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_TABLE = Path("/proc/self/mountinfo")
#: mount(2) takes one page of options, with the NUL at its end.
MAX_OPTIONS = 4095
#: fusermount3 has nothing to wait for: one system call, then the mount table.
TIMEOUT_S = 20.0


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library, and return the error number, or 0."""
    import ctypes  # here: whoever only looks at the mount table does without

    return ctypes.get_errno() if getattr(_libc(), name)(*arguments) != 0 else 0


@cache
def _libc() -> "ctypes.CDLL":
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return libc


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One row of a mount table.

    ``device`` is the number of its file system, which all mounts of that have in common: ``major:minor``.
    """

    mountpoint: Path
    fstype: str
    source: str
    device: str

    @property
    def ours(self) -> bool:
        """Whether this program made the mount."""
        return _is_ours(self.fstype, self.source)


def mount_table() -> list[MountEntry]:
    """All mounts that this process sees, in the order they were made."""
    return [_entry(*row) for row in _rows(_TABLE)]


def our_mounts_of(pid: int) -> list[MountEntry]:
    """What this program has mounted, as another process sees it. Raises OSError, also when it has ended."""
    entries = (_entry(*row) for row in _rows(Path(f"/proc/{pid}/mountinfo"), _NAME))
    return [entry for entry in entries if entry.ours]


def mounts_at(mountpoint: Path) -> list[MountEntry]:
    """What is mounted exactly there, the topmost mount last."""
    wanted = os.fsencode(mountpoint)
    return [_entry(*row) for row in _rows(_TABLE) if _unescape(row[0]) == wanted]


def our_mountpoints() -> dict[bytes, str]:
    """Where this program has mounted something, and its device. Cheap enough to be asked at every change."""
    return {
        _unescape(where): device.decode()
        for where, fstype, source, device in _rows(_TABLE, _NAME)
        if _is_ours(os.fsdecode(fstype), os.fsdecode(source))
    }


def _rows(table: Path, having: bytes = b"") -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Mount point as the kernel escapes it, type, source and device of each row with this text."""
    for line in table.read_bytes().splitlines():
        if having not in line:
            continue
        before, _, after = line.partition(b" - ")
        fstype, source = after.split(b" ", 2)[:2]
        fields = before.split(b" ", 5)
        yield fields[4], fstype, source, fields[2]


def _entry(where: bytes, fstype: bytes, source: bytes, device: bytes) -> MountEntry:
    mountpoint = Path(os.fsdecode(_unescape(where)))
    return MountEntry(mountpoint, os.fsdecode(fstype), os.fsdecode(source), device.decode())


def _is_ours(fstype: str, source: str) -> bool:
    if fstype == "erofs":
        return source.endswith(EROFS_SUFFIX)
    return source == SOURCE and fstype in (FUSE_TYPE, "overlay")


def mount(target: Path, fstype: str, options: bytes, flags: int = 0) -> None:
    """Mount something whose source is called :data:`SOURCE`. Raises MountError."""
    if len(options) > MAX_OPTIONS:
        raise MountError(
            f"cannot mount {fstype} on {target}: {len(options)} bytes of options are too many",
            hint="use directories with shorter names",
        )
    if number := _call("mount", SOURCE.encode(), os.fsencode(target), fstype.encode(), flags, options):
        hint = "the kernel log (dmesg) often names the option" if number == errno.EINVAL else None
        raise MountError(f"cannot mount {fstype} on {target}: {os.strerror(number)}", hint=hint)


def unmount_ours(target: Path, *, lazy: bool = False) -> None:
    """Unmount everything on ``target`` that this program mounted; nothing when somebody else was faster.

    Raises OSError (EBUSY when it is in use) and MountError.
    """
    while found := [entry for entry in mounts_at(target) if entry.ours]:
        try:
            if found[-1].fstype == FUSE_TYPE and os.geteuid() != 0:
                _fusermount(target, lazy=lazy)
            else:
                _umount2(target, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
        except OSError as error:
            # EINVAL: not a mount point. The mount table says whether it has just ceased to be one.
            if error.errno != errno.EINVAL or [entry for entry in mounts_at(target) if entry.ours] == found:
                raise
        else:
            if len(found) == 1:
                return


def _umount2(target: Path, flags: int) -> None:
    if number := _call("umount2", os.fsencode(target), flags):
        raise OSError(number, os.strerror(number), str(target))


def _fusermount(target: Path, *, lazy: bool) -> None:
    import subprocess

    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise MountError("fusermount3 is not installed", hint="install the package fuse3") from error
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{target} was not unmounted within {TIMEOUT_S:g} s", hint="try again") from error
    if done.returncode != 0:
        text = done.stderr.strip()
        number = errno.EBUSY if "busy" in text.lower() else errno.EINVAL
        raise OSError(number, text or os.strerror(number), str(target))


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)
