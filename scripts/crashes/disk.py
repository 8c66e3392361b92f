"""A small disk for a cache: ext4 in a file, with ballast that fills it up on demand."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        """Take all but a few blocks of what is free, while others write."""
        with open(self._ballast, "ab") as file:
            while (wanted := self._free() - _LEFT) > 0:
                with suppress(OSError):  # somebody was faster
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, wanted)

    def _free(self) -> int:
        disk = os.statvfs(self.directory)
        return disk.f_bavail * disk.f_frsize

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
