"""What this user may do with FUSE here, and the mount options that follow; without loading libfuse."""

import os
from pathlib import Path

from veneer.errors import MountError
from veneer.mount import kernel

__all__ = ["FUSE_CONF", "FUSE_DEVICE", "check_fuse", "fuse_options", "others_allowed"]

FUSE_CONF = Path("/etc/fuse.conf")
FUSE_DEVICE = Path("/dev/fuse")


def fuse_options(*, root: bool, allow_other: bool) -> set[str]:
    """Mount options: permissions are checked by the kernel, from the attributes in the image."""
    options = {f"fsname={kernel.SOURCE}", "subtype=veneer", "ro", "default_permissions"}
    if root:
        # libfuse masks set-user-ID and device nodes unless told otherwise; a container's root needs them,
        # and the image's metadata policy has decided already which device nodes there are.
        options |= {"suid", "dev"}
    if allow_other:
        options.add("allow_other")
    return options


def others_allowed() -> bool:
    """Whether other users may see a FUSE mount of this user."""
    if os.geteuid() == 0:
        return True
    try:
        lines = FUSE_CONF.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def check_fuse() -> None:
    """Raise MountError unless this user can open the FUSE device."""
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise MountError(
            f"{FUSE_DEVICE} does not exist",
            hint="load the fuse module, or pass --device /dev/fuse to the container",
        ) from error
    except OSError as error:
        raise MountError(
            f"cannot open {FUSE_DEVICE}: {error.strerror}", hint=f"as root: chmod 0666 {FUSE_DEVICE}"
        ) from error
