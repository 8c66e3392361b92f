"""Running a command in a container to learn what it reads."""

import json
from dataclasses import replace
from pathlib import Path

from veneer.daemon.ask import DAEMON_SOCKET, ask
from veneer.daemon.client import RunRequest, RunResult, run_image
from veneer.daemon.request import RECORDED, MountInfo
from veneer.errors import MountError
from veneer.events import Notice, Reporter, silent
from veneer.mount.state import directory_of
from veneer.prefetch.profile import MAX_USES, Profile, check_workload
from veneer.settings import Settings

__all__ = ["record_image"]


def record_image(
    request: RunRequest, settings: Settings, workload: str, *, report: Reporter = silent
) -> tuple[RunResult, Profile]:
    """Run a command in a container on an image, and note every range that its mount reads.

    Returns how the run went, and the profile. A command that fails has read something nevertheless.

    Raises:
        UsageError: the settings name another backend than the one that can record.
        MountError: that one does not work here, or nothing was read.
        VeneerError: the command could not be started.
    """
    check_workload(workload)
    found: list[Profile] = []

    def fetch(info: MountInfo) -> None:
        answer = ask(settings.run_dir, DAEMON_SOCKET, "recorded", id=info.id)
        profile = Profile.parse((directory_of(settings.run_dir, info.id) / RECORDED).read_bytes())
        found.append(replace(profile, workload=workload, command=_command(info)))
        if answer["shared"]:
            report(
                Notice(
                    "other mounts have layers of this image as well: what they read meanwhile is in the "
                    "profile, too; record again without them"
                )
            )
        if answer["lost"]:
            report(Notice(f"the profile ends after {MAX_USES} ranges; {answer['lost']} reads are not in it"))

    result = run_image(request, settings, recorded=fetch, report=report)
    (profile,) = found
    if not profile.uses:
        raise MountError("nothing was read from the image", hint="see whether the command was started at all")
    if result.exit_code:
        report(Notice(f"the command ended with {result.exit_code}; what it read is recorded nevertheless"))
    return result, profile


def _command(info: MountInfo) -> tuple[str, ...]:
    """What ran, as the bundle says."""
    process = json.loads((Path(info.bundle or "") / "config.json").read_bytes())["process"]
    return tuple(process["args"])
