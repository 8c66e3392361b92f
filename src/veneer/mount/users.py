"""Who keeps a mount busy, or its file system in use after that: for the messages that an unmount needs most."""

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from veneer.mount.kernel import MountEntry, mount_table, our_mounts_of

__all__ = ["Holder", "holders_of", "users_of"]

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


@dataclass(frozen=True, slots=True)
class Holder:
    """A mount that keeps a file system.

    Args:
        text: names it, and for another mount namespace one of the processes there.
        elsewhere: whether it is in another mount namespace.
    """

    text: str
    elsewhere: bool


def holders_of(devices: Collection[str]) -> list[Holder]:
    """What keeps our file systems with these numbers mounted, in this mount namespace and in others. Blocks.

    A mount namespace without processes, or with those of other users only, may stay unseen; so does who has
    nothing but open files.
    """
    found = [Holder(f"the mount {entry.mountpoint}", False) for entry in _among(mount_table(), devices)]
    # Of a namespace, a process with another root may see other mounts.
    seen = {_view(Path("/proc/self"))}
    for process in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        if len(found) >= MAX_NAMED:
            break
        # It may have ended, or not be ours to look at.
        with contextlib.suppress(OSError):
            view = _view(Path(f"/proc/{process}"))
            if view in seen:
                continue
            seen.add(view)
            name = _name(Path(f"/proc/{process}"))
            there = _among(our_mounts_of(process), devices)[-1:]  # what is on top
            found += [Holder(f"{name} ({process}) on {entry.mountpoint}", True) for entry in there]
    return found


def _among(entries: Collection[MountEntry], devices: Collection[str]) -> list[MountEntry]:
    return [entry for entry in entries if entry.ours and entry.device in devices]


def _view(process: Path) -> tuple[str, str]:
    """What a process sees of mounts: its mount namespace, and its root in that."""
    return os.readlink(process / "ns/mnt"), os.readlink(process / "root")


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
