"""The place of one mount: its record, its directory, and where its tree, its overlay and its bundle go.

A place is claimed before anything is mounted and released after everything is gone. All functions block.
"""

import os
import secrets
import threading
from contextlib import nullcontext
from pathlib import Path

from veneer.daemon.mountpoint import prepare_mountpoint
from veneer.daemon.request import MountRequest
from veneer.errors import MountError
from veneer.mount.state import (
    MountRecord,
    claim,
    claiming,
    detach,
    directory_of,
    mount_id,
    release,
    retire,
    this_process,
)
from veneer.mount.upper import Upper, private_upper

__all__ = ["Place"]


class Place:
    """What :func:`Place.claimed` made, or a record of an earlier process names.

    Any thread may release or retire it.

    Args:
        run_dir: where mounts are recorded.
        record: says what is where.
    """

    def __init__(self, run_dir: Path, record: MountRecord) -> None:
        self.run_dir = run_dir
        self.record = record
        self._released = False
        #: A mount may end by itself, and its place be released, while somebody detaches it.
        self._ending = threading.Lock()

    @classmethod
    def claimed(cls, request: MountRequest, *, daemon: bool = False) -> "Place":
        """Claim a place for a mount. Raises MountError when somebody else has it."""
        run_dir = Path(os.path.realpath(request.settings.run_dir))
        container = request.container
        name = secrets.token_hex(8) if container else mount_id(request.mountpoint)
        directory = directory_of(run_dir, name)
        process = container.owner if container and daemon else this_process()
        upper: Upper | None = None
        if request.upper:
            upper = Upper.at(request.upper)
        elif request.writable:
            # The last mount there may have been detached and still write to its own.
            upper = private_upper(request.settings.cache_dir / "uppers" / f"{name}-{secrets.token_hex(4)}")
        # Only this container has a place of that name.
        with nullcontext() if container else claiming(run_dir):
            made = not container and prepare_mountpoint(request.mountpoint)
            record = MountRecord(
                id=name,
                kind="run" if container else "mount",
                image=request.image,
                mountpoint=directory / "root" if container else request.mountpoint,
                process=process,
                lower=directory / "lower" if upper else None,
                devices=None if daemon else directory / "devices",
                upper=upper,
                made_mountpoint=made,
                container=(os.fspath(container.runtime), name) if container else None,
                daemon=daemon,
            )
            try:
                claim(run_dir, record)
            except MountError:
                if made:
                    request.mountpoint.rmdir()
                raise
        for path in (record.lower, record.mountpoint if container else None):
            if path is not None:
                path.mkdir()
        return cls(run_dir, record)

    @property
    def directory(self) -> Path:
        """For whatever the mount needs for itself."""
        return directory_of(self.run_dir, self.record.id)

    @property
    def tree(self) -> Path:
        """Where the image's own tree goes: below the overlay when there is one."""
        return self.record.lower or self.record.mountpoint

    @property
    def devices(self) -> Path:
        """Where devices are shown while they are being mounted."""
        return self.directory / "devices"

    @property
    def is_over(self) -> bool:
        """Whether this is for a container, and whoever ran that has ended."""
        return self.record.container is not None and not self.record.process.alive

    def retire(self, *, seen_elsewhere: bool = False) -> None:
        """Let another mount have the place; nothing when it is free already. Raises MountError.

        ``seen_elsewhere`` is that of :func:`~veneer.mount.state.retire`.
        """
        with self._ending:
            if self._released or self.record.kind == "detached":
                return
            try:
                self.record = retire(self.run_dir, self.record, seen_elsewhere=seen_elsewhere)
            except OSError as error:
                raise MountError(
                    f"cannot free the place of {self.record.mountpoint}: {error.strerror}"
                ) from error

    def release(self) -> None:
        """Undo everything."""
        with self._ending:
            detach(self.record)
            release(self.run_dir, self.record)
            self._released = True
