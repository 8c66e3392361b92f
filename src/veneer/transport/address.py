"""What a URL or host means for safety: its origin, whether it is this machine, and how it may be shown.

Pure functions. An *origin* is scheme, host and port; credentials never leave the origin they were meant for.
"""

import ipaddress
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

from veneer.errors import RegistryError

__all__ = ["Origin", "is_loopback", "origin_of", "redact_text", "redact_url", "redirect_target", "same_origin"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
#: Presigned URLs have 1-2 KiB; servers refuse more than 8 KiB.
_MAX_URL = 8192
_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
#: Nothing that two URL parsers could read as different hosts.
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xff]|[^\x00-\xff]")


class Origin(NamedTuple):
    """Scheme, lower-case host and port."""

    scheme: str
    host: str
    port: int

    @property
    def address(self) -> str:
        """Host and port as they stand in a URL, and in messages; without the port that the scheme implies."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed only when asked for; raises when it is no number
    except ValueError:
        return None
    return parts if parts.scheme in _DEFAULT_PORTS and _HOST.fullmatch(parts.hostname or "") else None


@lru_cache(maxsize=256)  # asked several times for each request, of few distinct addresses
def origin_of(url: str) -> Origin:
    """The origin of an absolute http(s) URL; raises RegistryError for anything else."""
    if (parts := _split(url)) is None:
        raise RegistryError(f"{redact_url(url)} is not an http or https address")
    return Origin(parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS[parts.scheme])


def same_origin(one: str, other: str) -> bool:
    """Whether credentials for ``one`` may be sent to ``other``."""
    return origin_of(one) == origin_of(other)


def redirect_target(url: str, location: str, what: str) -> str:
    """Where ``location``, an answer to a request for ``url``, leads; ``what`` names the request in errors.

    Refused: no location, a scheme other than http(s), a user or password in it, and going from https to http.
    """
    try:
        target = urljoin(url, location) if location and len(location) <= _MAX_URL else ""
    except ValueError:  # half an IPv6 address
        target = ""
    parts = _split(target)
    if parts is None or _UNSAFE.search(target) or parts.username is not None or parts.password is not None:
        raise RegistryError(f"{what}: {origin_of(url).address} sent an unusable Location")
    if url.startswith("https:") and parts.scheme != "https":
        raise RegistryError(
            f"{what}: {origin_of(url).address} sends from https to plain http at "
            f"{origin_of(target).address}, refused",
            hint="a registry behind a TLS proxy must be told its public address (X-Forwarded-Proto)",
        )
    return target


def is_loopback(host: str) -> bool:
    """Whether ``host`` or ``host:port`` is this machine by its very name, whatever a resolver says."""
    parts = _split(f"http://{host}")
    name = (parts.hostname or "").lower() if parts else ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def redact_url(url: str) -> str:
    """The URL without user, password, query and fragment: those of presigned URLs are credentials."""
    parts = _split(url)
    if parts is None:
        return "an invalid address"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}" + ("?..." if parts.query else "")


def redact_text(text: str, limit: int = 300) -> str:
    """Text from a server, fit for a message: printable, bounded, URLs in it redacted."""
    # Redacted before cutting: a cut must not make a secret part of something that no longer looks like a URL.
    shown = _URL_IN_TEXT.sub(lambda match: redact_url(match[0]), text[: 16 * limit])
    shown = " ".join("".join(char if char.isprintable() else " " for char in shown).split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
