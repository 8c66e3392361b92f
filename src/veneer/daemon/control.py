"""The serving end of a control socket: JSON lines over a unix socket that only its owner may open.

A request is ``{"op": NAME, ...}``; the answer is its result, or ``{"type": "error", ...}``.
"""

import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

import trio

from veneer.daemon.ask import short_path
from veneer.daemon.failure import error_to_json
from veneer.errors import UsageError, VeneerError

__all__ = ["Operation", "listen_in", "serve_control"]

#: What does one operation: the request's members to the answer's.
Operation = Callable[[dict[str, object]], Awaitable[dict[str, object]]]

#: Requests are a few words, and the environment of a container.
MAX_REQUEST = 1 << 20
#: A client that connects and says nothing is not waited for longer.
REQUEST_TIMEOUT_S = 30.0
#: Nor one that asks and then does not read.
ANSWER_TIMEOUT_S = 5.0


def listen_in(directory: Path, name: str) -> trio.SocketListener:
    """A new control socket. Raises OSError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(directory, name) as path:
        listening.bind(path)
    (directory / name).chmod(0o600)
    listening.listen()
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


async def serve_control(
    listener: trio.SocketListener,
    operations: Mapping[str, Operation],
    *,
    for_client: Collection[str] = (),
) -> None:
    """Answer requests until cancelled. What was asked for by then is done and answered nevertheless.

    Args:
        listener: a control socket; it is closed at the end, its name stays.
        operations: what can be asked for.
        for_client: names of the operations that are given up when the client leaves before their end.
    """

    async def serve(stream: trio.SocketStream) -> None:
        # The client may leave whenever it likes.
        with contextlib.suppress(trio.BrokenResourceError):
            await _answer(stream, operations, for_client)

    await trio.serve_listeners(serve, [listener])


async def _answer(
    stream: trio.SocketStream, operations: Mapping[str, Operation], for_client: Collection[str]
) -> None:
    line = None
    with trio.move_on_after(REQUEST_TIMEOUT_S):
        line = await _line(stream)
    if line is None:
        return
    try:
        try:
            request = json.loads(line)
            name = request["op"]
            operation = operations[name]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"unknown request, expected one of {', '.join(operations)}") from error
        if name in for_client:
            answer = await _while_connected(stream, operation, request)
        else:
            # An operation may end what is served here, and this server with it.
            with trio.CancelScope(shield=True):
                answer = await operation(request)
    except VeneerError as error:
        answer = error_to_json(error)
    with trio.move_on_after(ANSWER_TIMEOUT_S, shield=True):
        await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _while_connected(
    stream: trio.SocketStream, operation: Operation, request: dict[str, object]
) -> dict[str, object]:
    answer: dict[str, object] | None = None
    failure: VeneerError | None = None

    async def watch(scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        try:
            answer = await operation(request)
        except VeneerError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if answer is None:
        raise trio.BrokenResourceError("the client has left")
    return answer


async def _line(stream: trio.SocketStream) -> bytes | None:
    data = bytearray()
    while b"\n" not in data:
        chunk = await stream.receive_some()
        data += chunk
        if not chunk or len(data) > MAX_REQUEST:
            return None
    return bytes(data.partition(b"\n")[0])
