"""The embedded registry: OCI layouts under a directory, served by the distribution API (spec 1.1).

For demonstrations, tests, laboratories and small private use on one machine. It stores nothing of its own:
what it serves can be copied with any tool that knows OCI layouts, and the other way round.
"""

import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from veneer.errors import VeneerError
from veneer.serve.api import APIError, error_response
from veneer.serve.auth import Access, Authorizer, BasicAuth, TokenAuth
from veneer.serve.blobs import BlobHandlers
from veneer.serve.http import HTTPServer, RequestRecord, ignore, open_port
from veneer.serve.manifests import ManifestHandlers
from veneer.serve.message import Request, Response
from veneer.serve.storage import Storage

__all__ = ["BasicAuth", "RegistryServer", "RequestRecord", "TokenAuth", "serve_registry"]

#: Entries of one page of tags or referrers, unless the client wants fewer.
PAGE_SIZE = 1_000
#: Request records that are kept; beyond, the older half goes.
MAX_RECORDS = 20_000
#: Seconds that transfers in progress get when the server is told to stop.
GRACE_S = 5.0

_VERSION = (("Docker-Distribution-API-Version", "registry/2.0"),)


@dataclass(frozen=True, slots=True)
class _Route:
    """One endpoint; the groups of ``path`` are the arguments of ``handler``."""

    path: re.Pattern[str]
    methods: tuple[str, ...]
    handler: Callable[..., Awaitable[Response]]
    uploads: bool = False

    def needs(self, request: Request, name: str) -> list[Access]:
        """The rights that a request needs; those for pushing include pulling, as clients ask for both."""
        if self.uploads or request.method == "PUT":
            needed = [Access(name, "pull"), Access(name, "push")]
        else:
            needed = [Access(name, "delete" if request.method == "DELETE" else "pull")]
        if request.method == "POST" and request.param("mount") and request.param("from") not in ("", name):
            needed.append(Access(request.param("from"), "pull"))
        return needed


def _routes(blobs: BlobHandlers, manifests: ManifestHandlers) -> tuple[_Route, ...]:
    """The endpoints; the first whose path fits is meant, and names may contain what looks like another."""

    def route(path: str, methods: str, handler: Callable[..., Awaitable[Response]], **options: bool) -> _Route:
        return _Route(re.compile(rf"/v2/(?P<name>.+)/{path}"), tuple(methods.split()), handler, **options)

    return (
        route("blobs/uploads/(?P<identity>[^/]+)", "GET PATCH PUT DELETE", blobs.session, uploads=True),
        route("blobs/uploads/?", "POST", blobs.begin, uploads=True),
        route("blobs/(?P<reference>[^/]+)", "GET HEAD DELETE", blobs.blob),
        route("manifests/(?P<reference>[^/]+)", "GET HEAD PUT DELETE", manifests.manifest),
        route("tags/list", "GET HEAD", manifests.tags),
        route("referrers/(?P<subject>[^/]+)", "GET HEAD", manifests.referrers),
    )


class RegistryServer:
    """The API as a handler of requests, and what came in.

    Args:
        directory: holds the layouts, or is one; made when missing.
        auth: who may do what; None lets everybody do everything.
        page_size: entries of one page of a list, at most.
    """

    def __init__(
        self,
        directory: Path,
        *,
        auth: Authorizer | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        storage = Storage(directory)
        self.requests: list[RequestRecord] = []
        #: ``name:port`` of the listener, once there is one.
        self.host = ""
        self._auth = auth
        self._blobs = BlobHandlers(storage)
        self._manifests = ManifestHandlers(storage, page_size)
        self._routes = _routes(self._blobs, self._manifests)

    def record(self, record: RequestRecord) -> None:
        """Keep a request for later questions."""
        if len(self.requests) >= MAX_RECORDS:
            del self.requests[: MAX_RECORDS // 2]
        self.requests.append(record)

    def close(self) -> None:
        """Remove the files of unfinished uploads."""
        self._blobs.uploads.close()

    async def handle(self, request: Request) -> Response:
        """Answer one request."""
        try:
            response = await self._route(request)
        except APIError as error:
            response = error_response(error)
        except VeneerError as error:
            status = 503 if error.temporary else 500
            response = error_response(APIError("UNKNOWN", error.message, status=status))
        except OSError as error:
            response = error_response(APIError("UNKNOWN", f"storage failed: {error.strerror}"))
        response.headers += _VERSION
        return response

    async def _route(self, request: Request) -> Response:
        path = request.path
        if path == "/token" and self._auth is not None and request.method in ("GET", "POST"):
            return await self._auth.token(request, self.host)
        if path in ("/v2", "/v2/", "/v2/_catalog"):
            _check_method(request, ("GET", "HEAD"))
            await self._authorize(request, ())
            if path == "/v2/_catalog":
                return await self._manifests.catalog(request)
            return Response(200, (("Content-Type", "application/json"),), (b"{}",))
        for route in self._routes:
            match = route.path.fullmatch(path)
            if match is not None:
                _check_method(request, route.methods)
                await self._authorize(request, route.needs(request, match["name"]))
                return await route.handler(request, **match.groupdict())
        raise APIError("UNSUPPORTED", "no such endpoint", status=404)

    async def _authorize(self, request: Request, needed: Sequence[Access]) -> None:
        if self._auth is not None:
            await self._auth.authorize(request, needed, self.host)


def _check_method(request: Request, methods: Sequence[str]) -> None:
    if request.method not in methods:
        allow = (("Allow", ", ".join(methods)),)
        raise APIError("UNSUPPORTED", f"{request.method} is not possible here", headers=allow)


@asynccontextmanager
async def serve_registry(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    auth: Authorizer | None = None,
    tls: ssl.SSLContext | None = None,
    page_size: int = PAGE_SIZE,
    grace_s: float = GRACE_S,
    on_response: Callable[[RequestRecord], None] = ignore,
) -> AsyncIterator[RegistryServer]:
    """Serve ``directory`` while the block runs; port 0 takes a free one, ``server.host`` tells which.

    Transfers in progress at the end of the block get ``grace_s`` seconds. Raises OSError when the address
    cannot be listened on.
    """
    server = RegistryServer(directory, auth=auth, page_size=page_size)
    http = HTTPServer(server.handle, tls=tls, on_request=server.record, on_response=on_response)
    listener = await open_port(host, port)
    server.host = address(listener)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(http.serve, listener)
            try:
                yield server
            except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery's group
                failure = error
            http.stop(0.0 if failure else grace_s)
    finally:
        server.close()
    if failure is not None:
        raise failure


def address(listener: trio.SocketListener) -> str:
    """``name:port`` of a listener as clients write it."""
    name, port = listener.socket.getsockname()[:2]
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
