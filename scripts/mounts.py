"""Mounts that scripts leave behind when they fail."""

import subprocess
from pathlib import Path

__all__ = ["unmount_below"]


def unmount_below(directory: Path) -> None:
    """Detach all mounts below a directory, the latest first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        target = line.split()[1].encode().decode("unicode_escape")
        if Path(target).is_relative_to(directory):
            subprocess.run(["umount", "--lazy", target], check=True)
