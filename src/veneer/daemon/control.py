"""The control socket of a mount's process: JSON lines over a unix socket in the mount's directory.

A request is ``{"op": NAME, ...}``; the answer is its result, or ``{"type": "error", ...}``. Whoever may open
the socket (its owner) may ask anything. Paths of sockets are limited to 107 bytes and run directories are not,
so both ends go through a file descriptor of the directory.
"""

import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import trio

from veneer.daemon.request import error_from_json, error_to_json
from veneer.errors import MountError, UsageError, VeneerError

__all__ = ["Operation", "ask", "serve_control"]

#: What does one operation: the request's members to the answer's.
Operation = Callable[[dict[str, object]], Awaitable[dict[str, object]]]

_NAME = "control.sock"
#: Requests are a few words; answers name every layer.
MAX_REQUEST, MAX_ANSWER = 64 << 10, 16 << 20
#: A client that connects and says nothing is not waited for longer.
REQUEST_TIMEOUT_S = 30.0
#: Nor one that asks and then does not read.
ANSWER_TIMEOUT_S = 5.0


async def serve_control(
    directory: Path,
    operations: Mapping[str, Operation],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled; started once the socket exists."""

    async def serve(stream: trio.SocketStream) -> None:
        # The client may leave whenever it likes.
        with contextlib.suppress(trio.BrokenResourceError):
            await _answer(stream, operations)

    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(directory) as path:
        await listening.bind(path)
    (directory / _NAME).chmod(0o600)
    listening.listen()
    task_status.started()
    # The socket goes with its directory, which may have another name by then.
    await trio.serve_listeners(serve, [trio.SocketListener(listening)])


async def _answer(stream: trio.SocketStream, operations: Mapping[str, Operation]) -> None:
    line = None
    with trio.move_on_after(REQUEST_TIMEOUT_S):
        line = await _line(stream, MAX_REQUEST)
    if line is None:
        return
    # What was asked for is done and answered even if it ends the mount, and this server with it.
    with trio.CancelScope(shield=True):
        try:
            try:
                request = json.loads(line)
                operation = operations[request["op"]]
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(f"unknown request, expected one of {', '.join(operations)}") from error
            answer = await operation(request)
        except VeneerError as error:
            answer = error_to_json(error)
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            await stream.send_all(json.dumps(answer).encode() + b"\n")


async def ask(directory: Path, op: str, **arguments: object) -> dict[str, object]:
    """Ask the process whose mount is in ``directory``. Raises its error, or MountError if it is not there."""
    client = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    async with trio.SocketStream(client) as stream:
        try:
            with _short(directory) as path:
                await client.connect(path)
            await stream.send_all(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = await _line(stream, MAX_ANSWER)
        except (OSError, trio.BrokenResourceError) as error:
            raise MountError(f"the process of the mount in {directory} does not answer: {error}") from error
    if line is None:
        raise MountError(f"the process of the mount in {directory} closed the connection")
    answer: dict[str, object] = json.loads(line)
    if answer.get("type") == "error":
        raise error_from_json(answer)
    return answer


async def _line(stream: trio.SocketStream, limit: int) -> bytes | None:
    data = bytearray()
    while b"\n" not in data:
        chunk = await stream.receive_some()
        data += chunk
        if not chunk or len(data) > limit:
            return None
    return bytes(data.partition(b"\n")[0])


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_NAME}"
    finally:
        os.close(fd)
