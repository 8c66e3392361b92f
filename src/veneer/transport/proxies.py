"""Which proxy a request takes, as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY in the environment say.

The rules are those of the Go tools that users of registries know: names in lower case win, ``NO_PROXY`` takes
names (with their subdomains), addresses, ``host:port`` and CIDR ranges, and loopback is never proxied.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from veneer.transport.address import Origin, is_loopback

__all__ = ["ProxyRules"]


@dataclass(frozen=True, slots=True, repr=False)
class ProxyRules:
    """The proxies of one environment. Never shown: their addresses may hold passwords.

    Args:
        proxies: scheme -> address of its proxy.
        exempt: the items of ``NO_PROXY``, in lower case.
    """

    proxies: Mapping[str, str]
    exempt: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The rules in ``environment``."""

        def variable(name: str) -> str:
            return (environment.get(name) or environment.get(name.upper()) or "").strip()

        fallback = variable("all_proxy")
        proxies = {scheme: variable(f"{scheme}_proxy") or fallback for scheme in ("http", "https")}
        if "REQUEST_METHOD" in environment:  # a CGI: HTTP_PROXY is a request header there ("httpoxy")
            proxies["http"] = environment.get("http_proxy", "") or fallback
        exempt = tuple(item.strip().lower() for item in variable("no_proxy").split(",") if item.strip())
        return cls({s: p if "://" in p else f"http://{p}" for s, p in proxies.items() if p}, exempt)

    def proxy_for(self, origin: Origin) -> str | None:
        """Address of the proxy for requests to ``origin``, or None for a direct connection."""
        proxy = self.proxies.get(origin.scheme)
        if proxy is None or self._is_exempt(origin):
            return None
        return proxy

    def _is_exempt(self, origin: Origin) -> bool:
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        return is_loopback(host) or any(_matches(item, origin) for item in self.exempt)


def _matches(item: str, origin: Origin) -> bool:
    if item == "*":
        return True
    try:
        return ipaddress.ip_address(origin.host) in ipaddress.ip_network(item.strip("[]"), strict=False)
    except ValueError:
        pass  # one of the two is a name, or the item has a port
    name, _, port = item.rpartition(":")
    if name and port.isdecimal():
        if int(port) != origin.port:
            return False
        item = name.strip("[]")
    item = item.removeprefix("*").removeprefix(".")
    return origin.host == item or origin.host.endswith(f".{item}")
