"""veneer on directories of its own: commands, the processes behind a mount, their logs, and the end of them.

Invariant: only processes that veneer itself recorded in this run directory are ever killed.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from mounts import unmount_below
from servers import VENEER

from crashes.readers import Failure

__all__ = ["RESIDENT", "ROLES", "Machine", "alive"]

#: Served by one daemon, of three processes, for all mounts; other backends have a process a mount.
RESIDENT = "erofs-fanotify"
ROLES = ("supervisor", "standby", "worker")
#: Until killed processes have been replaced: restarts back off.
_WHOLE_DEADLINE_S = 40.0
_STOP_DEADLINE_S = 40.0
_POLL_S = 0.01
_EXIT_MOUNT = 40
#: Of the log, what is shown with a failure.
_LOG_LINES = 12


class Machine:
    """One run directory and one cache directory.

    Args:
        directory: for everything that is made.
        backend: of its mounts.
        reference: the image.
        environment: of veneer commands, on top of the usual.
    """

    def __init__(self, directory: Path, backend: str, reference: str, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.backend = backend
        self.reference = reference
        self.point = directory / "mnt"
        self.run_dir = directory / "run"
        self.cache_dir = directory / "cache"
        self._environment = dict(environment)
        self._served_by: int | None = None
        self._logs: list[IO[str]] = []
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def resident(self) -> bool:
        """Whether one daemon serves all mounts."""
        return self.backend == RESIDENT

    def veneer(self, *arguments: str | Path, may_fail: Iterable[int] = ()) -> tuple[int, str]:
        """Run a command to its end: its status, and its standard output; of a failed one its standard error."""
        own = {
            "PYTHONDONTWRITEBYTECODE": "",
            "VENEER_CACHE_DIR": os.fspath(self.cache_dir),
            "VENEER_RUN_DIR": os.fspath(self.run_dir),
        }
        done = subprocess.run(
            [VENEER, *arguments],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | own | self._environment,
            timeout=120,
        )
        if done.returncode and done.returncode not in may_fail:
            raise Failure(
                f"veneer {' '.join(map(str, arguments))} failed: {done.stderr.strip()}\n{self.log_end()}"
            )
        return done.returncode, done.stderr if done.returncode else done.stdout

    def mount(self, *, writable: bool = False) -> dict[str, Any]:
        """Mount the image; what the command says."""
        how = [] if writable else ["--read-only"]
        arguments = ["mount", "--json", *how, "--backend", self.backend, self.reference]
        info: dict[str, Any] = json.loads(self.veneer(*arguments, self.point)[1])
        if info["backend"] != self.backend:
            raise Failure(f"mounted with {info['backend']} in place of {self.backend}")
        self._served_by = info["pid"]
        if not self.resident:
            # Opened now: with the mount it goes.
            self._logs.append(open(info["log"]))  # noqa: SIM115  # closed by close()
        return info

    def unmount(self, *, lazy: bool = False) -> bool:
        """Unmount it; False if it is in use."""
        arguments = ["umount", *(["--lazy"] if lazy else [])]
        status, message = self.veneer(*arguments, self.point, may_fail=() if lazy else (_EXIT_MOUNT,))
        if status and "in use" not in message and "busy" not in message:
            raise Failure(f"veneer umount failed: {message}")
        return status == 0

    def status(self) -> list[dict[str, Any]]:
        """``veneer status --json``: one object a mount."""
        document = json.loads(self.veneer("status", "--json")[1])
        mounts: list[dict[str, Any]] = document["mounts"] if isinstance(document, dict) else document
        return mounts

    def check_cache(self) -> None:
        """Raise Failure if the cache holds bytes that it should not vouch for."""
        checked = json.loads(self.veneer("cache", "check", "--json")[1])
        if checked["damaged"] or checked["discarded"]:
            raise Failure(f"the cache is damaged: {checked}\n{self.log_end()}")

    def processes(self) -> dict[str, int]:
        """Who serves, by role."""
        if not self.resident:
            return {"worker": self._served_by} if self._served_by else {}
        try:
            recorded = json.loads((self.run_dir / "daemon.json").read_text())
        except FileNotFoundError:
            return {}
        return {role: recorded[role] for role in ROLES if recorded.get(role)}

    def signal(self, *roles: str, number: signal.Signals = signal.SIGKILL) -> dict[str, int]:
        """Send a signal to some of the processes, one right after the other; who got it."""
        now = self.processes()
        hit = {role: now[role] for role in roles if role in now}
        for pid in hit.values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # dead already, by an earlier fault: being replaced
        return hit

    def wait_until_whole(self, replaced: Mapping[str, int]) -> None:
        """Wait until all roles are filled by living processes, other ones than were killed."""
        until = time.monotonic() + _WHOLE_DEADLINE_S
        while True:
            now = self.processes()
            filled = all(role in now and alive(now[role]) for role in ROLES)
            if filled and not set(replaced.values()) & set(now.values()):
                return
            if time.monotonic() > until:
                state = {role: (pid, alive(pid)) for role, pid in now.items()}
                raise Failure(
                    f"not whole {_WHOLE_DEADLINE_S:g} s after {dict(replaced)} died: {state}\n{self.log_end()}"
                )
            time.sleep(_POLL_S)

    def log(self) -> str:
        """What the processes have logged so far."""
        if self.resident:
            path = self.run_dir / "daemon.log"
            return path.read_text(errors="replace") if path.exists() else ""
        for log in self._logs:
            log.seek(0)
        return "".join(log.read() for log in self._logs)

    def log_end(self) -> str:
        """The last lines of it."""
        return "\n".join(self.log().splitlines()[-_LOG_LINES:])

    def stop(self) -> None:
        """End the daemon, which has nothing mounted any more, in order."""
        processes = self.processes() if self.resident else {}
        if not processes:
            return
        os.kill(processes["supervisor"], signal.SIGTERM)
        until = time.monotonic() + _STOP_DEADLINE_S
        while any(map(alive, processes.values())):
            if time.monotonic() > until:
                left = [role for role, pid in processes.items() if alive(pid)]
                raise Failure(f"{left} still run {_STOP_DEADLINE_S:g} s after SIGTERM\n{self.log_end()}")
            time.sleep(_POLL_S)

    def power_off(self) -> None:
        """What a loss of power does: no processes, mounts or run directory. Readers must have ended before."""
        until = time.monotonic() + _STOP_DEADLINE_S
        while True:
            for pid in self.signal(*ROLES).values():
                while alive(pid):
                    time.sleep(_POLL_S)
            # Whoever was being started meanwhile holds the lock, and is recorded in a moment.
            if not self._locked():
                break
            if time.monotonic() > until:
                raise Failure(f"somebody unknown holds {self.run_dir}/daemon.lock")
            time.sleep(_POLL_S)
        unmount_below(self.directory)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _locked(self) -> bool:
        try:
            with open(self.run_dir / "daemon.lock", "rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        """Leave nothing behind, whatever state things are in."""
        self.power_off()
        for log in self._logs:
            log.close()
        shutil.rmtree(self.directory)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
