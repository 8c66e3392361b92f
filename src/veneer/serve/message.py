"""Requests and responses as handlers see them, independent of how they travel.

A response body is either a tuple of pieces (bytes and ranges of files, whose length is known before the first
byte is sent) or a :class:`Stream` that pushes its bytes. Pushing, rather than an asynchronous generator, lets
a middleware wrap the sink and leaves nothing to finalise when a connection ends half-way.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

__all__ = [
    "Body",
    "BodyTooLarge",
    "Disconnect",
    "FileRange",
    "Handler",
    "Headers",
    "Piece",
    "Request",
    "Response",
    "Sink",
    "Stream",
    "body_length",
    "push_body",
    "read_file",
]

#: Bytes read from a file at a time: large enough to amortise the call, small enough to stay in the L2 cache.
READ_SIZE = 256 << 10

Headers = tuple[tuple[str, str], ...]
Sink = Callable[[bytes | memoryview], Awaitable[None]]


class Disconnect(Exception):
    """Raised by a handler or a body: end the connection here, with a TCP reset when ``reset`` is set."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__("the server ends the connection")
        self.reset = reset


class BodyTooLarge(Exception):
    """A request body is longer than the handler accepts."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """``length`` bytes of the file at ``path`` from ``offset``; the file must hold them all."""

    path: Path
    offset: int
    length: int

    @contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor of the file. Raises :class:`Disconnect` when it is gone or too short by now."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Disconnect from error
        try:
            if os.fstat(descriptor).st_size < self.offset + self.length:
                raise Disconnect
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Stream:
    """A body that calls the sink it is given with one piece after another; ``length`` None means chunked."""

    push: Callable[[Sink], Awaitable[None]]
    length: int | None = None


Piece = bytes | FileRange
Body = tuple[Piece, ...] | Stream


@dataclass(slots=True)
class Response:
    """What a handler answers. Content-Length, Date and Connection are added by the server."""

    status: int
    headers: Headers = ()
    body: Body = ()

    def header(self, name: str) -> str | None:
        """The first header of that name (case does not matter), or None."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def with_headers(self, **changes: str | None) -> "Response":
        """A copy with headers replaced, or removed where the value is None; ``_`` stands for ``-``."""
        names = {name.replace("_", "-").lower(): value for name, value in changes.items()}
        kept = tuple(item for item in self.headers if item[0].lower() not in names)
        added = tuple((name, value) for name, value in names.items() if value is not None)
        return Response(self.status, kept + added, self.body)


@dataclass(slots=True)
class Request:
    """One request.

    Args:
        method: upper case.
        path: percent-decoded, without the query.
        query: decoded; every name with its values in order.
        headers: names in lower case.
        body: the bytes as they arrive; may be iterated once.
        scheme: ``http`` or ``https``.
        length: the announced Content-Length, or None.
    """

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Headers
    body: AsyncIterator[bytes]
    scheme: str = "http"
    length: int | None = None

    def header(self, name: str) -> str | None:
        """The values of a header joined by commas, or None when it is absent; ``name`` in lower case."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None

    def param(self, name: str) -> str:
        """The last value of a query parameter, or an empty string."""
        return self.query.get(name, [""])[-1]

    async def read(self, limit: int) -> bytes:
        """The whole body; raises :class:`BodyTooLarge` as soon as it exceeds ``limit`` bytes."""
        if self.length is not None and self.length > limit:
            raise BodyTooLarge
        data = bytearray()
        async for chunk in self.body:
            data += chunk
            if len(data) > limit:
                raise BodyTooLarge
        return bytes(data)


Handler = Callable[[Request], Awaitable[Response]]


def body_length(body: Body) -> int | None:
    """Bytes in a body, or None when only its end will tell."""
    if isinstance(body, Stream):
        return body.length
    return sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in body)


async def read_file(piece: FileRange, sink: Sink) -> None:
    """Push a range of a file. Raises :class:`Disconnect` when it cannot be read to its end.

    Reads are made in the event loop: from the page cache a piece takes some 30 microseconds, less than the
    hop to a thread and back.
    """
    with piece.open() as descriptor:
        offset, end = piece.offset, piece.offset + piece.length
        while offset < end:
            try:
                data = os.pread(descriptor, min(READ_SIZE, end - offset), offset)
            except OSError as error:
                raise Disconnect from error
            if not data:
                raise Disconnect
            await sink(data)
            offset += len(data)
            await trio.lowlevel.checkpoint()


async def push_body(body: Body, sink: Sink) -> None:
    """Push all bytes of a body."""
    if isinstance(body, Stream):
        await body.push(sink)
        return
    for piece in body:
        if isinstance(piece, bytes):
            await sink(piece)
        else:
            await read_file(piece, sink)
