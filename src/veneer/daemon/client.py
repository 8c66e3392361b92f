"""What commands ask of whoever serves mounts: the daemon, started when it is missing, or a new process.

Without an event loop and without what serves an image: this is on the way of every start.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from veneer.container.options import ContainerOptions
from veneer.container.run import ContainerRun
from veneer.container.runtime import find_runtime
from veneer.daemon.ask import DAEMON_SOCKET, Refused, ask
from veneer.daemon.mounts import Listing, clean_stale, list_mounts, stop
from veneer.daemon.mounts import umount as unmount
from veneer.daemon.report import MountReport
from veneer.daemon.request import ContainerRequest, MountInfo, MountRequest
from veneer.daemon.spawn import start_mount
from veneer.errors import MountError, UsageError
from veneer.events import Notice, Reporter, silent
from veneer.mount.state import MountRecord, mount_records, this_process
from veneer.settings import Settings

__all__ = [
    "RunRequest",
    "RunResult",
    "become_daemon",
    "listing",
    "mount_image",
    "restart_daemon",
    "run_image",
    "start_daemon",
    "stop_daemon",
    "umount",
]

#: A daemon that a command started ends after so long without a mount.
IDLE_EXIT_S = 600
#: How long it may take to stop or restart when nothing keeps it.
STOP_TIMEOUT_S = 30.0
PING_TIMEOUT_S, PING_PAUSE_S = 5.0, 0.02
#: Backends that the daemon serves; ``auto`` is its to decide.
_RESIDENT = ("auto", "erofs-fanotify")


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One container to run.

    Args:
        image: reference of the image.
        options: how the container differs from what the image says.
        runtime: name of the OCI runtime; None for the first that is installed.
        timing: note when the first output comes; output then goes through this process.
    """

    image: str
    options: ContainerOptions
    runtime: str | None = None
    timing: bool = False


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run went.

    Args:
        exit_code: of the command; 128 + n when signal n ended it.
        mounted_s: seconds from the request to the mount.
        first_output_s: seconds from the request to the first byte of output; None without --timing or output.
        total_s: seconds from the request to the end of the command.
        mount: the mount when it was ready.
        report: the mount at its end; None when its process died before.
    """

    exit_code: int
    mounted_s: float
    first_output_s: float | None
    total_s: float
    mount: MountInfo
    report: MountReport | None

    @property
    def requests(self) -> int:
        """Requests over the network, or of data when the image is an OCI layout on this machine."""
        report = self.report
        return (report.transport["requests"] or report.store["requests"]) if report else 0

    @property
    def bytes_fetched(self) -> int:
        """What they brought."""
        report = self.report
        return (report.transport["bytes_received"] or report.store["bytes_fetched"]) if report else 0

    def to_json(self) -> dict[str, object]:
        """The facts by name."""
        return asdict(self) | {"requests": self.requests, "bytes_fetched": self.bytes_fetched}


def mount_image(request: MountRequest, *, report: Reporter = silent) -> MountInfo:
    """Mount an image in the background. Returns when the mount can be used. Raises VeneerError."""
    settings = request.settings
    if os.geteuid() != 0:
        clean_stale(settings.run_dir)
        return start_mount(request, report=report)
    _restore(settings.run_dir)
    clean_stale(settings.run_dir)
    if settings.backend in _RESIDENT:
        answer = _ask_daemon(request)
        if answer["type"] == "ready":
            for message in _strings(answer["notices"]):
                report(Notice(message))
            return MountInfo(**answer["info"])
        request = replace(request, settings=replace(settings, backend=str(answer["backend"])))
        if answer["backend"] == "fuse" or settings.backend != "auto":
            report(Notice(f"using the slower backend {answer['backend']}: {answer['reason']}"))
    return start_mount(request, report=report)


def run_image(request: RunRequest, settings: Settings, *, report: Reporter = silent) -> RunResult:
    """Run a command in a container on an image and wait for it.

    Raises:
        VeneerError: it could not be started; a command that fails is a result.
    """
    if os.geteuid() != 0:
        raise MountError(
            "running containers needs root", hint="mount the image instead: veneer mount IMAGE DIR"
        )
    options = request.options
    if options.terminal and not sys.stdin.isatty():
        raise UsageError("standard input is not a terminal", hint="leave out -t")
    runtime = find_runtime(request.runtime)
    began = time.monotonic()
    container = ContainerRequest(options, runtime, this_process())
    wanted = MountRequest.create(request.image, Path("/"), settings, writable=True, container=container)
    info = mount_image(wanted, report=report)
    mounted_s = time.monotonic() - began
    last: MountReport | None = None
    try:
        run = ContainerRun(
            runtime,
            interactive=options.interactive,
            terminal=options.terminal,
            watch_output=request.timing,
        )
        outcome = run.run(info.id, Path(info.bundle or ""))
        total_s = time.monotonic() - began
    finally:
        last = _end(info, settings.run_dir)
    return RunResult(
        exit_code=outcome.exit_code,
        mounted_s=mounted_s,
        first_output_s=None if outcome.first_output is None else outcome.first_output - began,
        total_s=total_s,
        mount=info,
        report=last,
    )


def umount(path: Path, run_dir: Path, *, lazy: bool = False) -> MountRecord:
    """Unmount what is mounted on ``path``. See :func:`veneer.daemon.mounts.umount`."""
    _restore(run_dir)
    return unmount(path, run_dir, lazy=lazy)


def listing(run_dir: Path) -> Listing:
    """Everything that is mounted."""
    _restore(run_dir)
    return list_mounts(run_dir)


def start_daemon(run_dir: Path, *, idle_exit_s: float | None = None) -> bool:
    """Start the daemon in the background; whether there was none. Raises MountError."""
    command = [sys.executable, "-m", "veneer.daemon.supervisor", os.fspath(run_dir), "--background"]
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
    command = [sys.executable, "-m", "veneer.daemon.supervisor", os.fspath(run_dir)]
    if idle_exit_s is not None:
        command += ["--idle-exit", f"{idle_exit_s:g}"]
    os.execv(sys.executable, command)


def stop_daemon(run_dir: Path, *, force: bool = False) -> bool:
    """End the daemon and wait until it has ended; whether there was one.

    Raises MountError when something is mounted, unless ``force`` says to detach it, or is in use after that.
    """
    supervisor = _supervisor(run_dir)
    if supervisor is None:
        return False
    mounts = [record for record in mount_records(run_dir) if record.daemon]
    if mounts and not force:
        where = ", ".join(os.fspath(record.mountpoint) for record in mounts[:3])
        raise MountError(
            f"the daemon serves {len(mounts)} mounts ({where}{', ...' if len(mounts) > 3 else ''})",
            hint="unmount them first, or use --force to detach them",
        )
    with _opened(supervisor) as process:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_TIMEOUT_S)[0]:
            raise MountError(
                f"the daemon has not ended within {STOP_TIMEOUT_S:g} s: what it detached is in use still",
                hint="it ends when the last user has left; veneer status shows what is left",
            )
    return True


def restart_daemon(run_dir: Path) -> None:
    """Have another worker take over, of the version that is installed now. Raises MountError."""
    supervisor = _supervisor(run_dir)
    if supervisor is None:
        raise MountError("no daemon runs here", hint="veneer daemon start")
    before = ask(run_dir, DAEMON_SOCKET, "ping")["worker"]
    with _opened(supervisor) as process:
        signal.pidfd_send_signal(process, signal.SIGHUP)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            # The worker that ends may close a connection that it has taken on.
            with contextlib.suppress(MountError, TimeoutError):
                if ask(run_dir, DAEMON_SOCKET, "ping", timeout_s=PING_TIMEOUT_S)["worker"] != before:
                    return
            time.sleep(PING_PAUSE_S)
    raise MountError("no other worker took over", hint=f"see {run_dir / 'daemon.log'}")


def _supervisor(run_dir: Path) -> int | None:
    """The process that is the daemon's supervisor."""
    try:
        pids: dict[str, Any] = json.loads((run_dir / "daemon.json").read_bytes())
        return int(pids["supervisor"]) if ask(run_dir, DAEMON_SOCKET, "ping") else None
    except (OSError, ValueError, KeyError, Refused):
        return None


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[int]:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise MountError("the daemon has just ended, or changed its supervisor", hint="try again") from error
    try:
        yield process
    finally:
        os.close(process)


def _ask_daemon(request: MountRequest) -> dict[str, Any]:
    """Ask the daemon for a mount; a daemon that is missing, or just ends for want of work, is started."""
    run_dir, document = request.settings.run_dir, request.to_json()
    try:
        return ask(run_dir, DAEMON_SOCKET, "mount", request=document)
    except Refused:
        start_daemon(run_dir, idle_exit_s=IDLE_EXIT_S)
    return ask(run_dir, DAEMON_SOCKET, "mount", request=document)


def _restore(run_dir: Path) -> None:
    """Start a daemon when there are mounts of one that is gone: it serves them again, or cleans up."""
    if not any(record.daemon for record in mount_records(run_dir)):
        return
    try:
        ask(run_dir, DAEMON_SOCKET, "ping")
    except Refused:
        start_daemon(run_dir, idle_exit_s=IDLE_EXIT_S)


def _end(info: MountInfo, run_dir: Path) -> MountReport | None:
    for record in mount_records(run_dir):
        if record.id == info.id:
            try:
                return stop(record, run_dir)
            except MountError:
                # Busy: something that left the container uses it still.
                return stop(record, run_dir, lazy=True)
    return None


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
