"""What a supervisor says to a worker that it starts."""

import argparse
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Arguments"]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line of a worker: :meth:`~veneer.daemon.held.Held.worker_arguments`.

    Args:
        run_dir: the run directory.
        group: descriptor of the fanotify group; None where there is none.
        listener: descriptor of the control socket.
        lock: descriptor of the lock file.
        supervisor: descriptor of the socket to the supervisor.
        idle_exit: ends after so many seconds without a mount, or ``none``.
        fresh_group: no worker had this group before.
    """

    run_dir: Path
    group: int | None
    listener: int
    lock: int
    supervisor: int
    idle_exit: str
    fresh_group: bool

    @classmethod
    def parse(cls, words: list[str]) -> "Arguments":
        """From the command line."""
        parser = argparse.ArgumentParser("veneer.daemon.worker")
        parser.add_argument("--run-dir", type=Path, required=True)
        for name in ("--group", "--socket", "--lock", "--supervisor"):
            parser.add_argument(name, required=True)
        parser.add_argument("--idle-exit", default="none")
        parser.add_argument("--fresh-group", action="store_true")
        found = parser.parse_args(words)
        return cls(
            run_dir=found.run_dir,
            group=None if found.group == "none" else int(found.group),
            listener=int(found.socket),
            lock=int(found.lock),
            supervisor=int(found.supervisor),
            idle_exit=found.idle_exit,
            fresh_group=found.fresh_group,
        )
