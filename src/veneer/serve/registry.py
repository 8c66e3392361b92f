"""The embedded registry: OCI layouts under a directory, served by the distribution API (spec 1.1).

For demonstrations, tests, laboratories and small private use on one machine. It stores nothing of its own:
what it serves can be copied with any tool that knows OCI layouts, and the other way round.
"""

import re
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from veneer.errors import VeneerError
from veneer.serve.api import APIError, error_response
from veneer.serve.auth import Access, Authorizer, BasicAuth, TokenAuth
from veneer.serve.blobs import BlobHandlers
from veneer.serve.http import HTTPServer, RequestRecord, open_port
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
_ROUTES = (
    ("session", re.compile(r"/v2/(.+)/blobs/uploads/([^/]+)"), ("GET", "PATCH", "PUT", "DELETE")),
    ("begin", re.compile(r"/v2/(.+)/blobs/uploads/?()"), ("POST",)),
    ("blob", re.compile(r"/v2/(.+)/blobs/([^/]+)"), ("GET", "HEAD", "DELETE")),
    ("manifest", re.compile(r"/v2/(.+)/manifests/([^/]+)"), ("GET", "HEAD", "PUT", "DELETE")),
    ("tags", re.compile(r"/v2/(.+)/tags/list()"), ("GET", "HEAD")),
    ("referrers", re.compile(r"/v2/(.+)/referrers/([^/]+)"), ("GET", "HEAD")),
)


def _ignore(_record: RequestRecord) -> None:
    """Nobody watches."""


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
            response = error_response(APIError("UNKNOWN", error.message))
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
        for kind, pattern, methods in _ROUTES:
            match = pattern.fullmatch(path)
            if match is not None:
                _check_method(request, methods)
                name, rest = match[1], match[2]
                await self._authorize(request, _needed(request, kind, name))
                return await self._dispatch(kind, request, name, rest)
        raise APIError("UNSUPPORTED", "no such endpoint", status=404)

    async def _dispatch(self, kind: str, request: Request, name: str, rest: str) -> Response:
        match kind:
            case "session":
                return await self._blobs.session(request, name, rest)
            case "begin":
                return await self._blobs.begin(request, name)
            case "blob":
                return await self._blobs.blob(request, name, rest)
            case "manifest":
                return await self._manifests.manifest(request, name, rest)
            case "tags":
                return await self._manifests.tags(request, name)
            case _:
                return await self._manifests.referrers(request, name, rest)

    async def _authorize(self, request: Request, needed: Sequence[Access]) -> None:
        if self._auth is not None:
            await self._auth.authorize(request, needed, self.host)


def _check_method(request: Request, methods: Sequence[str]) -> None:
    if request.method not in methods:
        allow = (("Allow", ", ".join(methods)),)
        raise APIError("UNSUPPORTED", f"{request.method} is not possible here", headers=allow)


def _needed(request: Request, kind: str, name: str) -> list[Access]:
    """The rights that a request needs; those for pushing include pulling, as clients ask for both."""
    if kind in ("session", "begin") or request.method == "PUT":
        needed = [Access(name, "pull"), Access(name, "push")]
    else:
        needed = [Access(name, "delete" if request.method == "DELETE" else "pull")]
    if kind == "begin" and request.param("mount") and request.param("from") not in ("", name):
        needed.append(Access(request.param("from"), "pull"))
    return needed


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
    on_response: Callable[[RequestRecord], None] = _ignore,
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
