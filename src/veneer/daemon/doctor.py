"""What works on this machine, and what to do about what does not.

Every check looks at the thing itself (opens the device, asks the kernel) and changes nothing. ``fail`` means
that mounting cannot work at all, ``warn`` that something useful cannot, ``info`` is for reports of bugs.
"""

import ctypes
import errno
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.container.runtime import RUNTIMES, find_runtime
from veneer.errors import MountError, VeneerError
from veneer.mount.access import FUSE_CONF, check_fuse, others_allowed
from veneer.mount.erofs import try_erofs
from veneer.mount.erofs_fanotify import try_fanotify
from veneer.settings import Settings

__all__ = ["Check", "examine"]

#: Less room than this and a mounted image of usual size evicts what it has just fetched.
LITTLE_SPACE = 1 << 30
#: A program that only prints its version.
VERSION_TIMEOUT_S = 10.0
#: The daemon has some for itself, a few for each mount, and one for each reader that waits.
FEW_DESCRIPTORS = 4096
#: A daemon takes one group, other programs take some.
FEW_GROUPS = 8
_FANOTIFY_LIMITS = Path("/proc/sys/fs/fanotify")
_LIBFUSE = "libfuse3.so.3"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Args:
        name: what was looked at.
        status: ``ok``, ``info``, ``warn`` or ``fail``.
        detail: what was found.
        hint: what to do, or None.
    """

    name: str
    status: str
    detail: str
    hint: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """The finding by name."""
        return asdict(self)


def examine(settings: Settings) -> list[Check]:
    """All checks, in the order in which their subjects are needed. Blocks."""
    checks: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        _kernel,
        _fuse,
        _other_users,
        _directories,
        _overlay,
        _runtime,
        _user_namespaces,
        _erofs_fuse,
        _erofs_fanotify,
        _limits,
    )
    return [finding for check in checks for finding in check(settings)]


def _kernel(_settings: Settings) -> Iterator[Check]:
    system = platform.system()
    if system != "Linux":
        yield Check("kernel", "fail", f"{system} cannot mount images", "use Linux, or veneer ls and veneer cat")
        return
    yield Check("kernel", "ok", f"Linux {platform.release()} on {platform.machine()}")


def _fuse(_settings: Settings) -> Iterator[Check]:
    try:
        check_fuse()
    except MountError as error:
        yield Check("/dev/fuse", "fail", error.message, error.hint)
    else:
        yield Check("/dev/fuse", "ok", "can be opened")
    try:
        libfuse = ctypes.CDLL(_LIBFUSE)
    except OSError:
        yield Check("libfuse", "fail", f"{_LIBFUSE} cannot be loaded", "install the package libfuse3-3")
    else:
        libfuse.fuse_pkgversion.restype = ctypes.c_char_p
        yield Check("libfuse", "ok", libfuse.fuse_pkgversion().decode())
    helper = shutil.which("fusermount3")
    if helper:
        yield Check("fusermount3", "ok", _version(helper))
    else:
        status = "warn" if os.geteuid() == 0 else "fail"
        yield Check("fusermount3", status, "not installed; only root can mount", "install the package fuse3")


def _other_users(_settings: Settings) -> Iterator[Check]:
    if others_allowed():
        yield Check("allow_other", "ok", "other users can use the mounts")
        return
    yield Check(
        "allow_other",
        "info",
        "only you can use your mounts",
        f"to change that, write user_allow_other into {FUSE_CONF}",
    )


def _directories(settings: Settings) -> Iterator[Check]:
    for name, path, variable in (
        ("cache directory", settings.cache_dir, "VENEER_CACHE_DIR"),
        ("run directory", settings.run_dir, "VENEER_RUN_DIR"),
    ):
        existing = _existing(path)
        if not os.access(existing, os.W_OK | os.X_OK):
            yield Check(name, "fail", f"{path} cannot be written", f"set {variable}, or mend its permissions")
            continue
        room = shutil.disk_usage(existing).free
        detail = f"{path} with {room / (1 << 30):.1f} GiB free"
        if name == "cache directory" and room < LITTLE_SPACE:
            yield Check(name, "warn", detail, f"make room, or set {variable}")
        else:
            yield Check(name, "ok", detail)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _overlay(_settings: Settings) -> Iterator[Check]:
    if os.geteuid() != 0:
        yield Check("overlayfs", "info", "a writable layer needs root", "mounts are read-only for other users")
    elif "overlay" in _filesystems() or _loadable("overlay"):
        yield Check("overlayfs", "ok", "the kernel has it")
    else:
        yield Check("overlayfs", "warn", "the kernel does not have it", "mount with --read-only")


def _runtime(_settings: Settings) -> Iterator[Check]:
    found = False
    for name in RUNTIMES:
        try:
            program = find_runtime(name)
        except VeneerError:
            continue
        found = True
        if name == "crun" and _hybrid_cgroups():
            yield Check(name, "warn", "refuses hosts that mount both versions of cgroups", "use runc")
        else:
            yield Check(name, "ok", _version(os.fspath(program)))
    if not found:
        hint = f"install one of {', '.join(RUNTIMES)}"
        yield Check("container runtime", "warn", "none found; veneer run does not work", hint)
    elif os.geteuid() != 0:
        yield Check("veneer run", "warn", "needs root")


def _user_namespaces(_settings: Settings) -> Iterator[Check]:
    limit = Path("/proc/sys/user/max_user_namespaces")
    count = int(limit.read_text()) if limit.exists() else 0
    yield Check("user namespaces", "info", f"up to {count}" if count else "not available")


def _erofs_fuse(settings: Settings) -> Iterator[Check]:
    name = "backend erofs-fuse"
    if os.geteuid() != 0:
        yield Check(name, "info", "needs root; mounts use the backend fuse")
        return
    try:
        try_erofs(_existing(settings.cache_dir))
    except MountError as error:
        yield Check(name, "info", f"{error.message}; mounts use the backend fuse, which is slower", error.hint)
    else:
        yield Check(name, "ok", "a trial mount worked")


def _erofs_fanotify(settings: Settings) -> Iterator[Check]:
    name = "backend erofs-fanotify"
    if os.geteuid() != 0:
        yield Check(name, "info", "needs root")
        return
    try:
        try_fanotify(_existing(settings.cache_dir))
    except MountError as error:
        yield Check(name, "info", f"{error.message}; mounts use another backend, which is slower", error.hint)
    else:
        yield Check(name, "ok", "a trial mount worked")


def _limits(_settings: Settings) -> Iterator[Check]:
    if os.geteuid() != 0:
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        yield Check(
            "descriptors",
            "info",
            f"the hard limit of open files is {hard}; {hard // 2} readers at most can wait at a time",
            f"raise it to {FEW_DESCRIPTORS} or more where the daemon is started (ulimit -Hn, LimitNOFILE=)",
        )
    path = _FANOTIFY_LIMITS / "max_user_groups"
    if path.exists() and (groups := int(path.read_text())) < FEW_GROUPS:
        yield Check(
            "fanotify", "info", f"only {groups} groups for all programs of root", f"raise the limit in {path}"
        )


def _filesystems() -> set[str]:
    return set(Path("/proc/filesystems").read_text().split())


def _loadable(module: str) -> bool:
    directory = Path("/lib/modules") / platform.release()
    return any(directory.glob(f"kernel/fs/{module}*/{module}.ko*"))


def _hybrid_cgroups() -> bool:
    types = {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    return {"cgroup", "cgroup2"} <= types


def _version(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except OSError as error:
        return f"{program} ({os.strerror(error.errno or errno.EIO)})"
    return f"{program}, {done.stdout.strip().splitlines()[0]}" if done.stdout.strip() else program
