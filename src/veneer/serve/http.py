"""A small, strict HTTP/1.1 server on h11 and trio, for the embedded registry and nothing else.

It exists because a registry for demonstrations, benchmarks and fault injection must control every byte and
every socket, and because range requests must be served at the speed of the loopback. Not for the open Internet.
"""

import ssl
from collections.abc import Callable

import trio

from veneer.serve.connection import Connection, Limits, RequestRecord, Service
from veneer.serve.message import Handler

__all__ = ["HTTPServer", "Limits", "RequestRecord", "ignore", "open_port"]


def ignore(_record: RequestRecord) -> None:
    """Nobody watches."""


async def open_port(host: str, port: int) -> trio.SocketListener:
    """Listen on one address; port 0 takes a free one. Raises OSError."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    for extra in listeners[1:]:
        await extra.aclose()
    return listeners[0]


class HTTPServer:
    """Serves the connections of one listener until :meth:`stop`.

    ``serve`` belongs to one task; ``stop`` may be called from any task of the same run. For the other
    arguments see :class:`~veneer.serve.connection.Service`.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        on_request: Callable[[RequestRecord], None] = ignore,
        on_response: Callable[[RequestRecord], None] = ignore,
    ) -> None:
        self._service = Service(handler, tls, limits or Limits(), on_request, on_response)
        self._accepting = trio.CancelScope()
        self._grace_s = 0.0
        self._connections = 0
        self._none_left = trio.Event()

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more, close idle connections, and the others when they are done or after ``grace_s``."""
        self._grace_s = grace_s
        self._service.stopping = True
        self._accepting.cancel()
        for scope in self._service.idle:
            scope.cancel()

    async def serve(self, listener: trio.SocketListener) -> None:
        """Serve until stopped or cancelled; closes the listener."""
        async with trio.open_nursery() as nursery:
            with self._accepting:
                await trio.serve_listeners(self._connect, [listener], handler_nursery=nursery)
            with trio.move_on_after(self._grace_s):
                while self._connections:
                    self._none_left = trio.Event()
                    await self._none_left.wait()
            nursery.cancel_scope.cancel()

    async def _connect(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            await Connection(self._service, stream).run()
        finally:
            self._connections -= 1
            if not self._connections:
                self._none_left.set()
