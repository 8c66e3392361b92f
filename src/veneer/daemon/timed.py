"""The timing record of a mount that is there, from whoever serves it."""

import os
import time
from pathlib import Path

from veneer.daemon.ask import DAEMON_SOCKET, MOUNT_SOCKET, ask
from veneer.errors import MountError
from veneer.mount.state import MountRecord, directory_of, mount_records, this_process
from veneer.timing import Timing
from veneer.timing.record import TimingRecord

__all__ = ["process_timing", "timing_of"]

#: It takes a few milliseconds to write down.
TIMEOUT_S = 10.0


def timing_of(name: str, run_dir: Path, *, timeout_s: float = TIMEOUT_S) -> TimingRecord:
    """The record of the mount of that name in the run directory. Raises MountError."""
    record = next((one for one in mount_records(run_dir) if one.id == name), None)
    if record is None:
        raise MountError("it is not mounted any more")
    try:
        answer = _ask(record, run_dir, timeout_s)
    except TimeoutError as error:
        raise MountError(f"{record.mountpoint}: who serves it does not answer") from error
    return TimingRecord.from_json(answer["record"])  # type: ignore[arg-type] # it came as JSON


def _ask(record: MountRecord, run_dir: Path, timeout_s: float) -> dict[str, object]:
    if record.daemon:
        return ask(run_dir, DAEMON_SOCKET, "timing", timeout_s=timeout_s, id=record.id)
    return ask(directory_of(run_dir, record.id), MOUNT_SOCKET, "timing", timeout_s=timeout_s)


def process_timing() -> Timing:
    """What times this process. It began with the process, as exactly as the kernel tells: some 10 ms."""
    timing = Timing()
    since_boot = this_process().start / os.sysconf("SC_CLK_TCK")
    suspended = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    timing.began = min(timing.began, since_boot - suspended)
    return timing
