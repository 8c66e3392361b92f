"""A server on loopback that does on the wire exactly what a test says, faults included."""

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

__all__ = ["Handler", "Seen", "Server", "Wire", "serve"]


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def span(self) -> tuple[int, int] | None:
        """The bytes that a Range header asks for: first, and one past the last."""
        value = self.headers.get("range")
        if value is None:
            return None
        first, last = value.removeprefix("bytes=").split("-")
        return int(first), int(last) + 1


class Wire:
    """The answering end of one connection."""

    def __init__(self, stream: trio.abc.Stream, raw: trio.SocketStream, method: str) -> None:
        self._stream = stream
        self._raw = raw
        self._method = method
        self.open = True

    async def send(self, data: bytes) -> None:
        """Raw bytes."""
        await self._stream.send_all(data)

    async def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """A whole answer; ``length`` announces another length than that of ``body``."""
        items = list(headers.items() if isinstance(headers, Mapping) else headers or [])
        size = len(body) if length is None else length
        head = [
            f"HTTP/1.1 {status} X",
            *(f"{name}: {value}" for name, value in items),
            f"Content-Length: {size}",
        ]
        await self.send("\r\n".join([*head, "", ""]).encode() + (b"" if self._method == "HEAD" else body))

    async def close(self) -> None:
        """End the connection in an orderly way."""
        self.open = False
        await self._stream.aclose()

    async def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.open = False
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._raw.socket.close()


Handler = Callable[[Seen, Wire], Awaitable[None]]


@dataclass
class Server:
    """``host`` is ``127.0.0.1:PORT``; ``connections`` counts those that sent at least one HTTP request."""

    host: str
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0

    @property
    def lines(self) -> list[str]:
        """Method and path of each request."""
        return [f"{request.method} {request.path}" for request in self.seen]


@asynccontextmanager
async def serve(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Answer every request with ``handler``, one after the other on each connection."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = Server(f"127.0.0.1:{listener.socket.getsockname()[1]}")

    async def connection(raw: trio.SocketStream) -> None:
        stream: trio.abc.Stream = raw
        if tls is not None:
            stream = trio.SSLStream(raw, tls, server_side=True, https_compatible=True)
        try:
            first = True
            while (seen := await _read(stream)) is not None:
                server.connections += first
                first = False
                server.seen.append(seen)
                wire = Wire(stream, raw, seen.method)
                await handler(seen, wire)
                if not wire.open:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, connection, [listener])
        yield server
        nursery.cancel_scope.cancel()


async def _read(stream: trio.abc.Stream) -> Seen | None:
    """The next request; None at the end, and for what is no HTTP (a TLS greeting), which gets a 400."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        if not more:
            return None
        if not (data + bytes(more))[:1].isalpha():
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    line, *rest = head.decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (item.partition(":") for item in rest)}
    while len(body) < int(headers.get("content-length", "0")):
        more = await stream.receive_some(65536)
        if not more:
            return None
        body += more
    return Seen(method, target, headers, body)
