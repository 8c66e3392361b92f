"""A real registry on a real socket that misbehaves on demand, and the object store it may redirect to.

Clients are tested against bytes on the wire, not against mocks of a library: resets are resets, a truncated
body is a closed connection, and the redirect target is another listener that remembers whether somebody
handed it an Authorization header.

    async with scripted_registry(tmp_path) as registry:
        registry.faults.add(Reset(after=1000), method="GET", path="/blobs/")
        async with registry.down():
            ...
"""

import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import trio

from veneer.serve.api import APIError, error_response
from veneer.serve.auth import Authorizer
from veneer.serve.blobs import serve_blob
from veneer.serve.http import HTTPServer, RequestRecord, open_port
from veneer.serve.message import Handler, Request, Response
from veneer.serve.registry import PAGE_SIZE, RegistryServer, address
from veneer.serve.storage import Storage
from veneer.testing.actions import Status
from veneer.testing.faults import FaultScript

__all__ = ["ObjectStore", "ScriptedRegistry", "scripted_registry"]


def _access_denied() -> Status:
    body = (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    )
    return Status(403, (("Content-Type", "application/xml"),), body)


@dataclass(slots=True)
class _Signature:
    method: str
    path: str
    expires: float
    uses: int | None


@dataclass(slots=True)
class ObjectStore:
    """A second host that blobs are redirected to by presigned URLs, as S3, GCS and Azure do it.

    A URL is good for the method it was signed for, for ``lifetime_s`` on trio's clock, and for ``max_uses``
    requests; afterwards ``expired`` is the answer.
    """

    max_uses: int | None = None
    lifetime_s: float = 3600.0
    expired: Status = field(default_factory=_access_denied)
    faults: FaultScript = field(default_factory=FaultScript)
    requests: list[RequestRecord] = field(default_factory=list)
    #: ``name:port`` of the listener.
    host: str = ""
    scheme: str = "http"
    _signatures: dict[str, _Signature] = field(default_factory=dict, repr=False)

    @property
    def leaks(self) -> list[RequestRecord]:
        """Requests that carried credentials meant for the registry."""
        return [record for record in self.requests if record.header("authorization") is not None]

    def expire(self) -> None:
        """Make every URL given out so far invalid."""
        self._signatures.clear()

    def sign(self, method: str, name: str, digest: str) -> str:
        """A URL for one blob."""
        path = f"/bucket/{name}/{digest}"
        signature = secrets.token_hex(32)
        until = trio.current_time() + self.lifetime_s
        self._signatures[signature] = _Signature(method, path, until, self.max_uses)
        query = {"X-Amz-Expires": f"{self.lifetime_s:g}", "X-Amz-Signature": signature}
        return f"{self.scheme}://{self.host}{path}?{urlencode(query)}"

    def redirecting(self, handler: Handler) -> Handler:
        """The registry's handler, with blobs that it would serve redirected to here."""

        async def handle(request: Request) -> Response:
            response = await handler(request)
            name, blobs, digest = request.path.removeprefix("/v2/").rpartition("/blobs/")
            if not blobs or request.method not in ("GET", "HEAD") or response.status not in (200, 206, 416):
                return response
            return Response(307, (("Location", self.sign(request.method, name, digest)),))

        return handle

    def serving(self, storage: Storage) -> Handler:
        """The handler of the store itself."""

        async def handle(request: Request) -> Response:
            signature = self._signatures.get(request.param("X-Amz-Signature"))
            if signature is None or not self._accept(signature, request):
                return await self.expired.respond(request, handle)
            name, _, digest = request.path.removeprefix("/bucket/").rpartition("/")
            try:
                return serve_blob(request, storage.existing(name), digest)
            except APIError as error:
                return error_response(error)

        return handle

    def _accept(self, signature: _Signature, request: Request) -> bool:
        fits = (signature.method, signature.path) == (request.method, request.path)
        if not fits or signature.expires <= trio.current_time() or signature.uses == 0:
            return False
        if signature.uses is not None:
            signature.uses -= 1
        return True


class _Site:
    """A listener that can go away and come back on its port. ``up`` and ``down`` belong to one task.

    The port stays reserved by a socket that is bound but never listens: connections to it are refused, and
    nobody else can take it.
    """

    def __init__(
        self, nursery: trio.Nursery, handler: Handler, requests: list[RequestRecord], tls: ssl.SSLContext | None
    ) -> None:
        self._nursery = nursery
        self._handler = handler
        self._requests = requests
        self._tls = tls
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self._running = trio.CancelScope()
        self._stopped = trio.Event()
        self.host = ""

    async def up(self) -> None:
        listener = await open_port(*self._reservation.getsockname())
        self.host = address(listener)
        self._running, self._stopped = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._serve, listener)

    async def _serve(self, listener: trio.SocketListener) -> None:
        server = HTTPServer(self._handler, tls=self._tls, on_request=self._requests.append)
        try:
            with self._running:
                await server.serve(listener)
        finally:
            self._stopped.set()

    async def down(self) -> None:
        self._running.cancel()
        await self._stopped.wait()

    def close(self) -> None:
        self._reservation.close()


class ScriptedRegistry:
    """What a test holds: where the registry is, what it was asked, and what it shall do wrong."""

    def __init__(self, server: RegistryServer, faults: FaultScript, store: ObjectStore | None) -> None:
        self.server = server
        self.faults = faults
        self._store = store
        self._sites: list[_Site] = []

    @property
    def host(self) -> str:
        """``name:port``."""
        return self.server.host

    @property
    def requests(self) -> list[RequestRecord]:
        """What the registry was asked so far, in the order of arrival."""
        return self.server.requests

    @property
    def object_store(self) -> ObjectStore:
        """The object store that was passed to :func:`scripted_registry`."""
        if self._store is None:
            raise LookupError("this registry has no object store")
        return self._store

    def asked(self, method: str, path: str = "") -> list[RequestRecord]:
        """The requests of that method whose path contains ``path``."""
        return [record for record in self.requests if record.method == method and path in record.path]

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """While the block runs, nothing listens and all connections are gone; the ports are the same after."""
        for site in self._sites:
            await site.down()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                for site in self._sites:
                    await site.up()

    async def _open(self, site: _Site) -> str:
        await site.up()
        self._sites.append(site)
        return site.host


@asynccontextmanager
async def scripted_registry(
    directory: Path,
    *,
    auth: Authorizer | None = None,
    tls: ssl.SSLContext | None = None,
    page_size: int = PAGE_SIZE,
    object_store: ObjectStore | None = None,
) -> AsyncIterator[ScriptedRegistry]:
    """Serve ``directory`` (made when missing) with faults while the block runs.

    Args:
        directory: holds OCI layouts, or is one.
        auth: BasicAuth or TokenAuth; None needs no credentials.
        tls: for both the registry and its object store.
        page_size: entries of one page of tags or referrers.
        object_store: where blobs are redirected to; None serves them directly.
    """
    faults = FaultScript()
    server = RegistryServer(directory, auth=auth, page_size=page_size)
    handler = object_store.redirecting(server.handle) if object_store else server.handle
    registry = ScriptedRegistry(server, faults, object_store)
    sites: list[_Site] = []
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            sites.append(_Site(nursery, faults.wrap(handler), server.requests, tls))
            server.host = await registry._open(sites[0])
            if object_store:
                serving = object_store.faults.wrap(object_store.serving(Storage(directory)))
                sites.append(_Site(nursery, serving, object_store.requests, tls))
                object_store.scheme = "https" if tls else "http"
                object_store.host = await registry._open(sites[1])
            try:
                yield registry
            except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery's group
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        for site in sites:
            site.close()
        server.close()
    if failure is not None:
        raise failure
