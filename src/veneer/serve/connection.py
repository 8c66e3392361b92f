"""One connection of the HTTP server: requests are parsed, handed on, and answered, one after another.

Invariants: every wait on the client has a deadline; memory is bounded; a body that ends short ends the
connection, so that no client can take it for complete. Ranges of files go out by ``sendfile`` where no TLS is
in between: the bytes never enter this process.
"""

import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

import h11
import trio

from veneer.serve.message import (
    Body,
    Disconnect,
    FileRange,
    Handler,
    Headers,
    Request,
    Response,
    Stream,
    body_length,
    push_body,
    read_file,
)

__all__ = ["Connection", "Limits", "RequestRecord", "Service"]

#: Bytes asked of the socket at a time; a large upload needs few turns of the event loop.
RECEIVE_SIZE = 256 << 10
#: Bytes handed to one sendfile call, so that one connection cannot starve the loop.
SENDFILE_SIZE = 1 << 20
#: Up to here one copy is cheaper than one more packet.
SEND_TOGETHER = 16 << 10
#: Request line and headers together; presigned URLs and bearer tokens take a few KiB each.
MAX_HEAD = 64 << 10
#: An unread request body is read and dropped up to here to keep the connection, and not beyond.
MAX_DRAIN = 1 << 20
#: Seconds for a client to take in an answer while it still sends what nobody will read.
LINGER_S = 2.0

#: What a connection ends with when the other side is gone, late or not speaking HTTP.
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that the server waits for its client at each step."""

    idle_s: float = 75.0
    head_s: float = 30.0
    receive_s: float = 60.0
    send_s: float = 60.0


@dataclass(slots=True)
class RequestRecord:
    """What was asked and what was answered; the last two members change while the answer goes out.

    ``bytes_sent`` counts body bytes handed to the kernel; ``status`` is 0 until a response has begun.
    """

    method: str
    path: str
    query: str
    headers: Headers
    range: str | None
    status: int = 0
    bytes_sent: int = 0

    def header(self, name: str) -> str | None:
        """The first request header of that name in lower case, or None."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(slots=True)
class Service:
    """What all connections of a server share.

    ``on_request`` is called when a request head has arrived, ``on_response`` when its response ended, however
    it ended. ``idle`` holds the scopes of connections that wait for a request and may be cancelled any time.
    """

    handler: Handler
    tls: ssl.SSLContext | None
    limits: Limits
    on_request: Callable[[RequestRecord], None]
    on_response: Callable[[RequestRecord], None]
    stopping: bool = False
    idle: set[trio.CancelScope] = field(default_factory=set)


@dataclass(slots=True)
class _RequestBody:
    """Iterates over the body of the current request; sends 100 Continue when somebody wants to read it."""

    connection: "Connection"
    #: Bytes that are still to come, or None when only the end will tell.
    left: int | None
    ended: bool = False

    @property
    def droppable(self) -> bool:
        """Whether what is left is known to be little enough to read it for nothing."""
        return self.ended or (self.left is not None and self.left <= MAX_DRAIN)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.ended:
            raise StopAsyncIteration
        connection = self.connection
        if connection.protocol.they_are_waiting_for_100_continue:
            go_ahead = h11.InformationalResponse(status_code=100, headers=[])
            await connection.send(connection.protocol.send(go_ahead) or b"")
        event = await connection.next_event(connection.service.limits.receive_s)
        if isinstance(event, h11.Data):
            if self.left is not None:
                self.left -= len(event.data)
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            self.ended = True
            raise StopAsyncIteration
        raise Disconnect


class Connection:
    """One client connection: requests one after another. Owned by one task."""

    def __init__(self, service: Service, transport: trio.SocketStream) -> None:
        self.service = service
        self.protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._transport = transport
        self._stream: trio.abc.Stream = transport
        if service.tls is not None:
            self._stream = trio.SSLStream(transport, service.tls, server_side=True, https_compatible=True)

    async def run(self) -> None:
        """Serve requests until either side ends the connection."""
        try:
            while await self._exchange():
                self.protocol.start_next_cycle()
            await self._close()
        except Disconnect as end:
            if end.reset:
                linger = struct.pack("ii", 1, 0)
                self._transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except _GONE:
            pass
        finally:
            # Not the TLS stream: a connection that ends here ends without the politeness of close_notify.
            self._transport.socket.close()

    async def next_event(self, timeout_s: float) -> h11.Event | type[h11.PAUSED]:
        """The next thing the client says. Raises h11.RemoteProtocolError or a member of ``_GONE``."""
        while (event := self.protocol.next_event()) is h11.NEED_DATA:
            with trio.fail_after(timeout_s):
                await self._receive()
        return event  # type: ignore[return-value]  # the loop is over NEED_DATA; mypy cannot narrow sentinels

    async def send(self, data: bytes | memoryview) -> None:
        """Send raw bytes, a deadline for every piece."""
        with trio.fail_after(self.service.limits.send_s):
            await self._stream.send_all(data)

    async def _receive(self) -> None:
        self.protocol.receive_data(bytes(await self._stream.receive_some(RECEIVE_SIZE)))

    async def _exchange(self) -> bool:
        """One request and its response; whether another may follow."""
        try:
            head = await self._request_head()
            if head is None:
                return False
            request, body, record = self._parse(head)
        except h11.RemoteProtocolError as error:
            if self.protocol.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self._respond_plainly(error.error_status_hint, str(error))
            return False
        self.service.on_request(record)
        try:
            response = await self.service.handler(request)
            await self._respond(request, response, record, last=not body.droppable)
        except h11.RemoteProtocolError as error:
            if self.protocol.our_state is not h11.SEND_RESPONSE:
                return False
            record.status = error.error_status_hint
            await self._respond_plainly(error.error_status_hint, str(error))
            return False
        finally:
            self.service.on_response(record)
        return await self._reusable(body)

    async def _request_head(self) -> h11.Request | None:
        with trio.CancelScope() as idle:
            self.service.idle.add(idle)
            try:
                if self.service.stopping:
                    return None
                if not self.protocol.trailing_data[0]:
                    with trio.fail_after(self.service.limits.idle_s):
                        await self._receive()
            finally:
                self.service.idle.discard(idle)
        if idle.cancelled_caught:
            return None
        with trio.fail_after(self.service.limits.head_s):
            event = await self.next_event(self.service.limits.head_s)
        return event if isinstance(event, h11.Request) else None

    def _parse(self, head: h11.Request) -> tuple[Request, _RequestBody, RequestRecord]:
        try:
            target = urlsplit(head.target.decode("ascii"))
            headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers)
            query = parse_qs(target.query, keep_blank_values=True, errors="strict", max_num_fields=100)
            path = unquote(target.path, errors="strict")
        except ValueError as error:
            raise h11.RemoteProtocolError(f"malformed request target: {error}") from error
        if not path.startswith("/") or not path.isprintable():
            raise h11.RemoteProtocolError("malformed request target")
        length = next((int(value) for name, value in headers if name == "content-length"), None)
        chunked = any(name == "transfer-encoding" for name, _ in headers)
        body = _RequestBody(self, None if chunked else length or 0)
        method = head.method.decode("ascii")
        request = Request(method, path, query, headers, body, "https" if self.service.tls else "http", length)
        record = RequestRecord(method, path, target.query, headers, request.header("range"))
        return request, body, record

    async def _respond(
        self, request: Request, response: Response, record: RequestRecord, *, last: bool
    ) -> None:
        headers = [*response.headers, ("Date", formatdate(usegmt=True))]
        length = body_length(response.body)
        empty = request.method == "HEAD" or response.status in (204, 304)
        if length is not None and response.status != 204:
            headers.append(("Content-Length", str(length)))
        elif length is None and not empty:
            headers.append(("Transfer-Encoding", "chunked"))
        if last or self.service.stopping or self.protocol.they_are_waiting_for_100_continue:
            # Said before the client could use the connection again. One that still waits for 100 Continue may
            # or may not send its body: only closing is safe.
            headers.append(("Connection", "close"))
        head = self.protocol.send(h11.Response(status_code=response.status, headers=headers)) or b""
        record.status = response.status
        if empty:
            await self.send(head)
        else:
            await self._send_body(head, response.body, record)
        await self.send(self.protocol.send(h11.EndOfMessage()) or b"")

    async def _send_body(self, head: bytes, body: Body, record: RequestRecord) -> None:
        if isinstance(body, Stream):
            await self.send(head)
            await push_body(body, lambda data: self._send_data(data, record))
            return
        for piece in body:
            if isinstance(piece, bytes):
                await self._send_data(piece, record, head)
            else:
                await self._send_file(piece, record, head)
            head = b""
        if head:
            await self.send(head)

    async def _send_data(self, data: bytes | memoryview, record: RequestRecord, head: bytes = b"") -> None:
        # Counted before the wait: who has seen the last byte must find it counted.
        record.bytes_sent += len(data)
        # h11 annotates bytes, and hands any bytes-like piece through as it is.
        parts = self.protocol.send_with_data_passthrough(h11.Data(data=data)) or []  # type: ignore[arg-type]
        if len(data) <= SEND_TOGETHER:
            await self.send(b"".join((head, *parts)))
            return
        for part in (head, *parts):
            if part:
                await self.send(part)

    async def _send_file(self, piece: FileRange, record: RequestRecord, head: bytes) -> None:
        if self._stream is not self._transport:
            if head:
                await self.send(head)
            await read_file(piece, lambda data: self._send_data(data, record))
            return
        with piece.open() as source:
            if head:
                await self.send(head)
            # h11 keeps the count.
            self.protocol.send_with_data_passthrough(h11.Data(data=_Placeholder(piece.length)))  # type: ignore[arg-type]
            await self._sendfile(source, piece, record)

    async def _sendfile(self, source: int, piece: FileRange, record: RequestRecord) -> None:
        target = self._transport.socket.fileno()
        offset, end = piece.offset, piece.offset + piece.length
        while offset < end:
            try:
                sent = os.sendfile(target, source, offset, min(SENDFILE_SIZE, end - offset))
            except BlockingIOError:
                with trio.fail_after(self.service.limits.send_s):
                    await trio.lowlevel.wait_writable(target)
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"sendfile: {error.strerror}") from error
            if not sent:
                raise Disconnect
            offset += sent
            record.bytes_sent += sent
            await trio.lowlevel.checkpoint()

    async def _respond_plainly(self, status: int, message: str) -> None:
        """Answer what was not a request, and leave."""
        body = f"{message}\n".encode("utf-8", "replace")
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
        head = self.protocol.send(h11.Response(status_code=status, headers=[*headers, ("Connection", "close")]))
        await self.send((head or b"") + body)

    async def _reusable(self, body: _RequestBody) -> bool:
        """Whether the connection takes another request; what is left of this one is read and dropped first."""
        if self.protocol.our_state is not h11.DONE:
            return False
        try:
            async for _ in body:
                pass
        except h11.RemoteProtocolError:
            return False
        return self.protocol.their_state is h11.DONE

    async def _close(self) -> None:
        if self._stream is not self._transport:
            with trio.move_on_after(LINGER_S):
                await self._stream.aclose()
            return
        await self._transport.send_eof()
        if self.protocol.their_state in (h11.SEND_BODY, h11.ERROR):
            # Closing with unread input resets the connection, and the client might lose the answer to that.
            with trio.move_on_after(LINGER_S):
                while await self._transport.receive_some(RECEIVE_SIZE):
                    pass


class _Placeholder:
    """Stands for bytes that sendfile sends; h11 only asks for their number."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length
