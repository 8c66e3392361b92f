"""The daemon's beginning, end and change of generations, as commands bring them about."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from veneer.daemon.ask import DAEMON_SOCKET, Refused, Request, Unanswered, ask
from veneer.daemon.instance import LOG, known_log
from veneer.errors import MountError
from veneer.events import Reporter, silent
from veneer.mount.state import mount_records
from veneer.waiting import wait_readable

__all__ = [
    "IDLE_EXIT_S",
    "ask_started",
    "become_daemon",
    "let_go",
    "restart_daemon",
    "restore",
    "start_daemon",
    "stop_daemon",
]

#: A daemon that a command started ends after so long without a mount.
IDLE_EXIT_S = 600
#: How long it may take to stop or restart when nothing keeps it.
STOP_TIMEOUT_S = 30.0
PING_TIMEOUT_S, PING_PAUSE_S = 5.0, 0.02
#: A question that so many workers have died of is not asked again.
MOST_UNANSWERED = 3


def restore(run_dir: Path) -> None:
    """Start a daemon when there are mounts of one that is gone: it serves them again, or cleans up.

    Raises MountError.
    """
    if not any(record.daemon for record in mount_records(run_dir)):
        return
    ask_started(run_dir, "ping")


def ask_started(run_dir: Path, op: str, *, report: Reporter = silent, **arguments: object) -> dict[str, object]:
    """Ask the daemon, which is started when there is none.

    A worker that ends before it has answered has undone what it began; then the next one is asked.

    Raises MountError, or the error that is the answer.
    """
    deadline, unanswered = time.monotonic() + STOP_TIMEOUT_S, 0
    while True:
        try:
            return Request(run_dir, DAEMON_SOCKET, op, **arguments).answer(report=report)
        except Refused as error:
            if start_daemon(run_dir, idle_exit_s=IDLE_EXIT_S):
                continue
            # Somebody else is starting it; or what is left of one that died has its lock, and not for long.
            if time.monotonic() > deadline:
                raise MountError(
                    "the daemon does not answer, and no other can be started",
                    hint=_see_log(run_dir),
                ) from error
        except Unanswered:
            unanswered += 1
            if unanswered >= MOST_UNANSWERED:
                raise
        time.sleep(PING_PAUSE_S)


def start_daemon(run_dir: Path, *, idle_exit_s: float | None = None) -> bool:
    """Start the daemon in the background; whether there was none. Raises MountError."""
    import subprocess  # here: most commands find it running

    command = [sys.executable, "-P", "-m", "veneer.daemon.supervisor", os.fspath(run_dir), "--background"]
    if idle_exit_s is not None:
        command += ["--idle-exit", f"{idle_exit_s:g}"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        if process.stdout is None or process.stderr is None:
            raise AssertionError("two pipes were asked for")
        wait_readable(process.stdout.fileno())
        line = process.stdout.readline()
        if not line:
            said = process.stderr.read().decode(errors="replace").strip()
            raise MountError(f"the daemon did not start: {said or 'it said nothing'}", hint="veneer doctor")
    answer: dict[str, Any] = json.loads(line)
    if answer["type"] == "error":
        raise MountError(f"the daemon did not start: {answer['message']}", hint=answer.get("hint"))
    return bool(answer["type"] == "ready")


def become_daemon(run_dir: Path, *, idle_exit_s: float | None = None) -> NoReturn:
    """Let this process be the supervisor of a daemon, in the foreground."""
    command = [sys.executable, "-P", "-m", "veneer.daemon.supervisor", os.fspath(run_dir)]
    if idle_exit_s is not None:
        command += ["--idle-exit", f"{idle_exit_s:g}"]
    os.execv(sys.executable, command)


def stop_daemon(run_dir: Path, *, force: bool = False) -> bool:
    """End the daemon and wait until it has ended; whether there was one.

    Raises MountError when something is mounted, unless ``force`` says to detach it, or is in use after that.
    """
    stopped: object = None
    while True:
        with _supervisor(run_dir) as supervisor:
            # One that was killed meanwhile has a successor, which is the same daemon still.
            if supervisor is None or stopped not in (None, supervisor.started):
                return stopped is not None
            stopped = supervisor.started
            _stop(run_dir, supervisor.process, force=force)


def _stop(run_dir: Path, process: int, *, force: bool) -> None:
    mounts = [record for record in mount_records(run_dir) if record.daemon]
    if mounts and not force:
        where = ", ".join(os.fspath(record.mountpoint) for record in mounts[:3])
        raise MountError(
            f"the daemon serves {len(mounts)} mounts ({where}{', ...' if len(mounts) > 3 else ''})",
            hint="unmount them first, or use --force to detach them",
        )
    with contextlib.suppress(ProcessLookupError):  # it was killed just now
        signal.pidfd_send_signal(process, signal.SIGTERM)
    if not _has_ended(process, STOP_TIMEOUT_S):
        raise MountError(
            f"the daemon has not ended within {STOP_TIMEOUT_S:g} s: what it detached is in use still",
            hint="it ends when the last user has left; veneer status shows what is left",
        )


def restart_daemon(run_dir: Path) -> None:
    """Have another worker take over, of the version that is installed now. Raises MountError."""
    before: object = None
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with _supervisor(run_dir) as supervisor:
            if supervisor is None:
                raise MountError("no daemon runs here", hint="veneer daemon start")
            before = before or ask_started(run_dir, "ping")["worker"]
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(supervisor.process, signal.SIGHUP)
            # One that is killed meanwhile has a successor, which was not told.
            while time.monotonic() < deadline and not _has_ended(supervisor.process, PING_PAUSE_S):
                # The worker that ends may close a connection that it has taken on.
                with contextlib.suppress(MountError, TimeoutError):
                    if ask(run_dir, DAEMON_SOCKET, "ping", timeout_s=PING_TIMEOUT_S)["worker"] != before:
                        return
    raise MountError("no other worker took over", hint=_see_log(run_dir))


def let_go(run_dir: Path) -> None:
    """Have the daemon, if there is one, give up what it keeps for later starts and nobody uses."""
    with contextlib.suppress(MountError, TimeoutError):  # what it does not give up is left alone
        ask(run_dir, DAEMON_SOCKET, "let_go", timeout_s=STOP_TIMEOUT_S)


class _Supervisor(NamedTuple):
    """Where it runs, and since when there has been this daemon, whoever was its supervisor."""

    process: int
    started: object


@contextlib.contextmanager
def _supervisor(run_dir: Path) -> Iterator[_Supervisor | None]:
    """The process that is the daemon's supervisor, opened; None without a daemon. Raises MountError."""
    supervisor = _open_supervisor(run_dir)
    try:
        yield supervisor
    finally:
        if supervisor is not None:
            os.close(supervisor.process)


def _open_supervisor(run_dir: Path) -> _Supervisor | None:
    # One that has just died is named until another one has taken over.
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (status := _published(run_dir)) is not None:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(int(status["supervisor"]))
            if not _has_ended(process, 0.0):
                return _Supervisor(process, status["started"])
            os.close(process)
        if time.monotonic() > deadline:
            raise MountError(
                "the daemon's supervisor has died, and no other has taken over",
                hint=_see_log(run_dir),
            )
        time.sleep(PING_PAUSE_S)
    return None


def _published(run_dir: Path) -> dict[str, Any] | None:
    """What a daemon says of its processes; None without one that listens."""
    try:
        status: dict[str, Any] = json.loads((run_dir / "daemon.json").read_bytes())
        with contextlib.suppress(Unanswered):  # by a worker that has just ended
            ask(run_dir, DAEMON_SOCKET, "ping")
    except (OSError, ValueError, Refused):
        return None
    return status


def _see_log(run_dir: Path) -> str:
    return f"its log is {known_log(os.path.join(run_dir, LOG))}"


def _has_ended(process: int, wait_s: float) -> bool:
    return wait_readable(process, wait_s)
