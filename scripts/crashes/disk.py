"""A small disk for a cache: ext4 in a file, with ballast that fills it up on demand."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SmallDisk", "small_disk"]

#: What is left when the disk is called full.
_LEFT = 256 << 10


class SmallDisk:
    """The mounted disk; ``directory`` is its root."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        """Take all but a few blocks of what is free."""
        free = os.statvfs(self.directory)
        with open(self._ballast, "ab") as file:
            wanted = free.f_bavail * free.f_frsize - _LEFT
            if wanted > 0:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, wanted)

    def relieve(self) -> None:
        """Give it back."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[SmallDisk]:
    """Make the disk, mount it on ``directory``/disk, and remove it at the end."""
    image, point = directory / "disk.img", directory / "disk"
    point.mkdir(parents=True, exist_ok=True)
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield SmallDisk(point)
    finally:
        subprocess.run(["umount", point], check=True)
        image.unlink()
        point.rmdir()
