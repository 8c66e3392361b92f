"""HTTP/1.1 straight to a host, for bodies that are large or many: kept connections, and nothing in between.

Takes the place of httpx's own transport where no proxy is in between, at an eighth of its processor time. h11
writes requests and reads heads; the bytes of a body of known length go from the socket to whoever reads it as
they are. Errors are those of httpx, so that nobody above can tell the two apart.

Invariant: a connection is used again only if its last answer was read to the end and nothing came after it.
"""

import select
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, Self, TypeVar

import h11
import httpx
import trio

__all__ = ["DirectTransport"]

T = TypeVar("T")

#: Of a body, taken from the socket at a time; larger pieces cost as much a byte.
_PIECE = 256 << 10
#: Of a head. The start of a body comes with it.
_HEAD_PIECE = 64 << 10
#: Heads may be as long as those that httpx takes.
_MAX_HEAD = 100 << 10

_Origin = tuple[str, str, int]
_Trace = Callable[[str, Mapping[str, object]], Awaitable[None]]


class DirectTransport(httpx.AsyncBaseTransport):
    """Connections to any number of hosts. May be used by many tasks of one trio run.

    Args:
        tls: for hosts that are spoken to with TLS.
        most: connections in use at a time; who needs another one waits.
        most_idle: connections that are kept.
        expiry_s: how long.
    """

    def __init__(self, tls: ssl.SSLContext, *, most: int, most_idle: int, expiry_s: float) -> None:
        self._tls = tls
        self._room = trio.Semaphore(most)
        self._most_idle = most_idle
        self._expiry_s = expiry_s
        #: The latest last.
        self._idle: defaultdict[_Origin, list[_Connection]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the head of the answer. Raises an :class:`httpx.TransportError`."""
        timeouts: Mapping[str, float] = request.extensions["timeout"]
        trace: _Trace | None = request.extensions.get("trace")
        with _within(timeouts["pool"], httpx.PoolTimeout):
            await self._room.acquire()
        connection: _Connection | None = None
        try:
            url = request.url
            origin = url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)
            connection = self._kept(origin) or await self._connect(origin, timeouts["connect"], trace)
            await connection.send(request, timeouts["write"])
            head = await connection.head(timeouts["read"])
            body = _Body(self, origin, connection, head, request.method, timeouts["read"])
        except BaseException:
            if connection is not None:
                connection.close()
            self._room.release()
            raise
        return httpx.Response(head.status_code, headers=head.headers.raw_items(), stream=body)

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed by its users."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        self._most_idle = 0
        await trio.lowlevel.checkpoint()

    def give_back(self, origin: _Origin, connection: "_Connection", *, reusable: bool) -> None:
        """End the use of a connection."""
        self._room.release()
        if not reusable or not self._most_idle:
            connection.close()
            return
        connection.idle_since = trio.current_time()
        self._idle[origin].append(connection)
        if sum(map(len, self._idle.values())) > self._most_idle:
            oldest = min(filter(None, self._idle.values()), key=lambda kept: kept[0].idle_since)
            oldest.pop(0).close()

    def _kept(self, origin: _Origin) -> "_Connection | None":
        kept = self._idle[origin]
        while kept:
            connection = kept.pop()
            if trio.current_time() - connection.idle_since < self._expiry_s and connection.is_quiet():
                return connection
            connection.close()
        return None

    async def _connect(self, origin: _Origin, timeout_s: float, trace: _Trace | None) -> "_Connection":
        scheme, host, port = origin
        with _within(timeout_s, httpx.ConnectTimeout):
            try:
                plain = await trio.open_tcp_stream(host, port)
            except (OSError, trio.BrokenResourceError) as error:
                raise httpx.ConnectError(str(error)) from error
            connection = _Connection(plain, plain)
            try:
                if scheme == "https":
                    await connection.secure(self._tls, host, trace)
            except BaseException:
                connection.close()
                raise
        return connection


class _Connection:
    """One connection. Belongs to one request at a time."""

    def __init__(self, plain: trio.SocketStream, stream: trio.abc.Stream) -> None:
        self.idle_since = 0.0
        self._plain = plain
        self._stream = stream
        # One for each request: h11 does not learn of the end of bodies that are read past it.
        self.protocol = h11.Connection(h11.CLIENT, _MAX_HEAD)

    async def secure(self, tls: ssl.SSLContext, host: str, trace: _Trace | None) -> None:
        """Speak TLS from now on."""
        if trace is not None:
            await trace("connection.start_tls.started", {})
        stream = trio.SSLStream(self._plain, tls, server_hostname=host, https_compatible=True)
        try:
            await stream.do_handshake()
        except (ssl.SSLError, ssl.CertificateError, trio.BrokenResourceError) as error:
            raise httpx.ConnectError(str(error)) from error
        self._stream = stream
        if trace is not None:
            await trace("connection.start_tls.complete", {})

    def is_quiet(self) -> bool:
        """Whether the other side has neither closed an idle connection nor sent anything."""
        poll = select.poll()
        poll.register(self._plain.socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    async def send(self, request: httpx.Request, timeout_s: float) -> None:
        """Send a request. If the other side does not take all of it, its answer may tell why."""
        self.protocol = protocol = h11.Connection(h11.CLIENT, _MAX_HEAD)
        try:
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            data = protocol.send(head) or b""
            if not isinstance(request.stream, httpx.AsyncByteStream):
                raise TypeError("a synchronous body in an asynchronous request")
            try:
                async for piece in request.stream:
                    if piece:
                        await self._write(data + (protocol.send(h11.Data(data=piece)) or b""), timeout_s)
                        data = b""
                data += protocol.send(h11.EndOfMessage()) or b""
                if data:
                    await self._write(data, timeout_s)
            except httpx.WriteError:
                return
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error

    async def head(self, timeout_s: float) -> h11.Response:
        """The head of the answer."""
        while True:
            event = self.next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                self.protocol.receive_data(await self.receive(timeout_s, _HEAD_PIECE))
            elif not isinstance(event, h11.InformationalResponse):
                raise httpx.RemoteProtocolError("no answer")

    def next_event(self) -> "type[h11.NEED_DATA | h11.PAUSED] | h11.Event":
        """What h11 makes of what was received."""
        try:
            return self.protocol.next_event()
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    async def receive(self, timeout_s: float, most: int = _PIECE) -> bytes:
        """Some bytes, none at the end."""
        with _within(timeout_s, httpx.ReadTimeout):
            try:
                return bytes(await self._stream.receive_some(most))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpx.ReadError(str(error)) from error

    async def _write(self, data: bytes, timeout_s: float) -> None:
        with _within(timeout_s, httpx.WriteTimeout):
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpx.WriteError(str(error)) from error

    def close(self) -> None:
        """Close at once: nobody is told, and nothing waits."""
        self._plain.socket.close()


class _Body(httpx.AsyncByteStream):
    """The body of one answer. An iterator and no generator: it may be dropped half-way."""

    def __init__(
        self,
        pool: DirectTransport,
        origin: _Origin,
        connection: _Connection,
        head: h11.Response,
        method: str,
        timeout_s: float,
    ) -> None:
        self._pool = pool
        self._origin = origin
        self._connection: _Connection | None = connection
        self._timeout_s = timeout_s
        self._keep = _is_kept(head)
        #: Bytes that are left of a body of known length; else h11 finds its end.
        self._left = _length(head, method)
        self._here = b""
        if self._left is not None:
            self._here = connection.protocol.trailing_data[0]
        if self._left == 0:
            self._end(reusable=self._keep and not self._here)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        if connection is None:
            raise StopAsyncIteration
        try:
            piece = await (self._framed(connection) if self._left is None else self._counted(connection))
        except BaseException:
            self._end(reusable=False)
            raise
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Give the connection back, if that has not been done."""
        self._end(reusable=False)
        await trio.lowlevel.checkpoint()

    async def _counted(self, connection: _Connection) -> bytes:
        left, piece, self._here = self._left or 0, self._here, b""
        if left and not piece:
            # One byte more shows what comes behind: once TLS has decrypted that, no socket tells of it.
            piece = await connection.receive(self._timeout_s, min(left + 1, _PIECE))
            if not piece:
                _broken_off(left)
        excess = len(piece) > left
        piece = piece[:left] if excess else piece
        self._left = left - len(piece)
        if not self._left:
            self._end(reusable=self._keep and not excess)
        return piece

    async def _framed(self, connection: _Connection) -> bytes:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._end(reusable=self._keep and not connection.protocol.trailing_data[0])
                return b""
            elif event is h11.NEED_DATA:
                connection.protocol.receive_data(await connection.receive(self._timeout_s))
            else:
                raise httpx.RemoteProtocolError("no body")

    def _end(self, *, reusable: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give_back(self._origin, connection, reusable=reusable)


def _length(head: h11.Response, method: str) -> int | None:
    """Bytes of the body, None when its end has to be found."""
    if method == "HEAD" or head.status_code in (204, 304):
        return 0
    names = dict(head.headers)
    if b"transfer-encoding" in names or b"content-length" not in names:
        return None
    # h11 has refused what is no number, and lengths that differ.
    return int(names[b"content-length"])


def _is_kept(head: h11.Response) -> bool:
    tokens = {
        token.strip().lower()
        for name, value in head.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    return head.http_version == b"1.1" and b"close" not in tokens


def _broken_off(left: int) -> NoReturn:
    raise httpx.RemoteProtocolError(f"the connection was closed {left} bytes before the end of the body")


@contextmanager
def _within(seconds: float, error: type[httpx.TimeoutException]) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise error(f"{seconds:g} s") from None
