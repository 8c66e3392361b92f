"""The OCI runtimes that can run a bundle here."""

import os
import shutil
import subprocess
from pathlib import Path

from veneer.errors import MountError, UsageError

__all__ = ["RUNTIMES", "delete_container", "find_runtime", "may_be_left"]

#: In the order they are tried. runc first: crun refuses hosts with both versions of cgroups mounted.
RUNTIMES = ("runc", "crun")
#: What has been found before, by name and path; those who ask are few. Looking takes some calls a directory.
_found: dict[tuple[str | None, str], Path] = {}
#: Killing a container and removing its cgroups takes well under a second.
DELETE_TIMEOUT_S = 30.0
#: Where runtimes keep a directory for each container of root's.
_STATES = {"runc": "/run/runc", "crun": "/run/crun"}
#: Where runtimes are when a user's PATH leaves the administrator's programs out.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_runtime(name: str | None = None, path: str | None = None) -> Path:
    """The program of the runtime called ``name``, or of the first that is installed.

    ``path`` is to be searched in place of this process's PATH.
    """
    if path is not None and (known := _found.get((name, path))) is not None and os.access(known, os.X_OK):
        return known
    for candidate in (name,) if name else RUNTIMES:
        if found := shutil.which(candidate, path=path) or shutil.which(candidate, path=_SYSTEM_PATH):
            if path is not None:
                _found[name, path] = Path(found)
            return Path(found)
    if name:
        raise UsageError(
            f"container runtime {name!r} not found", hint="install it, or name another with --runtime"
        )
    raise MountError("no container runtime found", hint=f"install one of {', '.join(RUNTIMES)}")


def may_be_left(runtime: str, name: str) -> bool:
    """Whether a container may be there still, once its runtime has ended. Asks no program."""
    kept = _STATES.get(os.path.basename(runtime))
    return kept is None or os.path.lexists(os.path.join(kept, name))


def delete_container(runtime: str, name: str) -> None:
    """Kill what is left of a container and forget it. Blocks; a container that is gone is no error.

    Nor is one that cannot be had gone: whatever else is to be cleaned up must not wait for it.
    """
    try:
        subprocess.run(
            [runtime, "delete", "--force", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DELETE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        import logging  # here: commands do without

        logging.getLogger(__name__).warning("container not deleted name=%s cause=%r", name, str(error))
