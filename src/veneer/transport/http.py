"""One HTTP/1.1 request and its streamed answer, over pooled connections: the only importer of httpx.

Uses httpx's transport seam, not its client: no cookies, no hidden redirects, no URL in a log. Every failure
below HTTP leaves as a :class:`~veneer.errors.RegistryError`; statuses are the caller's to judge. Nothing is
retried here (:mod:`veneer.transport.retry`), nothing is decoded, and at most one chunk of a body is held.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import NoReturn, Self

import httpx
import trio

from veneer import __version__
from veneer.errors import RegistryError, Unavailable
from veneer.settings import Settings
from veneer.timing import answered
from veneer.transport.address import is_loopback, origin_of, redact_text
from veneer.transport.connections import Connections
from veneer.transport.diagnosis import Diagnosis, diagnose_connection
from veneer.transport.retry import MIN_RATE, Attempts, Patience, TransportStats
from veneer.transport.tls import check_ca_file, tls_context

__all__ = ["Request", "Response", "Transport"]

# httpcore logs response headers, and with them presigned addresses, at level DEBUG.
logging.getLogger("httpcore").setLevel(logging.INFO)

#: TCP and TLS together. Three lost SYNs (1 + 2 + 4 s) still fit.
CONNECT_TIMEOUT_S = 10.0
#: Silence after which a connection counts as dead. Half the default read deadline: one more try fits.
STALL_TIMEOUT_S = 15.0
#: Wait for a free connection when all of them are busy; other transfers are then making progress.
POOL_TIMEOUT_S = 60.0
#: Finding out whether a host speaks TLS; only loopback and hosts named as insecure are asked.
PROBE_TIMEOUT_S = 5.0
#: Bytes of a request body handed to the socket at a time: the unit that a write time-out is for.
_WRITE_SIZE = 256 << 10
#: An unread rest of a body up to this size is read to keep its connection; a longer one costs the connection.
_DRAIN_LIMIT = 64 << 10
#: Ranges and digests are of the stored bytes: nothing on the way shall compress them.
_ALWAYS = {"User-Agent": f"veneer/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Args:
        method: in upper case.
        url: absolute.
        what: names the thing asked for in errors, as in ``localhost:5000/app:latest``.
        headers: without Host, User-Agent, Accept-Encoding and Content-Length, which are added.
        body: sent with its length; None for none.
    """

    method: str
    url: str = field(repr=False)
    what: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)


class _Body(httpx.AsyncByteStream):
    """A body in memory, sent in pieces so that a slow but moving upload is not taken for a stall.

    An iterator and no generator: it may be dropped half-way when the connection breaks.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._place >= len(self._data):
            raise StopAsyncIteration
        piece = self._data[self._place : self._place + _WRITE_SIZE]
        self._place += len(piece)
        return piece


class Response:
    """A status, headers and a body that is still on the wire. Belongs to one task; ``async with`` closes it.

    Iterating gives the undecoded body in chunks of at most 256 KiB. Raises Unavailable for a reset, a
    stall, a truncated body, or one that arrives so slowly that waiting makes no sense.
    """

    def __init__(self, request: Request, answer: httpx.Response, transport: "Transport") -> None:
        if not isinstance(answer.stream, httpx.AsyncByteStream):
            raise TypeError("an asynchronous transport answered synchronously")
        self.request = request
        self.status = answer.status_code
        self._answer = answer
        self._transport = transport
        self._parts = answer.stream.__aiter__()
        self._started = self._exhausted = False
        self._received = 0
        self._waited_s = 0.0

    @property
    def url(self) -> str:
        """The address that answered."""
        return self.request.url

    def header(self, name: str) -> str:
        """The value of a header, "" when it is absent."""
        return str(self._answer.headers.get(name, ""))

    def header_values(self, name: str) -> list[str]:
        """The values of a header that may come several times."""
        return list(self._answer.headers.get_list(name))

    @property
    def length(self) -> int | None:
        """Content-Length, or None when it is absent or malformed."""
        value = self.header("Content-Length")
        return int(value) if value.isascii() and value.isdecimal() and len(value) <= 19 else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        self._started = True
        before = trio.current_time()
        try:
            chunk: bytes = await self._parts.__anext__()
        except StopAsyncIteration:
            self._exhausted = True
            raise
        except httpx.HTTPError as error:
            self._exhausted = True
            self._transport.fail(error, self.request)
        self._received += len(chunk)
        self._transport.stats.bytes_received += len(chunk)
        self._waited_s += trio.current_time() - before
        if self._waited_s > self._transport.stall_s + self._received / MIN_RATE:
            raise Unavailable(
                f"{self.request.what}: {self.request.method} {origin_of(self.url).address}: stalled, "
                f"{self._received} bytes in {self._waited_s:.0f} s"
            )
        return chunk

    async def body(self, limit: int) -> bytes:
        """The whole body; raises RegistryError when it is longer than ``limit``."""
        data = await self.prefix(limit + 1)
        if len(data) > limit:
            raise RegistryError(
                f"{self.request.what}: {self.request.method} {origin_of(self.url).address}: "
                f"the answer is longer than the {limit} bytes allowed",
                status=self.status,
            )
        return data

    async def prefix(self, limit: int) -> bytes:
        """The first ``limit`` bytes of the body, or all of it when it is shorter."""
        parts: list[bytes] = []
        room = limit
        async for chunk in self:
            parts.append(chunk[:room])
            room -= len(parts[-1])
            if room == 0:
                break
        return b"".join(parts)

    async def discard(self) -> None:
        """Close, keeping the connection when what is left of the body is short."""
        if self.length is not None and self.length <= _DRAIN_LIMIT:
            with suppress(RegistryError):
                await self.prefix(_DRAIN_LIMIT + 1)
        await self.aclose()

    async def aclose(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        if self._started and not self._exhausted:
            # The chain of generators behind a body warns when it is dropped half-way. Going on inside a
            # cancelled scope ends it: all of them see the cancellation at the next wait for the network.
            with trio.CancelScope() as scope, suppress(httpx.HTTPError):
                scope.cancel()
                async for _ in self._parts:
                    pass
            self._exhausted = True
        await self._answer.stream.aclose()  # type: ignore[union-attr] # checked to be asynchronous when made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Transport:
    """Connections to all hosts of one process. May be used by many tasks of one trio run.

    Args:
        settings: certificates, insecure hosts and deadlines.
        connections: to use, and to leave open; by default, connections of its own.
        backend: takes the place of the network, in tests.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        connections: Connections | None = None,
        backend: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.stats = TransportStats()
        self.stall_s = min(STALL_TIMEOUT_S, settings.read_deadline_s / 2)
        self._insecure = settings.insecure
        self._timeouts = {
            "connect": CONNECT_TIMEOUT_S,
            "read": self.stall_s,
            "write": self.stall_s,
            "pool": POOL_TIMEOUT_S,
        }
        self._ca_file = settings.ca_file
        if settings.ca_file is not None:
            check_ca_file(settings.ca_file)
        self._shared = connections is not None
        self._connections = connections or Connections(backend=backend)

    def attempts(self, patience: Patience) -> Attempts:
        """A fresh allowance of tries, counted in :attr:`stats`."""
        return Attempts(patience, self.stats)

    def allows_plain(self, host: str) -> bool:
        """Whether ``host`` (``host`` or ``host:port``) may be spoken to without TLS."""
        return is_loopback(host) or host in self._insecure or host.rpartition(":")[0] in self._insecure

    async def base_url(self, host: str, what: str) -> str:
        """``https://host``, or ``http://host`` where that is allowed and the host does not speak TLS.

        A host that shows a certificate nobody here trusts does speak TLS: plain HTTP is no way around that.
        """
        if not self.allows_plain(host):
            return f"https://{host}"
        known = self._connections
        if host not in known.schemes:
            async with known.probes.setdefault(host, trio.Lock()):
                if host not in known.schemes:
                    known.schemes[host] = "https" if await self._speaks_tls(host, what) else "http"
        return f"{known.schemes[host]}://{host}"

    async def _speaks_tls(self, host: str, what: str) -> bool:
        request = Request("GET", f"https://{host}/v2/", what)
        reached: list[str] = []

        async def trace(event: str, _info: Mapping[str, object]) -> None:
            reached.append(event.partition(".")[2])

        timeouts = dict.fromkeys(self._timeouts, PROBE_TIMEOUT_S)
        try:
            answer = await self._exchange(request, {"timeout": timeouts, "trace": trace})
        except httpx.TransportError as error:
            if "start_tls.complete" in reached or diagnose_connection(error).untrusted:
                return True
            if "start_tls.started" in reached or isinstance(error, httpx.ProxyError):
                return False  # proxies often open tunnels to port 443 only
            self.fail(error, request)
        async with Response(request, answer, self) as response:
            await response.discard()
        return True

    def is_far(self, url: str) -> bool:
        """Whether a connection to the origin of ``url`` costs time, and none is known to be open."""
        return self._connections.is_far(origin_of(url))

    async def send(self, request: Request) -> Response:
        """Send a request and read the head of the answer, whatever its status. The caller closes it."""
        try:
            answer = await self._exchange(request, {"timeout": self._timeouts})
        except httpx.HTTPError as error:
            self.fail(error, request)
        answered()
        return Response(request, answer, self)

    async def _exchange(self, request: Request, extensions: dict[str, object]) -> httpx.Response:
        try:
            url = _parsed(request.url)
            headers = {"Host": url.netloc.decode("ascii"), **_ALWAYS, **request.headers}
            if request.body is not None:
                headers["Content-Length"] = str(len(request.body))
            built = httpx.Request(
                request.method, url, headers=headers, stream=_Body(request.body or b""), extensions=extensions
            )
        except (httpx.InvalidURL, UnicodeEncodeError):
            raise RegistryError(f"{request.what}: {request.method}: unusable address or header") from None
        self.stats.requests += 1
        origin, began = origin_of(request.url), trio.current_time()
        backend = self._connections.to(origin, lambda: tls_context(self._ca_file))
        answer = await backend.handle_async_request(built)
        self._connections.note(origin, trio.current_time() - began)
        return answer

    def fail(self, error: httpx.HTTPError, request: Request) -> NoReturn:
        """Raise the error of the tree that stands for one of httpx."""
        reason = _diagnose(error, self.stall_s)
        host = origin_of(request.url).address
        message = f"{request.what}: {request.method} {host}: {reason.text}"
        hint = reason.hint.format(host=host) if reason.hint else None
        if reason.temporary:
            raise Unavailable(message, hint=hint) from error
        raise RegistryError(message, hint=hint) from error

    async def aclose(self) -> None:
        """Close all connections, unless they are shared."""
        if not self._shared:
            await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@lru_cache(maxsize=256)  # parsing costs a tenth of a request; ranges of one blob have the same address
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)


def _diagnose(error: httpx.HTTPError, stall_s: float) -> Diagnosis:
    match error:
        case httpx.ConnectTimeout():
            return Diagnosis(f"no connection within {CONNECT_TIMEOUT_S:g} s", temporary=True)
        case httpx.PoolTimeout():
            return Diagnosis(f"no connection came free within {POOL_TIMEOUT_S:g} s", temporary=True)
        case httpx.TimeoutException():
            return Diagnosis(f"stalled, nothing moved for {stall_s:g} s", temporary=True)
        case httpx.ConnectError():
            return diagnose_connection(error)
        case httpx.ProxyError():
            text = f"the proxy refused: {redact_text(str(error), 100)}"
            return Diagnosis(text, temporary=str(error)[:1] == "5", hint="check HTTPS_PROXY and NO_PROXY")
        case httpx.NetworkError() | httpx.RemoteProtocolError():
            return Diagnosis("the connection broke", temporary=True)
    return Diagnosis("the request could not be made", temporary=False)
