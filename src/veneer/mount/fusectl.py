"""How many reads the kernel has under way at a time on one FUSE mount.

EROFS reads its devices asynchronously, and of asynchronous requests the kernel sends twelve at a time: of 150
readers of cold files, 138 would wait for the first twelve to be answered. The limit can be raised in the file
system fusectl, which need not be mounted anywhere for that.
"""

import os
from pathlib import Path

from veneer.mount.fsmount import unattached

__all__ = ["allow_requests"]


def allow_requests(target: Path, count: int) -> None:
    """Let the FUSE file system on ``target`` have so many asynchronous requests at a time. Blocks.

    Raises OSError where fusectl is missing or closed to us; the file system then works on, with less at a time.
    """
    connection = os.minor(os.lstat(target).st_dev)
    with unattached("fusectl") as control:
        for name in ("max_background", "congestion_threshold"):
            file = os.open(f"{connection}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
            try:
                os.write(file, b"%d" % count)
            finally:
                os.close(file)
