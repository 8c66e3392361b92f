"""All mounts of one run directory: listing, asking and ending them, and cleaning up after dead ones."""

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from veneer.container.runtime import delete_container
from veneer.daemon.control import ask
from veneer.daemon.report import MountReport
from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.state import MountRecord, detach, directory_of, mount_records, release, sweep

__all__ = ["MountStatus", "clean_stale", "list_mounts", "umount"]

#: How long an unmount waits for the mount's process: it only has system calls to make.
UMOUNT_TIMEOUT_S = 30.0
#: A process that serves answers at once, unless the machine is badly overloaded.
STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class MountStatus:
    """One live mount: its record, and what its process says.

    ``report`` is None when the process does not answer in time, and for the root of a container.
    """

    record: MountRecord
    report: MountReport | None

    def to_json(self) -> dict[str, object]:
        """The mount for ``veneer status --json``."""
        record = self.record
        return {
            "id": record.id,
            "kind": record.kind,
            "image": record.image,
            "mountpoint": os.fspath(record.mountpoint),
            "pid": record.process.pid,
            "since": record.since,
            "report": self.report and self.report.to_json(),
        }


async def list_mounts(run_dir: Path) -> list[MountStatus]:
    """Every live mount with its counters, oldest first. Cleans up after dead ones before."""
    await clean_stale(run_dir)
    records = await trio.to_thread.run_sync(mount_records, run_dir)
    reports: dict[str, MountReport] = {}

    async def inquire(record: MountRecord) -> None:
        try:
            with trio.move_on_after(STATUS_TIMEOUT_S):
                answer = await ask(directory_of(run_dir, record.id), "status")
                reports[record.id] = MountReport.from_json(answer)
        except MountError:
            return  # the listing says that it does not answer

    async with trio.open_nursery() as nursery:
        for record in records:
            if record.kind != "run":
                nursery.start_soon(inquire, record)
    return [MountStatus(record, reports.get(record.id)) for record in records]


async def umount(
    path: Path, run_dir: Path, *, lazy: bool = False, timeout_s: float = UMOUNT_TIMEOUT_S
) -> MountRecord:
    """Unmount what is mounted on ``path`` and wait until its process has cleaned up.

    Args:
        path: the mount point.
        run_dir: where mounts are recorded.
        lazy: only make it unreachable; its process goes on until the last user has left.
        timeout_s: how long to wait for the process.

    Raises:
        MountError: nothing of ours is mounted there, it is in use, or its process does not answer.
    """
    mountpoint = await trio.to_thread.run_sync(_find_mountpoint, path)
    stale = await clean_stale(run_dir)
    for record in stale:
        if record.mountpoint == mountpoint:
            return record
    records = await trio.to_thread.run_sync(mount_records, run_dir)
    record = _select(mountpoint, records)
    pidfd = _open_process(record)
    with trio.move_on_after(timeout_s) as scope:
        await ask(directory_of(run_dir, record.id), "stop", lazy=lazy)
        if pidfd is not None and not lazy:
            await trio.lowlevel.wait_readable(pidfd)
    if pidfd is not None:
        os.close(pidfd)
    if scope.cancelled_caught:
        raise MountError(
            f"{mountpoint} was not unmounted within {timeout_s:g} s",
            hint=f"kill -9 {record.process.pid} and try again, or use --lazy",
        )
    return record


async def clean_stale(run_dir: Path) -> list[MountRecord]:
    """Detach the mounts of processes that died, and remove what they left. Says which."""
    return await trio.to_thread.run_sync(_clean_stale, run_dir)


def _clean_stale(run_dir: Path) -> list[MountRecord]:
    mounts = run_dir / "mounts"
    if not mounts.is_dir():
        return []
    # One at a time: a second cleaner, slower than the first, would detach what has been mounted since.
    with open(mounts / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _clean_stale_locked(run_dir)


def _clean_stale_locked(run_dir: Path) -> list[MountRecord]:
    stale = [record for record in mount_records(run_dir) if not record.process.alive]
    for record in stale:
        if record.container is not None:
            delete_container(*record.container)
        detach(record)
        release(run_dir, record)
    sweep(run_dir)
    return stale


def _find_mountpoint(path: Path) -> Path:
    """``path`` without symbolic links, found without touching a mount that may not answer."""
    absolute = Path(os.path.abspath(path))
    if kernel.mounts_at(absolute):
        return absolute
    return Path(os.path.realpath(path))


def _select(mountpoint: Path, records: Sequence[MountRecord]) -> MountRecord:
    for record in records:
        if record.mountpoint == mountpoint:
            if record.kind == "run":
                raise MountError(
                    f"{mountpoint} is the root of a running container",
                    hint=f"end the container: kill {record.process.pid}",
                )
            return record
    found = kernel.mounts_at(mountpoint)
    if found:
        hint = "another user's, or of another run directory (VENEER_RUN_DIR)" if found[-1].ours else None
        raise MountError(f"{mountpoint} is a mount that is not recorded here ({found[-1].fstype})", hint=hint)
    raise MountError(f"nothing is mounted on {mountpoint}", hint="veneer status lists what is")


def _open_process(record: MountRecord) -> int | None:
    try:
        fd = os.pidfd_open(record.process.pid)
    except ProcessLookupError:
        return None
    if not record.process.alive:
        os.close(fd)
        return None
    return fd
