"""One daemon a run directory: the lock that says so, its socket, and the file that says who it is.

Standard library only, and little of it: the supervisor imports this.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
from collections.abc import Mapping

__all__ = ["HINT", "LOG", "SOCKET", "RefusedRunDirectory", "known_log", "listen", "lock", "publish", "withdraw"]

#: Names in the run directory. The lock is held by every process of the daemon, through one open file.
SOCKET, LOG = "daemon.sock", "daemon.log"
_LOCK, _STATUS = "daemon.lock", "daemon.json"
#: Connections that wait while a worker is being started; as many as the kernel allows by default.
_BACKLOG = 4096
HINT = "set VENEER_RUN_DIR to a directory of your own"


class RefusedRunDirectory(Exception):
    """The run directory cannot be trusted."""


def lock(run_dir: str) -> int | None:
    """Make the run directory ours. Returns the lock, or None when a daemon has it.

    Raises RefusedRunDirectory when somebody else could write there, and OSError.
    """
    os.makedirs(os.path.dirname(run_dir), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(run_dir, 0o700)
    status = os.stat(run_dir)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedRunDirectory(f"the run directory {run_dir} belongs to, or can be written by, another user")
    fd = os.open(os.path.join(run_dir, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def known_log(path: str) -> str:
    """Where to look for what a daemon logs to ``path``, which one in the foreground does not do."""
    if os.path.exists(path):
        return path
    return "on the standard error of the daemon (under systemd: journalctl -u veneer)"


def listen(run_dir: str) -> socket.socket:
    """The daemon's socket, for its owner only; only for who has the lock. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(run_dir, SOCKET))  # of a daemon that died
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # An address has 107 bytes and a run directory may have more.
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    umask = os.umask(0o177)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{SOCKET}")
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
        os.close(directory)
    return listener


def publish(run_dir: str, status: Mapping[str, object]) -> None:
    """Replace what the daemon says about itself. Raises OSError."""
    draft = os.path.join(run_dir, f".{_STATUS}.{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(status, file)
    os.replace(draft, os.path.join(run_dir, _STATUS))


def withdraw(run_dir: str, *, own_socket: bool) -> None:
    """Remove what :func:`publish` wrote, and the socket if :func:`listen` made it. Raises OSError."""
    for name in (_STATUS, *([SOCKET] if own_socket else [])):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(run_dir, name))
