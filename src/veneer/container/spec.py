"""The OCI runtime bundle of an image: ``config.json`` from the image config and what the user says.

Written for version 1.0.2 of the runtime specification, which every runc and crun reads. What the image leaves
open is as in Docker: capabilities, masked paths and mounts. Two things differ on purpose: the network is the
host's unless asked otherwise, since nothing here sets up another one; and there is no seccomp profile, since
one that fits has to know runtime and kernel. Volumes that an image declares are ordinary directories here.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from veneer.container.options import ContainerOptions
from veneer.container.users import ContainerUser
from veneer.errors import UsageError
from veneer.oci.canonical import canonical_json
from veneer.oci.config import ImageConfig

__all__ = ["command_of", "environment_of", "runtime_spec", "write_bundle"]

Spec = dict[str, object]

OCI_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What Docker gives to a container: enough for packages to be installed, not for the host to be changed.
CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
#: Kernel interfaces that tell about, or act on, the host.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
#: What programs on the host's network need to find others by name.
NETWORK_FILES = ("/etc/hosts", "/etc/resolv.conf")
_UNIFIED_CGROUPS = Path("/sys/fs/cgroup/cgroup.controllers")


def runtime_spec(
    config: ImageConfig, options: ContainerOptions, user: ContainerUser, *, root: str, name: str
) -> Spec:
    """The contents of ``config.json``.

    Args:
        config: of the image.
        options: what the user says.
        user: whom the process runs as; see :func:`~veneer.container.users.find_user`.
        root: path of the root file system, relative to the bundle or absolute.
        name: of the container.

    Raises:
        UsageError: neither the image nor the user says what to run.
    """
    hostname = options.hostname or (socket.gethostname() if options.network == "host" else name[:12])
    environment = environment_of(config, options.environment)
    environment.setdefault("HOSTNAME", hostname)
    environment.setdefault("HOME", user.home)
    if options.terminal:
        environment.setdefault("TERM", "xterm")
    namespaces = ["pid", "ipc", "uts", "mount"]
    if options.network == "none":
        namespaces.append("network")
    if _UNIFIED_CGROUPS.exists():
        namespaces.append("cgroup")
    identity: Spec = {"uid": user.uid, "gid": user.gid}
    if user.groups:
        identity["additionalGids"] = list(user.groups)
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": options.terminal,
            "user": identity,
            "args": list(command_of(config, options)),
            "env": [f"{key}={value}" for key, value in environment.items()],
            "cwd": os.path.join("/", options.working_dir or config.working_dir),
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": False,
        },
        "root": {"path": root, "readonly": options.read_only},
        "hostname": hostname,
        "mounts": _mounts(options),
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READ_ONLY_PATHS),
        },
    }


def command_of(config: ImageConfig, options: ContainerOptions) -> tuple[str, ...]:
    """What to execute: arguments replace the image's cmd, an entrypoint replaces entrypoint and cmd."""
    if options.entrypoint is not None:
        command = options.entrypoint + options.arguments
    else:
        command = config.entrypoint + (options.arguments or config.cmd)
    if not command:
        raise UsageError("the image does not say what to run", hint="give a command: veneer run IMAGE -- CMD")
    return command


def environment_of(config: ImageConfig, changes: Mapping[str, str]) -> dict[str, str]:
    """The image's variables in their order, with changes in place and additions behind."""
    environment = {"PATH": DEFAULT_PATH}
    for item in config.env:
        key, _, value = item.partition("=")
        environment[key] = value
    return environment | dict(changes)


def write_bundle(directory: Path, spec: Mapping[str, object]) -> None:
    """Write ``config.json`` into an existing directory, whole or not at all. Blocks."""
    try:
        data = canonical_json(spec)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the runtime takes UTF-8 only, unlike {error.object[error.start - 20 : error.end]!r}"
        ) from error
    draft = directory / ".config.json.new"
    draft.write_bytes(data)
    draft.replace(directory / "config.json")


def _mounts(options: ContainerOptions) -> list[Spec]:
    guarded = ["nosuid", "noexec", "nodev"]
    pty = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    mounts = [
        _mount("/proc", "proc", "proc", *guarded),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", *pty),
        _mount("/dev/shm", "tmpfs", "shm", *guarded, "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *guarded),
        _mount("/sys", "sysfs", "sysfs", *guarded, "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", *guarded, "relatime", "ro"),
    ]
    if options.network == "host":
        mounts += [_bind(os.path.realpath(path), path, "ro") for path in NETWORK_FILES if os.path.exists(path)]
    mounts += [
        _bind(os.fspath(volume.source), volume.destination, "ro" if volume.read_only else "rw")
        for volume in options.volumes
    ]
    return mounts


def _mount(destination: str, fstype: str, source: str, *options: str) -> Spec:
    return {"destination": destination, "type": fstype, "source": source, "options": list(options)}


def _bind(source: str, destination: str, mode: str) -> Spec:
    return _mount(destination, "bind", source, "rbind", "rprivate", mode)
