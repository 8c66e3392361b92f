"""Processes that tests watch and end, though they do something about each other's ends."""

import os
import select
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

__all__ = ["children", "kill_at_once", "stop_at_once"]


def children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads has started them."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError):  # it ended, and its children are those of another thread
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


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
