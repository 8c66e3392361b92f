"""The serving end of a control socket: JSON lines over a unix socket that only its owner may open.

A request is ``{"op": NAME, ...}``; the answer is its result, or ``{"type": "error", ...}``. Operations that
take long may send events (:func:`veneer.events.event_to_json`) before it, a line each.
"""

import contextlib
import json
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import trio

from veneer.daemon.ask import short_path
from veneer.daemon.failure import error_to_json
from veneer.daemon.telling import Tell
from veneer.errors import UsageError, VeneerError

__all__ = ["ClientOperation", "Operation", "listen_in", "serve_control"]

#: What does one operation: the request's members to the answer's.
Operation = Callable[[dict[str, object]], Awaitable[dict[str, object]]]

#: The same for operations that tell how they get on.
ClientOperation = Callable[[dict[str, object], Tell], Awaitable[dict[str, object]]]

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
    for_client: Mapping[str, ClientOperation] = MappingProxyType({}),
) -> None:
    """Answer requests until cancelled. What was asked for by then is done and answered nevertheless.

    Args:
        listener: a control socket; it is closed at the end, its name stays.
        operations: what can be asked for.
        for_client: those that are given up when the client leaves before their end.
    """

    async def serve(stream: trio.SocketStream) -> None:
        # The client may leave whenever it likes.
        with contextlib.suppress(trio.BrokenResourceError):
            await _answer(stream, operations, for_client)

    await trio.serve_listeners(serve, [listener])


async def _answer(
    stream: trio.SocketStream, operations: Mapping[str, Operation], for_client: Mapping[str, ClientOperation]
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
            long = for_client.get(name)
            operation = operations[name] if long is None else None
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join((*operations, *for_client))
            raise UsageError(f"unknown request, expected one of {names}") from error
        if long is not None:
            answer = await _while_connected(stream, long, request)
        elif operation is not None:
            # An operation may end what is served here, and this server with it.
            with trio.CancelScope(shield=True):
                answer = await operation(request)
    except VeneerError as error:
        answer = error_to_json(error)
    with trio.move_on_after(ANSWER_TIMEOUT_S, shield=True):
        await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _while_connected(
    stream: trio.SocketStream, operation: ClientOperation, request: dict[str, object]
) -> dict[str, object]:
    answer: dict[str, object] | None = None
    failure: VeneerError | None = None
    # Without a bound: whoever tells does so a few times a second, and must not wait.
    tells, told = trio.open_memory_channel[dict[str, object]](math.inf)

    async def pass_on() -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # the watcher notices, too
            async for message in told:
                await stream.send_all(json.dumps(message).encode() + b"\n")

    async def watch(scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        async with trio.open_nursery() as telling, tells:
            telling.start_soon(pass_on)
            try:
                answer = await operation(request, tells.send_nowait)
            except VeneerError as error:
                failure = error
            # What was told before goes before the answer.
            telling.cancel_scope.deadline = trio.current_time() + ANSWER_TIMEOUT_S
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
