"""Asking the process behind a control socket: one request, one answer, as JSON lines; maybe events before it.

Without an event loop, which would take longer to import than most answers take to come. Paths of sockets are
limited to 107 bytes and run directories are not, so both ends go through a file descriptor of the directory.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from veneer.daemon.failure import error_from_json
from veneer.errors import MountError
from veneer.events import Reporter, event_from_json, silent
from veneer.waiting import wait_readable

__all__ = ["DAEMON_SOCKET", "MOUNT_SOCKET", "Refused", "Request", "Unanswered", "ask", "short_path"]

#: Names of sockets: of the daemon, in the run directory; of a mount's own process, in the mount's directory.
DAEMON_SOCKET, MOUNT_SOCKET = "daemon.sock", "control.sock"
#: Answers name every layer of every mount.
MAX_ANSWER = 16 << 20
_CHUNK = 64 << 10


class Refused(MountError):
    """Nobody listens on the socket."""


class Unanswered(MountError):
    """Whoever took the question on ended before it answered."""


class Request:
    """One request that has been sent; the answer is asked for apart, so that many can be under way.

    Args:
        directory: where the socket is.
        name: of the socket.
        op: what is asked for.
        arguments: of that.

    Raises:
        Refused: nobody listens there.
        Unanswered: the connection broke.
    """

    def __init__(self, directory: Path, name: str, op: str, **arguments: object) -> None:
        self._what = f"{directory / name}"
        self._data = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                with short_path(directory, name) as path:
                    self._socket.connect(path)
            except OSError as error:
                raise Refused(f"nobody listens on {self._what}: {error.strerror}") from error
            try:
                self._socket.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            except OSError as error:
                raise Unanswered(f"{self._what} does not take requests: {error.strerror}") from error
        except BaseException:
            self._socket.close()
            raise

    def answer(self, timeout_s: float | None = None, report: Reporter = silent) -> dict[str, object]:
        """Wait for the answer. Raises the error that it is, Unanswered without one, or TimeoutError.

        Events that come before it are reported.
        """
        try:
            while (line := self._line(timeout_s)) is not None:
                answer: dict[str, object] = json.loads(line)
                if (event := event_from_json(answer)) is None:
                    break
                report(event)
        except TimeoutError:
            raise
        except OSError as error:
            raise Unanswered(f"{self._what} does not answer: {error.strerror}") from error
        finally:
            self._socket.close()
        if line is None:
            raise Unanswered(f"{self._what} closed the connection without an answer", hint="see its log")
        if answer.get("type") == "error":
            raise error_from_json(answer)
        return answer

    def _line(self, timeout_s: float | None) -> bytes | None:
        data = self._data
        while (end := data.find(b"\n")) < 0:
            if not wait_readable(self._socket.fileno(), timeout_s):
                raise TimeoutError
            chunk = self._socket.recv(_CHUNK)
            data += chunk
            if not chunk or len(data) > MAX_ANSWER:
                return None
        line = bytes(data[:end])
        del data[: end + 1]
        return line


def ask(
    directory: Path,
    name: str,
    op: str,
    *,
    timeout_s: float | None = None,
    report: Reporter = silent,
    **arguments: object,
) -> dict[str, object]:
    """Send a request and wait for its answer. Raises what :class:`Request` and its answer do."""
    return Request(directory, name, op, **arguments).answer(timeout_s, report)


@contextlib.contextmanager
def short_path(directory: Path, name: str) -> Iterator[str]:
    """A path of a socket that is short enough for the kernel, for the time of the context. Raises OSError."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
