"""What commands ask of whoever serves mounts: the daemon, started when it is missing, or a new process.

Without an event loop and without what serves an image: this is on the way of every start.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.container.run import ContainerRun, Outcome
from veneer.container.runtime import find_runtime
from veneer.daemon.lifecycle import ask_started, restore
from veneer.daemon.mounts import clean_stale, stop
from veneer.daemon.report import MountReport
from veneer.daemon.request import RESIDENT, MountInfo, MountRequest, RunRequest
from veneer.daemon.spawn import start_mount
from veneer.errors import MountError, UsageError
from veneer.events import Notice, Reporter, silent
from veneer.mount.state import mount_records, this_process
from veneer.settings import Settings

if TYPE_CHECKING:
    from veneer.timing.record import TimingRecord

__all__ = ["RunRequest", "RunResult", "mount_image", "run_image", "timed_mount"]


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
        timing: the timing record, if the run was timed.
    """

    exit_code: int
    mounted_s: float
    first_output_s: float | None
    total_s: float
    mount: MountInfo
    report: MountReport | None
    timing: "TimingRecord | None" = None

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
        facts = asdict(replace(self, timing=None))
        del facts["timing"]
        return facts | {"requests": self.requests, "bytes_fetched": self.bytes_fetched}


def mount_image(request: MountRequest, *, report: Reporter = silent) -> MountInfo:
    """Mount an image in the background. Returns when the mount can be used. Raises VeneerError."""
    settings = request.settings
    if request.record and settings.backend not in RESIDENT:
        raise UsageError(
            f"what a mount reads cannot be recorded with the backend {settings.backend}",
            hint="use --backend erofs-fanotify, or auto",
        )
    if os.geteuid() != 0:
        clean_stale(settings.run_dir)
        return start_mount(request, report=report)
    restore(settings.run_dir)
    clean_stale(settings.run_dir)
    if settings.backend in RESIDENT:
        answer: dict[str, Any] = ask_started(
            settings.run_dir, "mount", report=report, request=request.to_json()
        )
        if answer["type"] == "ready":
            return MountInfo(**answer["info"])
        if request.record:
            raise MountError(
                f"recording takes the backend erofs-fanotify, which does not work here: {answer['reason']}",
                hint="veneer doctor says what is missing",
            )
        request = replace(request, settings=replace(settings, backend=str(answer["backend"])))
        if answer["backend"] == "fuse" or settings.backend != "auto":
            report(Notice(f"using the slower backend {answer['backend']}: {answer['reason']}"))
    return start_mount(request, report=report)


def timed_mount(request: MountRequest, *, report: Reporter = silent) -> "tuple[MountInfo, TimingRecord]":
    """Like :func:`mount_image`, with the timing record of the mount."""
    from veneer.daemon.timed import process_timing, timing_of

    timing = process_timing()
    began = time.monotonic()
    timing.add("start-up", timing.began, began)
    info = mount_image(request, report=report)
    timing.add("ask", began, time.monotonic())
    return info, timing_of(info.id, request.settings.run_dir).with_command(timing, ())


def run_image(
    request: RunRequest,
    settings: Settings,
    *,
    recorded: Callable[[MountInfo], None] | None = None,
    report: Reporter = silent,
) -> RunResult:
    """Run a command in a container on an image and wait for it.

    Args:
        request: what to run.
        settings: of the invocation.
        recorded: have the mount record what it reads; called when the command has ended and the mount has not.
        report: notices about the image.

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
    wanted = request.mount(settings, runtime, this_process(), record=recorded is not None)
    info = mount_image(wanted, report=report)
    mounted_s = time.monotonic() - began
    last: MountReport | None = None
    timing: TimingRecord | None = None
    try:
        run = ContainerRun(
            os.fspath(runtime),
            interactive=options.interactive,
            terminal=options.terminal,
            watch_output=request.timing,
        )
        outcome = run.run(info.id, info.bundle or "")
        total_s = time.monotonic() - began
        if recorded is not None:
            recorded(info)
        if request.timing:
            timing = _timing(info, outcome, began, began + mounted_s, settings.run_dir)
    finally:
        last = _end(info, settings.run_dir)
    return RunResult(
        exit_code=outcome.exit_code,
        mounted_s=mounted_s,
        first_output_s=None if outcome.first_output is None else outcome.first_output - began,
        total_s=total_s,
        mount=info,
        report=last,
        timing=timing,
    )


def _timing(info: MountInfo, outcome: Outcome, asked: float, mounted: float, run_dir: Path) -> "TimingRecord":
    """What whoever serves the mount knows, and what is known here."""
    import json

    from veneer.daemon.timed import process_timing, timing_of

    timing = process_timing()
    timing.add("start-up", timing.began, asked)
    timing.add("ask", asked, mounted)
    timing.add("spawn", *outcome.spawning)
    if outcome.first_output is not None:
        timing.mark("first output", outcome.first_output)
    timing.mark("end", outcome.ended)
    config = json.loads((Path(info.bundle or "") / "config.json").read_bytes())
    return timing_of(info.id, run_dir).with_command(timing, config["process"]["args"])


def _end(info: MountInfo, run_dir: Path) -> MountReport | None:
    for record in mount_records(run_dir):
        if record.id == info.id:
            try:
                return stop(record, run_dir).report
            except MountError:
                # Busy: something that left the container uses it still.
                return stop(record, run_dir, lazy=True).report
    return None
