"""Ending processes of a daemon, which do something about each other's ends."""

import os
import select
import signal
from collections.abc import Collection
from pathlib import Path

__all__ = ["kill_at_once", "stop_at_once"]


def stop_at_once(pids: Collection[int]) -> None:
    """Stop processes, so that none of them can do anything about what happens to the others."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    while any(_state(pid) != "T" for pid in pids):
        os.sched_yield()


def kill_at_once(pids: Collection[int]) -> None:
    """Kill processes before any of them can do anything about the others, and wait until they are gone."""
    opened = [os.pidfd_open(pid) for pid in pids]
    if len(pids) > 1:
        stop_at_once(pids)
    for process in opened:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    for process in opened:
        select.select([process], [], [])
        os.close(process)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
