"""All mounts of one run directory: listing, asking and ending them, and cleaning up after dead processes.

Two kinds of processes serve mounts: the daemon, which looks after its own records, and processes of one mount
each, after which whoever comes next cleans up.
"""

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.daemon.ask import DAEMON_SOCKET, MOUNT_SOCKET, Refused, Request, Unanswered, ask
from veneer.daemon.lifecycle import ask_started, restore
from veneer.daemon.report import MountReport
from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.state import MountRecord, detach, directory_of, mount_records, release, sweep
from veneer.waiting import wait_readable

__all__ = ["Listing", "MountStatus", "Stopped", "clean_stale", "list_mounts", "status_json", "stop", "umount"]

#: How long an unmount waits for the mount's process: it only has system calls to make.
UMOUNT_TIMEOUT_S = 30.0
#: Between giving up its socket and its end a process cleans up, and lets its interpreter end.
EXIT_S = 2.0
#: A process that serves answers at once, unless the machine is badly overloaded.
STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class MountStatus:
    """One live mount: its record, and what its process says.

    ``report`` is None when the process does not answer in time, or as another version of veneer does.
    """

    record: MountRecord
    report: MountReport | None

    def to_json(self) -> dict[str, object]:
        """The mount for ``veneer status --json``."""
        return status_json(self.record, self.report)


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that is mounted, and what the daemon says of itself; None when there is no daemon."""

    mounts: list[MountStatus]
    daemon: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Stopped:
    """A mount that has been unmounted.

    Args:
        report: its last one; None when it was not served, or by another version of veneer.
        users: None when its file system has ended. Else who uses it, as far as can be told; it is served until
            they have left.
    """

    report: MountReport | None
    users: list[str] | None = None


def status_json(record: MountRecord, report: MountReport | None) -> dict[str, object]:
    """One mount as JSON."""
    return {
        "id": record.id,
        "kind": record.kind,
        "image": record.image,
        "mountpoint": os.fspath(record.mountpoint),
        # Workers of the daemon change.
        "pid": None if record.daemon and record.kind != "run" else record.process.pid,
        "daemon": record.daemon,
        "since": record.since,
        "report": report and report.to_json(),
    }


def list_mounts(run_dir: Path) -> Listing:
    """Every live mount with its counters, oldest first. Cleans up after dead ones before."""
    restore(run_dir)
    clean_stale(run_dir)
    deadline = time.monotonic() + STATUS_TIMEOUT_S
    daemon: dict[str, Any] = {}
    # Of what does not answer, the listing says so.
    with suppress(MountError, TimeoutError):
        daemon = _daemon_status(run_dir)
    reports = {found["id"]: _report(found["report"]) for found in daemon.get("mounts", ())}
    records = mount_records(run_dir)
    asked: dict[str, Request] = {}
    for record in records:
        if not record.daemon:
            with suppress(MountError):
                asked[record.id] = Request(directory_of(run_dir, record.id), MOUNT_SOCKET, "status")
    for name, request in asked.items():
        with suppress(MountError, TimeoutError):
            answer = request.answer(max(0.01, deadline - time.monotonic()))
            reports[name] = _report(answer)
    mounts = [MountStatus(record, reports.get(record.id)) for record in records]
    return Listing(mounts, daemon.get("daemon"))


def _daemon_status(run_dir: Path) -> dict[str, Any]:
    try:
        return ask(run_dir, DAEMON_SOCKET, "status", timeout_s=STATUS_TIMEOUT_S)
    except Unanswered:
        # Its worker has ended meanwhile; the next one knows, too.
        return ask(run_dir, DAEMON_SOCKET, "status", timeout_s=STATUS_TIMEOUT_S)


def umount(
    path: Path, run_dir: Path, *, lazy: bool = False, timeout_s: float = UMOUNT_TIMEOUT_S
) -> tuple[MountRecord, Stopped]:
    """Unmount what is mounted on ``path``, and wait until everything around it has been cleaned up.

    It is not waited for users in other mount namespaces: they are named, and served on.

    Args:
        path: the mount point.
        run_dir: where mounts are recorded.
        lazy: make it unreachable also when it is in use here.
        timeout_s: how long to wait for its process.

    Raises:
        MountError: nothing of ours is mounted there, it is in use, or its process does not answer.
    """
    mountpoint = _find_mountpoint(path)
    restore(run_dir)
    stale = clean_stale(run_dir)
    for record in stale:
        if record.mountpoint == mountpoint:
            return record, Stopped(None)
    record = _select(mountpoint, mount_records(run_dir))
    _unmount_own_copy(record, run_dir, lazy=lazy)
    return record, stop(record, run_dir, lazy=lazy, timeout_s=timeout_s)


def stop(
    record: MountRecord, run_dir: Path, *, lazy: bool = False, timeout_s: float = UMOUNT_TIMEOUT_S
) -> Stopped:
    """End a mount. Raises MountError."""
    deadline = time.monotonic() + timeout_s
    pidfd = None if record.daemon else record.process.opened()
    try:
        if record.daemon:
            answer = _stopped_by_daemon(record, run_dir, lazy=lazy, timeout_s=timeout_s)
        else:
            answer = _stopped_by_process(record, pidfd, run_dir, lazy=lazy, timeout_s=timeout_s)
            left_s = max(0.0, deadline - time.monotonic())
            if pidfd is not None and answer.get("users") is None and not wait_readable(pidfd, left_s):
                raise TimeoutError
    except TimeoutError as error:
        hint = "see its log" if record.daemon else f"kill -9 {record.process.pid} and try again, or use --lazy"
        raise MountError(f"{record.mountpoint} was not unmounted within {timeout_s:g} s", hint=hint) from error
    finally:
        if pidfd is not None:
            os.close(pidfd)
    report, users = answer.get("report"), answer.get("users")
    return Stopped(
        _report(report) if isinstance(report, dict) else None,
        [str(user) for user in users] if isinstance(users, list) else None,
    )


def _stopped_by_daemon(
    record: MountRecord, run_dir: Path, *, lazy: bool, timeout_s: float
) -> dict[str, object]:
    def stopped() -> dict[str, object]:
        return ask(run_dir, DAEMON_SOCKET, "stop", timeout_s=timeout_s, id=record.id, lazy=lazy)

    try:
        return stopped()
    except Unanswered:
        # Its worker has ended meanwhile; the next one serves the mount, unless that was gone by then.
        restore(run_dir)
        return stopped() if any(one.id == record.id for one in mount_records(run_dir)) else {}


def _stopped_by_process(
    record: MountRecord, process: int | None, run_dir: Path, *, lazy: bool, timeout_s: float
) -> dict[str, object]:
    try:
        return ask(directory_of(run_dir, record.id), MOUNT_SOCKET, "stop", timeout_s=timeout_s, lazy=lazy)
    except (Refused, Unanswered):
        if process is not None and not wait_readable(process, EXIT_S):
            raise
        # It was killed since somebody looked, or has ended because somebody else unmounted it.
        clean_stale(run_dir)
        return {}


def _report(value: dict[str, object]) -> MountReport | None:
    """What a process tells of a mount; None if it is of another version of veneer, and tells something else."""
    try:
        return MountReport.from_json(value)
    except (KeyError, TypeError):
        return None


def clean_stale(run_dir: Path) -> list[MountRecord]:
    """Detach the mounts of processes that died, and remove what they left. Says which."""
    mounts = run_dir / "mounts"
    if not mounts.is_dir():
        return []
    # One at a time: a second cleaner, slower than the first, would detach what has been mounted since.
    with open(mounts / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _clean_stale_locked(run_dir)


def _clean_stale_locked(run_dir: Path) -> list[MountRecord]:
    stale = [record for record in mount_records(run_dir) if not record.daemon and not record.process.alive]
    for record in stale:
        if record.container is not None:
            from veneer.container.runtime import delete_container  # here: it takes time and is needed rarely

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


def _unmount_own_copy(record: MountRecord, run_dir: Path, *, lazy: bool) -> None:
    """Unmount what this process sees there if it is in another mount namespace than who serves the mount."""
    try:
        if _namespace_of_server(record, run_dir) in (None, os.readlink("/proc/self/ns/mnt")):
            return
        # Made there before this namespace was, for an overlay; nobody is meant to be in it.
        for target, detach_it in ((record.mountpoint, lazy), (record.lower, True)):
            if target is not None:
                kernel.unmount_ours(target, lazy=detach_it)
    except OSError as error:
        raise MountError(
            f"cannot unmount {record.mountpoint} in this mount namespace: {error.strerror}",
            hint="end what uses it, or unmount with --lazy",
        ) from error


def _namespace_of_server(record: MountRecord, run_dir: Path) -> str | None:
    """The mount namespace of who serves a mount; None if its process has just ended. Raises OSError."""
    asked: set[object] = set()
    while True:
        server = ask_started(run_dir, "ping")["worker"] if record.daemon else record.process.pid
        try:
            return os.readlink(f"/proc/{server}/ns/mnt")
        except OSError:
            if not record.daemon and not record.process.alive:
                return None
            # A worker that answered and ended has a successor.
            if not record.daemon or server in asked:
                raise
            asked.add(server)


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
