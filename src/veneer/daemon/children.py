"""What a supervisor knows of the processes that it runs, and when it starts them again.

Standard library only, and little of it: the supervisor imports this.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from veneer.daemon.process import Process

__all__ = ["MAX_MESSAGE", "BackOff", "News", "Standby", "Worker", "news_until_death"]

#: Messages are a line; one that explains an error is a few.
MAX_MESSAGE = 64 << 10
#: What dies is started again at once, then after 0.1 s, and so on up to 5 s; what lived for 60 s begins anew.
FIRST_DELAY_S, MAX_DELAY_S, LONG_LIFE_S = 0.1, 5.0, 60.0


class Worker:
    """A worker that runs, whoever started it.

    Args:
        process: the worker.
        link: our end of the socket to it. Closing it would tell the worker that both supervisors are dead.
    """

    __slots__ = ("link", "mute", "process", "ready", "silent", "since")

    def __init__(self, process: Process, link: socket.socket, *, ready: bool = False) -> None:
        link.setblocking(False)
        self.process = process
        self.link = link
        self.ready = ready
        #: Whether it has closed its end. It will be found silent, if it is not dead.
        self.mute = False
        #: Ticks since it said something.
        self.silent = 0
        self.since = time.monotonic()

    def hear(self) -> Mapping[str, object] | None:
        """One message; an empty one if it is nonsense, None if there is none. Does not wait."""
        try:
            data = self.link.recv(MAX_MESSAGE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.mute = True
            return None
        try:
            message = json.loads(data)
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def forget(self) -> None:
        """Let go of a worker that is dead."""
        self.process.close()
        self.link.close()


class News(NamedTuple):
    """What a standby has to know that can change after its fork.

    Args:
        worker: pid of the worker.
        restarts: how many workers have died.
        stopping: whether the daemon was told to end.
    """

    worker: int | None
    restarts: int
    stopping: bool


class Standby:
    """The standby as the primary has it.

    Args:
        process: the standby.
        link: where it is told things; None for that of an earlier image of this process.
    """

    __slots__ = ("_link", "process", "since")

    def __init__(self, process: Process, link: socket.socket | None) -> None:
        if link is not None:
            link.setblocking(False)
        self.process = process
        self._link = link
        self.since = time.monotonic()

    def tell(self, news: News, fds: Sequence[int]) -> None:
        """Tell it, even if this process dies at once; with pidfd and link of a new worker. Raises OSError."""
        if self._link is not None:
            socket.send_fds(self._link, [json.dumps(news._asdict()).encode()], fds)

    def end(self) -> None:
        """Kill it: there is nothing that it would have to finish, and it must not take over."""
        self.process.send(signal.SIGKILL)
        self.bury()

    def bury(self) -> None:
        """Let go of a child that is dead."""
        self.process.reap()
        self.forget()

    def forget(self) -> None:
        """Let go of it, whatever it does."""
        self.process.close()
        if self._link is not None:
            self._link.close()


def news_until_death(primary: int, link: socket.socket) -> Iterator[tuple[News, list[int]]]:
    """In the standby: what :meth:`Standby.tell` sends, all of it, until the process of the pidfd has died."""
    link.setblocking(False)
    poller = select.poll()
    poller.register(link, select.POLLIN)
    poller.register(primary, select.POLLIN)
    died = False
    while not died:
        died = primary in [fd for fd, _ in poller.poll()]
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(link, MAX_MESSAGE, 2)
            except BlockingIOError:
                break
            except OSError:
                data, fds = b"", []
            if not data:
                if not died:
                    poller.unregister(link)  # the primary executes itself anew, or is dying
                    died = bool(poller.poll())
                break
            for fd in fds:
                os.set_inheritable(fd, False)
            yield News(**json.loads(data)), fds


class BackOff:
    """When to start again what has died."""

    def __init__(self) -> None:
        self.at = 0.0
        self._delay = 0.0

    def died(self, since: float) -> float:
        """Note the death of what was started at ``since``; returns the delay, in seconds."""
        now = time.monotonic()
        delay = 0.0 if now - since >= LONG_LIFE_S else self._delay
        self._delay = min(max(FIRST_DELAY_S, 2 * delay), MAX_DELAY_S)
        self.at = now + delay
        return delay
