"""The OCI runtimes that can run a bundle here."""

import shutil
import subprocess
from pathlib import Path

from veneer.errors import MountError, UsageError

__all__ = ["RUNTIMES", "delete_container", "find_runtime"]

#: In the order they are tried. runc first: crun refuses hosts with both versions of cgroups mounted.
RUNTIMES = ("runc", "crun")
#: Killing a container and removing its cgroups takes well under a second.
DELETE_TIMEOUT_S = 30.0
#: Where runtimes are when a user's PATH leaves the administrator's programs out.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_runtime(name: str | None = None) -> Path:
    """The program of the runtime called ``name``, or of the first that is installed."""
    for candidate in (name,) if name else RUNTIMES:
        if found := shutil.which(candidate) or shutil.which(candidate, path=_SYSTEM_PATH):
            return Path(found)
    if name:
        raise UsageError(
            f"container runtime {name!r} not found", hint="install it, or name another with --runtime"
        )
    raise MountError("no container runtime found", hint=f"install one of {', '.join(RUNTIMES)}")


def delete_container(runtime: str, name: str) -> None:
    """Kill what is left of a container and forget it. Blocks; a container that is gone is no error."""
    subprocess.run(
        [runtime, "delete", "--force", name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DELETE_TIMEOUT_S,
        check=False,
    )
