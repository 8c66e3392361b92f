"""What is mounted and by which process, on disk, so that another process can ask, end or clean up.

One directory a mount under ``run_dir/mounts``: ``state.json`` (a :class:`MountRecord`), and beside it whatever
the mount needs for itself (log, control socket, the private mount below an overlay). A record appears, whole,
before anything is mounted and goes after everything is unmounted; so whatever a killed process leaves behind
is named by a record whose process is gone.

Every function here blocks; an event loop calls them in a thread.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.upper import Upper, discard

__all__ = [
    "MountRecord",
    "Process",
    "claim",
    "claiming",
    "detach",
    "directory_of",
    "finish_retiring",
    "mount_id",
    "mount_records",
    "process_of",
    "release",
    "retire",
    "sweep",
    "this_process",
]

_STATE = "state.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for good: its number alone may be given to another one later."""

    pid: int
    #: Clock ticks from boot to its start (field 22 of /proc/PID/stat).
    start: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether it runs still."""
        return _start_of(self.pid) == self.start and _boot_id() == self.boot

    def opened(self) -> int | None:
        """A pidfd of it, which polls readable when it ends; None when it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive:
            os.close(fd)
            return None
        return fd


def this_process() -> Process:
    """The calling process."""
    return process_of(os.getpid())


def process_of(pid: int) -> Process:
    """The process that has this number now. Raises MountError when there is none."""
    start = _start_of(pid)
    if start is None:
        raise MountError(f"there is no process {pid}, or /proc is not mounted")
    return Process(pid, start, _boot_id())


@dataclass(frozen=True, slots=True)
class MountRecord:
    """One mount.

    Args:
        id: name of its directory; see :func:`mount_id`.
        kind: ``mount``, ``run`` for the root of a container, or ``detached``: see :func:`retire`.
        image: the reference as the user wrote it.
        mountpoint: where the tree is seen; absolute, no symbolic links in it.
        process: who serves it; with a daemon, for a container, whose end it ends with.
        lower: where the tree is when an overlay covers ``mountpoint``.
        devices: where the devices below an EROFS tree are, for the time of mounting.
        upper: the writable layer of that overlay.
        made_mountpoint: whether ``mountpoint`` was made for this mount and goes with it.
        vacated: of a detached mount: a directory that was made for it, and in which others see it still.
        container: for ``run``: the runtime's program and its name for the container.
        daemon: whether the resident daemon serves it: then nobody else may clean it up, and ``process`` says
            nothing about whether it is alive.
        since: when the mount began, seconds since the epoch.
    """

    id: str
    kind: str
    image: str
    mountpoint: Path
    process: Process
    lower: Path | None = None
    devices: Path | None = None
    upper: Upper | None = None
    made_mountpoint: bool = False
    vacated: Path | None = None
    container: tuple[str, str] | None = None
    daemon: bool = False
    since: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, object]:
        """The record as written to disk."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "MountRecord":
        """Read what :meth:`to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        if not isinstance(value, dict) or set(value) != {item.name for item in fields(cls)}:
            raise ValueError("not a mount record")
        upper, lower, devices, vacated = (value[name] for name in ("upper", "lower", "devices", "vacated"))
        return cls(
            **value
            | {
                "mountpoint": Path(value["mountpoint"]),
                "process": Process(**value["process"]),
                "lower": None if lower is None else Path(lower),
                "devices": None if devices is None else Path(devices),
                "vacated": None if vacated is None else Path(vacated),
                "upper": upper and Upper(Path(upper["directory"]), Path(upper["work"]), upper["private"]),
                "container": value["container"] and tuple(value["container"]),
            }
        )


def mount_id(mountpoint: Path) -> str:
    """The name of a mount follows from its place, so two processes cannot both begin one there."""
    import hashlib

    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def directory_of(run_dir: Path, name: str) -> Path:
    """Where a mount keeps what it needs for itself."""
    return run_dir / "mounts" / name


@contextlib.contextmanager
def claiming(run_dir: Path) -> Iterator[None]:
    """One at a time looks for a place and claims it, mount point and all. Raises MountError."""
    try:
        _make_mounts(run_dir)
        lock = open(run_dir / "mounts/.claim", "ab")  # noqa: SIM115 - closed below; errors of the body are not ours
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def claim(run_dir: Path, record: MountRecord) -> Path:
    """Make the directory of a mount with its record in it, at once. Raises MountError when it exists."""
    directory = directory_of(run_dir, record.id)
    draft = _aside(directory, record.process.pid)
    try:
        _make_mounts(run_dir)
        draft.mkdir(mode=0o700)
        _write(draft / _STATE, record)
        # Renaming onto a directory that is not empty fails, so exactly one of two claims succeeds.
        draft.rename(directory)
    except OSError as error:
        _remove(draft)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise MountError(
                f"{record.mountpoint} is mounted already", hint="see veneer status, or unmount it first"
            ) from error
        raise _unwritable(run_dir, error) from error
    return directory


def _make_mounts(run_dir: Path) -> None:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    for path in (run_dir, run_dir / "mounts"):
        path.mkdir(mode=0o755, exist_ok=True)  # whatever the umask would let the group do
    _check_owner(run_dir)


def _unwritable(run_dir: Path, error: OSError) -> MountError:
    return MountError(f"cannot write below {run_dir}: {error.strerror}", hint="set VENEER_RUN_DIR")


def mount_records(run_dir: Path) -> list[MountRecord]:
    """All records, oldest first; of living processes and of dead ones. Raises MountError."""
    found: list[MountRecord] = []
    if not (run_dir / "mounts").exists():
        return found
    _check_owner(run_dir)
    for path in (run_dir / "mounts").glob("[!.]*/" + _STATE):
        try:
            record = MountRecord.from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue  # it was unmounted just now
        except (OSError, ValueError, TypeError, KeyError) as error:
            import logging

            log = logging.getLogger(__name__)
            log.warning("mount record not readable path=%s cause=%r", path, error)
        else:
            found.append(replace(record, id=path.parent.name))
    return sorted(found, key=lambda record: record.since)


def detach(record: MountRecord) -> None:
    """Unmount whatever a record names and is still mounted, lazily, and remove what was private to it."""
    for target in filter(None, (record.mountpoint, record.lower, record.devices)):
        try:
            kernel.unmount_ours(target, lazy=True)
        except OSError as error:
            raise MountError(f"cannot unmount {target}: {error.strerror}") from error
    if record.upper is not None:
        discard(record.upper)
    made = record.mountpoint if record.made_mountpoint else record.vacated
    if made is not None:
        with contextlib.suppress(OSError):  # somebody put something into it, or mounted there: theirs now
            made.rmdir()


def retire(run_dir: Path, record: MountRecord, *, seen_elsewhere: bool = False) -> MountRecord:
    """Give up the place of a mount that has been detached but is still in use, so that another can have it.

    Args:
        run_dir: where mounts are recorded.
        record: of the mount.
        seen_elsewhere: whether it is mounted in another mount namespace. To remove its mount point, which works
            here, would unmount it there.
    """
    # Not of the process: it may have several such mounts of one place.
    name = f"{record.id}-{os.urandom(4).hex()}"
    directory, new = directory_of(run_dir, record.id), directory_of(run_dir, name)
    detached = replace(
        record,
        id=name,
        kind="detached",
        mountpoint=new / "detached",
        lower=None,
        devices=None,
        made_mountpoint=False,
        vacated=record.mountpoint if record.made_mountpoint and seen_elsewhere else None,
    )
    if record.made_mountpoint and not seen_elsewhere:
        with contextlib.suppress(OSError):
            record.mountpoint.rmdir()
    _write(directory / f".{_STATE}", detached)
    (directory / f".{_STATE}").replace(directory / _STATE)
    directory.rename(new)
    return detached


def finish_retiring(run_dir: Path, record: MountRecord) -> MountRecord:
    """Free the place of a mount over which a process was killed in :func:`retire`; any other record stays."""
    name = record.mountpoint.parent.name
    if record.kind != "detached" or name == record.id:
        return record
    directory_of(run_dir, record.id).rename(directory_of(run_dir, name))
    return replace(record, id=name)


def release(run_dir: Path, record: MountRecord) -> None:
    """Remove a record and the directory around it. Never descends into anything mounted."""
    directory = directory_of(run_dir, record.id)
    inside = [e.mountpoint for e in kernel.mount_table() if directory in e.mountpoint.parents]
    if inside:
        raise MountError(f"cannot remove {directory}: {inside[0]} is still mounted")
    gone = _aside(directory, os.getpid())
    with contextlib.suppress(FileNotFoundError):
        # At once, so that no half-removed directory is in the way of the next mount.
        directory.rename(gone)
    _remove(gone)


def _aside(directory: Path, pid: int) -> Path:
    """A name for what is not a mount's directory yet, or not any more; no other thread has it either."""
    return directory.with_name(f".{directory.name}-{os.urandom(4).hex()}.{pid}")


def sweep(run_dir: Path) -> None:
    """Remove what processes left that died in :func:`claim` or :func:`release`."""
    for path in (run_dir / "mounts").glob(".*.*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdigit() and _start_of(int(pid)) is None:
            _remove(path)


def _remove(directory: Path) -> None:
    import shutil  # here, as everything that only few commands need

    shutil.rmtree(directory, ignore_errors=True)


def _check_owner(run_dir: Path) -> None:
    """Refuse records that somebody else could have written: what they name is unmounted and removed."""
    for directory in (run_dir, run_dir / "mounts"):
        status = directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise MountError(
                f"the run directory {directory} belongs to, or can be written by, another user",
                hint="set VENEER_RUN_DIR to a directory of your own",
            )


def _write(path: Path, record: MountRecord) -> None:
    path.write_text(json.dumps(record.to_json(), default=os.fspath))


def _start_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields_after_name = text.rpartition(")")[2].split()
    # A zombie serves nothing any more.
    return None if fields_after_name[0] == "Z" else int(fields_after_name[19])


@cache
def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
