"""Noticing that somebody has unmounted something by hand."""

import os
import select
from dataclasses import dataclass, field
from pathlib import Path

import trio

from veneer.mount import kernel

__all__ = ["RECHECK_S", "MountTableWatch"]

#: How long it may take to notice an unmount whose notice by the kernel got lost.
RECHECK_S = 2.0


@dataclass(slots=True)
class _Waiting:
    """For one mount point; ``device`` is what was mounted there last."""

    gone: trio.Event = field(default_factory=trio.Event)
    device: str | None = None


class MountTableWatch:
    """Looks at the mount table of this process whenever it changes, for all who wait for a mount to go."""

    def __init__(self) -> None:
        self._waiting: dict[Path, _Waiting] = {}
        self._wanted = trio.Event()

    async def gone(self, mountpoint: Path) -> str | None:
        """Wait until nothing that this program made is mounted there.

        Returns the device of what was; None if that has never been seen.
        """
        waiting = self._waiting.setdefault(mountpoint, _Waiting())
        self._wanted.set()
        await waiting.gone.wait()
        return waiting.device

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look until cancelled."""
        with open("/proc/self/mountinfo", "rb") as table, select.epoll() as changes:  # noqa: ASYNC230 - procfs
            # The table itself always polls readable; through epoll only its changes (POLLPRI) count.
            changes.register(table.fileno(), select.EPOLLPRI)
            task_status.started()
            while True:
                while not self._waiting:
                    self._wanted = trio.Event()
                    await self._wanted.wait()
                self._look()
                # Asking the table takes the news from it, and trio's epoll asks ours twice when they came just
                # before it was added: the second answer counts, and says nothing. So look again now and then.
                with trio.move_on_after(RECHECK_S):
                    await trio.lowlevel.wait_readable(changes.fileno())
                changes.poll(0)

    def _look(self) -> None:
        mounted = kernel.our_mountpoints()
        for mountpoint, waiting in list(self._waiting.items()):
            device = mounted.get(os.fsencode(mountpoint))
            if device is None:
                self._waiting.pop(mountpoint).gone.set()
            else:
                waiting.device = device
