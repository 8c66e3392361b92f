"""Connections that are kept: by one transport for its own requests, or by a daemon for all of its images.

Whoever comes back to a registry within a minute pays neither for connecting nor for finding out whether it
speaks TLS. Authorization is not kept here: it belongs to whoever sends requests.
"""

import os
import ssl
from collections.abc import Callable

import httpx
import trio

from veneer.errors import UsageError
from veneer.transport.address import Origin
from veneer.transport.direct import DirectTransport
from veneer.transport.proxies import ProxyRules

__all__ = ["Connections"]

#: Connections in all. A cold start has some 16 reads in flight; converting adds streams and uploads.
MAX_CONNECTIONS = 64
#: Idle connections that are kept, and how long: below the 60-75 s after which load balancers drop them.
MAX_IDLE_CONNECTIONS = 32
IDLE_EXPIRY_S = 50.0
#: Whoever answers faster is so near that connecting costs nothing worth a request.
FAR_S = 0.005


class Connections:
    """Pools of connections, by the way to the host and by whom they trust. Used by tasks of one trio run.

    Args:
        backend: takes the place of the network, in tests.
    """

    def __init__(self, *, backend: httpx.AsyncBaseTransport | None = None) -> None:
        #: Hosts that may be spoken to without TLS: what they speak.
        self.schemes: dict[str, str] = {}
        self.probes: dict[str, trio.Lock] = {}
        self._answered: dict[Origin, float] = {}
        self._quickest_s: dict[Origin, float] = {}
        self._proxies = ProxyRules.from_environment(os.environ)
        self._backend = backend
        self._backends: dict[tuple[str | None, ssl.SSLContext], httpx.AsyncBaseTransport] = {}

    def note(self, origin: Origin, seconds: float) -> None:
        """Take note that an answer began to come ``seconds`` after its request."""
        self._answered[origin] = trio.current_time()
        self._quickest_s[origin] = min(seconds, self._quickest_s.get(origin, seconds))

    def is_far(self, origin: Origin) -> bool:
        """Whether connecting may take longer than a start notices, and no connection is known to be open."""
        open_until = self._answered.get(origin, -IDLE_EXPIRY_S) + IDLE_EXPIRY_S
        return trio.current_time() >= open_until and self._quickest_s.get(origin, FAR_S) >= FAR_S

    def to(self, origin: Origin, tls: Callable[[], ssl.SSLContext]) -> httpx.AsyncBaseTransport:
        """The pool for an origin. Raises UsageError when the environment's proxy cannot be used."""
        if self._backend is not None:
            return self._backend
        key = self._proxies.proxy_for(origin), tls()
        if (backend := self._backends.get(key)) is None:
            backend = self._backends[key] = _pool(*key)
        return backend

    async def aclose(self) -> None:
        """Close all connections."""
        for backend in self._backends.values():
            await backend.aclose()
        self._backends.clear()


def _pool(proxy: str | None, tls: ssl.SSLContext) -> httpx.AsyncBaseTransport:
    if proxy is None:
        return DirectTransport(
            tls, most=MAX_CONNECTIONS, most_idle=MAX_IDLE_CONNECTIONS, expiry_s=IDLE_EXPIRY_S
        )
    limits = httpx.Limits(
        max_connections=MAX_CONNECTIONS,
        max_keepalive_connections=MAX_IDLE_CONNECTIONS,
        keepalive_expiry=IDLE_EXPIRY_S,
    )
    try:
        return httpx.AsyncHTTPTransport(
            verify=tls, trust_env=False, limits=limits, proxy=proxy and httpx.Proxy(proxy)
        )
    except (ValueError, ImportError, httpx.InvalidURL):
        # Their messages repeat the address, which may hold a password.
        raise UsageError(
            "the proxy that the environment names cannot be used",
            hint="HTTPS_PROXY and HTTP_PROXY take http:// and https:// addresses",
        ) from None
