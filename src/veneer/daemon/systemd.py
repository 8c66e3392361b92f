"""The service manager's side of a daemon: descriptors that it passes and keeps, and what it is told.

sd_listen_fds(3) and sd_notify(3), by hand. Without a service manager there is nothing passed, and telling does
nothing. Standard library only, and little of it: the supervisor imports this.
"""

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Manager", "notify", "take_environment"]

_FIRST_FD = 3
#: The manager reads quickly; whoever binds its socket without reading does not stop a daemon.
_TIMEOUT_S = 5.0


class Manager(NamedTuple):
    """What the environment says about the service manager.

    Args:
        fds: what it passed, by name.
        address: where :func:`notify` sends to; None without a manager.
        watchdog_s: it wants to hear ``WATCHDOG=1`` at least this often; None if it does not.
    """

    fds: dict[str, int]
    address: str | None
    watchdog_s: float | None


def take_environment() -> Manager:
    """Read the variables, and remove them: programs started from here are not meant."""
    take = {
        name: os.environ.pop(name, "")
        for name in (
            "LISTEN_PID",
            "LISTEN_FDS",
            "LISTEN_FDNAMES",
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
            "WATCHDOG_PID",
        )
    }
    fds: dict[str, int] = {}
    if take["LISTEN_PID"] == str(os.getpid()):
        names = take["LISTEN_FDNAMES"].split(":")
        for number, name in zip(range(int(take["LISTEN_FDS"] or 0)), names, strict=False):
            os.set_inheritable(_FIRST_FD + number, False)
            fds.setdefault(name, _FIRST_FD + number)
    watched = take["WATCHDOG_USEC"].isdigit() and take["WATCHDOG_PID"] in ("", str(os.getpid()))
    return Manager(fds, take["NOTIFY_SOCKET"] or None, int(take["WATCHDOG_USEC"]) / 1e6 if watched else None)


def notify(address: str | None, *lines: str, fds: Sequence[int] = ()) -> None:
    """Tell the service manager. Raises OSError when it cannot be told."""
    if address is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        message = "\n".join(lines).encode()
        if fds:
            socket.send_fds(sender, [message], fds)
        else:
            sender.send(message)
