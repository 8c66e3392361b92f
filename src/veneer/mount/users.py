"""Who keeps a mount busy: for the one message that an unmount needs most."""

import contextlib
import os
from pathlib import Path

from veneer.mount.kernel import mount_table

__all__ = ["users_of"]

#: A message names so many users at most.
MAX_NAMED = 5


def users_of(mountpoint: Path) -> list[str]:
    """Processes and mounts that use ``mountpoint``, as ``bash (1234)``; blocks, but never touches the mount.

    What runs in another mount namespace (a container) or belongs to another user may stay unseen.
    """
    found = [f"the mount {e.mountpoint}" for e in mount_table() if mountpoint in e.mountpoint.parents]
    prefix = os.fsencode(mountpoint)
    for entry in Path("/proc").iterdir():
        if len(found) >= MAX_NAMED:
            break
        if entry.name.isdigit() and _uses(entry, prefix):
            found.append(f"{_name(entry)} ({entry.name})")
    return found


def _uses(process: Path, prefix: bytes) -> bool:
    links = [process / "cwd", process / "root", process / "exe"]
    # A process that ended or is not ours to look at may still tell by its other links.
    with contextlib.suppress(OSError):
        links += (process / "fd").iterdir()
    for link in links:
        try:
            target = os.readlink(os.fsencode(link))
        except OSError:
            continue
        if target == prefix or target.startswith(prefix + b"/"):
            return True
    return False


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "a process"
