"""Mounts with a process each, from an event loop: made and ended, and what their processes leave behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from veneer.daemon import client, mounts
from veneer.daemon.request import MountInfo, MountRequest
from veneer.mount.state import MountRecord
from veneer.settings import Settings


async def mount(image: str, mountpoint: Path, settings: Settings, **more: object) -> MountInfo:
    request = MountRequest.create(image, mountpoint, settings, **more)  # type: ignore[arg-type]
    # The registry of a test may be served by this very event loop.
    return await trio.to_thread.run_sync(client.mount_image, request, abandon_on_cancel=True)


async def umount(path: Path, run_dir: Path, *, lazy: bool = False, **more: float) -> MountRecord:
    record, _ = await trio.to_thread.run_sync(partial(mounts.umount, path, run_dir, lazy=lazy, **more))
    return record


async def clean_stale(run_dir: Path) -> list[MountRecord]:
    return await trio.to_thread.run_sync(mounts.clean_stale, run_dir)


async def ended(pid: int) -> None:
    """Wait until a process is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def log_of(info: MountInfo) -> str:
    return Path(info.log).read_text()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file in use. Closing tells of a mount that has died, which is no news."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)
