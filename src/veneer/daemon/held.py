"""What one supervisor needs to know to go on where another one stopped.

Descriptors are passed by inheritance under the same numbers, so what has to be said is which number is what.
Standard library only, and little of it: the supervisor imports this.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from veneer.daemon.myself import keep_to_myself

__all__ = ["STATE_VARIABLE", "SUPERVISOR", "WATCHDOG_S", "Held"]

#: The program of the supervisor. Nothing is imported from the current directory.
SUPERVISOR = (sys.executable, "-P", "-m", "veneer.daemon.supervisor")
#: Environment variable by which a worker is told what a supervisor of its own would have to know.
STATE_VARIABLE = "VENEER_SUPERVISOR"
#: A worker says something every five seconds. One that has been silent for so long is killed.
WATCHDOG_S = 60.0


class Held(NamedTuple):
    """A daemon as its supervisor has it; numbers of descriptors, and None for what there is not.

    Args:
        listener: the daemon's socket.
        lock: of the run directory.
        group: of fanotify.
        group_used: whether a worker has had the group.
        own_socket: whether the socket is ours to remove, not the service manager's.
        worker: pid, pidfd and our end of the socket to it; only while this is handed over.
        standby: pid and pidfd; only then, too.
        idle_exit: passed to workers.
        watchdog_s: how long a worker may be silent.
        started: when the daemon was, seconds since the epoch.
        restarts: how many workers have died.
        address: where the service manager is told things.
        manager_watchdog_s: how often it wants to be told that all is well.
        oom_score_adj: what workers get, because we had it.
        background: whether standard output is to be let go of.
        told: whether whoever started the daemon knows how that went.
        succession: has one byte for the one standby that takes the place of this primary.
    """

    listener: int
    lock: int
    group: int | None = None
    group_used: bool = False
    own_socket: bool = True
    worker: tuple[int, int, int] | None = None
    standby: tuple[int, int] | None = None
    idle_exit: str = "none"
    watchdog_s: float = WATCHDOG_S
    started: float = 0.0
    restarts: int = 0
    address: str | None = None
    manager_watchdog_s: float | None = None
    oom_score_adj: str | None = None
    background: bool = False
    told: bool = False
    succession: int | None = None

    def to_json(self) -> str:
        """For :meth:`from_json`."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> "Held":
        """What :meth:`to_json` wrote."""
        value = json.loads(text)
        return cls(**value | {name: value[name] and tuple(value[name]) for name in ("worker", "standby")})

    def worker_arguments(self, run_dir: str, link: int) -> list[str]:
        """For a worker that inherits the descriptors, and ``link``, the other end of the socket to it."""
        return [
            *("--run-dir", run_dir),
            *("--group", "none" if self.group is None else str(self.group)),
            *("--socket", str(self.listener), "--lock", str(self.lock)),
            *("--supervisor", str(link), "--idle-exit", self.idle_exit),
            *([] if self.group_used else ["--fresh-group"]),
        ]

    def execute(self, command: Sequence[str]) -> NoReturn:
        """Have another program go on in this process, with ``--resume``. Raises OSError."""
        for fd in self.descriptors:
            os.set_inheritable(fd, True)
        try:
            os.execv(command[0], [*command, "--resume", self.to_json()])
        finally:
            keep_to_myself(self.descriptors)

    @property
    def descriptors(self) -> list[int]:
        """All that it names."""
        optional = [fd for fd in (self.group, self.succession) if fd is not None]
        return [self.listener, self.lock, *optional, *(self.worker or ())[1:], *(self.standby or ())[1:]]
