"""The faults a scripted server can commit: small values that bend a request, a response or its bytes.

Each one is a middleware, so they combine: a delay, a slow rate and a flipped bit make one very bad answer.
Which requests they hit is the business of :mod:`veneer.testing.faults`. Nothing here is random.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import trio

from veneer.serve.auth import TokenAuth
from veneer.serve.message import (
    Disconnect,
    FileRange,
    Handler,
    Headers,
    Request,
    Response,
    Sink,
    Stream,
    body_length,
    push_body,
)

__all__ = [
    "Action",
    "Delay",
    "DropHeader",
    "ExpireToken",
    "FlipBit",
    "Hold",
    "IgnoreRange",
    "Rate",
    "Reset",
    "SetHeader",
    "Stall",
    "Status",
    "Truncate",
    "WrongRange",
    "expired_xml",
    "html_page",
    "rate_limited",
]

#: Bytes sent at a time by a slowed-down body: small enough that the pace is even.
_SLOW_PIECE = 16 << 10


class Action(Protocol):
    """One kind of fault."""

    def concerns(self, request: Request) -> bool:
        """Whether the fault can act on this request at all; others do not count as occurrences."""

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer, by way of ``proceed`` where the real answer is wanted."""


class _Always:
    """Concerns every request."""

    __slots__ = ()

    def concerns(self, request: Request) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, slots=True)
class Delay(_Always):
    """Wait before anything is answered."""

    seconds: float

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Wait, then answer properly."""
        await trio.sleep(self.seconds)
        return await proceed(request)


@dataclass(frozen=True, slots=True)
class Hold(_Always):
    """Answer only when the test sets ``release``; ``arrived`` tells that a request is waiting for it."""

    release: trio.Event = field(default_factory=trio.Event)
    arrived: trio.Event = field(default_factory=trio.Event)

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Tell, wait, then answer properly."""
        self.arrived.set()
        await self.release.wait()
        return await proceed(request)


@dataclass(frozen=True, slots=True)
class Status(_Always):
    """Answer with a status of our own and do nothing of what was asked."""

    status: int
    headers: Headers = ()
    body: bytes = b""

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer that, unread the request's body."""
        return Response(self.status, self.headers, (self.body,))


def rate_limited(retry_after: str = "1") -> Status:
    """429 as registries send it; ``retry_after`` is in seconds or an HTTP date, "" leaves the header out."""
    body = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}'
    headers = (("Content-Type", "application/json"),)
    return Status(429, (*headers, ("Retry-After", retry_after)) if retry_after else headers, body)


def expired_xml() -> Status:
    """What S3 says about a presigned URL whose credentials have expired."""
    body = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>Too late.</Message></Error>"
    return Status(400, (("Content-Type", "application/xml"),), body)


def html_page() -> Status:
    """What some registries and proxies answer, with status 200, for an API that they do not have."""
    return Status(200, (("Content-Type", "text/html"),), b"<!doctype html><title>Sign in</title>")


@dataclass(frozen=True, slots=True)
class SetHeader(_Always):
    """Answer properly but for one header of the response."""

    name: str
    value: str

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Replace or add the header."""
        response = await proceed(request)
        kept = tuple(item for item in response.headers if item[0].lower() != self.name.lower())
        return replace(response, headers=(*kept, (self.name, self.value)))


@dataclass(frozen=True, slots=True)
class DropHeader(_Always):
    """Answer properly but without one header, such as Docker-Content-Digest."""

    name: str

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Leave the header out."""
        response = await proceed(request)
        kept = tuple(item for item in response.headers if item[0].lower() != self.name.lower())
        return replace(response, headers=kept)


@dataclass(frozen=True, slots=True)
class ExpireToken(_Always):
    """Revoke the Bearer token that the request carries (all of them when it has none) before it is checked."""

    auth: TokenAuth

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Revoke, then let the registry find out."""
        kind, _, token = (request.header("authorization") or "").partition(" ")
        self.auth.revoke(token.strip() if kind.lower() == "bearer" else None)
        return await proceed(request)


@dataclass(frozen=True, slots=True)
class Rate(_Always):
    """Send the body at so many bytes per second."""

    bytes_per_s: float

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer slowly."""

        def slow(sink: Sink) -> Sink:
            async def send(data: bytes | memoryview) -> None:
                for start in range(0, len(data), _SLOW_PIECE):
                    piece = data[start : start + _SLOW_PIECE]
                    await trio.sleep(len(piece) / self.bytes_per_s)
                    await sink(piece)

            return send

        return _through(await proceed(request), slow)


async def _stop_reset() -> None:
    raise Disconnect(reset=True)


async def _stop_close() -> None:
    raise Disconnect


@dataclass(frozen=True, slots=True)
class Reset(_Always):
    """Reset the TCP connection: before the response when ``after`` is None, else after so many body bytes.

    The kernel drops what the client has not read yet, so ``after`` is an upper limit of what arrives.
    """

    after: int | None = None

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer until the reset."""
        if self.after is None:
            raise Disconnect(reset=True)
        return _cut(await proceed(request), self.after, _stop_reset)


@dataclass(frozen=True, slots=True)
class Truncate(_Always):
    """Close the connection after so many body bytes, while Content-Length promises more."""

    after: int

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer until the end."""
        return _cut(await proceed(request), self.after, _stop_close)


@dataclass(frozen=True, slots=True)
class Stall(_Always):
    """Send so many body bytes and then nothing more, with the connection open."""

    after: int

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer until the silence."""
        return _cut(await proceed(request), self.after, trio.sleep_forever)


@dataclass(frozen=True, slots=True)
class FlipBit:
    """Flip a bit of the byte at offset ``at`` of the blob or manifest, wherever the response carries it."""

    at: int
    bit: int = 0

    def concerns(self, request: Request) -> bool:
        """Requests whose ranges cover the byte; those for everything do."""
        ranges = _simple_ranges(request)
        return request.method == "GET" and (not ranges or any(a <= self.at <= b for a, b in ranges))

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer with one bit wrong."""
        response = await proceed(request)
        body = response.body
        if isinstance(body, Stream):
            stated = _CONTENT_RANGE.match(response.header("content-range") or "")
            start = int(stated[1]) if stated else 0
            return _through(response, lambda sink: self._flip(sink, start))

        async def push(sink: Sink) -> None:
            for piece in body:
                if isinstance(piece, FileRange):
                    await push_body((piece,), self._flip(sink, piece.offset))
                else:
                    # Bytes are a whole small document, unless they are the headers between ranges.
                    await (self._flip(sink, 0) if len(body) == 1 else sink)(piece)

        return replace(response, body=Stream(push, body_length(body)))

    def _flip(self, sink: Sink, start: int) -> Sink:
        position = start

        async def send(data: bytes | memoryview) -> None:
            nonlocal position
            index = self.at - position
            position += len(data)
            if 0 <= index < len(data):
                changed = bytearray(data)
                changed[index] ^= 1 << self.bit
                data = bytes(changed)
            await sink(data)

        return send


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer 200 with everything, as proxies do that have not cached the blob."""

    def concerns(self, request: Request) -> bool:
        """Requests with a range."""
        return request.header("range") is not None

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer as if no range had been asked for."""
        return await proceed(_with_range(request, None))


@dataclass(frozen=True, slots=True)
class WrongRange:
    """Answer 206 for another range than the one asked for, moved by ``shift`` bytes.

    ``lie`` says what the Content-Range header then claims: "none" tells the truth about the wrong range,
    "range" claims that the bytes are those asked for, and "total" sends the right bytes with a wrong total.
    """

    shift: int = 1
    lie: Literal["none", "range", "total"] = "none"

    def concerns(self, request: Request) -> bool:
        """Requests for one range with both ends."""
        return len(_simple_ranges(request)) == 1

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer something else."""
        first, last = _simple_ranges(request)[0]
        shift = -self.shift if first >= self.shift else self.shift
        if self.lie == "total":
            shift = 0
        response = await proceed(_with_range(request, f"bytes={first + shift}-{last + shift}"))
        real = response.header("content-range")
        if real is None or self.lie == "none":
            return response
        span, _, size = real.rpartition("/")
        lie = f"{span}/{int(size) + 1}" if self.lie == "total" else f"bytes {first}-{last}/{size}"
        return response.with_headers(content_range=lie)


_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-")
_SIMPLE_RANGE = re.compile(r"\s*([0-9]+)-([0-9]+)\s*")


def _simple_ranges(request: Request) -> list[tuple[int, int]]:
    """First and last offset of each range with both ends."""
    unit, _, text = (request.header("range") or "").partition("=")
    if unit.strip().lower() != "bytes":
        return []
    matches = [_SIMPLE_RANGE.fullmatch(item) for item in text.split(",")]
    return [(int(match[1]), int(match[2])) for match in matches if match]


def _with_range(request: Request, value: str | None) -> Request:
    kept = tuple(item for item in request.headers if item[0] not in ("range", "if-range"))
    wanted = () if value is None else (("range", value),)
    return replace(request, headers=(*kept, *wanted))


def _through(response: Response, wrap: Callable[[Sink], Sink]) -> Response:
    """The response with its body pushed through a wrapped sink; lengths stay as promised."""
    body = response.body

    async def push(sink: Sink) -> None:
        await push_body(body, wrap(sink))

    return replace(response, body=Stream(push, body_length(body)))


def _cut(response: Response, after: int, end: Callable[[], Awaitable[None]]) -> Response:
    """The response whose body meets its ``end`` in place of the first byte after so many."""

    def limit(sink: Sink) -> Sink:
        left = after

        async def send(data: bytes | memoryview) -> None:
            nonlocal left
            if len(data) <= left:
                left -= len(data)
                await sink(data)
                return
            if left:
                await sink(data[:left])
            await end()

        return send

    return _through(response, limit)
