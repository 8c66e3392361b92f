"""What the user may set, read once at the edge and passed inward as one frozen value.

Defaults < ``VENEER_*`` environment < command line. Directories follow the XDG rules for users and the FHS
for root.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from veneer.errors import UsageError
from veneer.oci.platform import Platform

__all__ = ["BACKENDS", "DEFAULT_MOST_REQUESTS", "PULLS", "REFERRERS", "Settings", "parse_size"]

#: Ways to mount; ``auto`` takes the best that works.
BACKENDS = ("auto", "fuse", "erofs-fuse", "erofs-fanotify")

#: Two images that read in parallel, eight requests each. Registries and proxies are used to that many.
DEFAULT_MOST_REQUESTS = 16
#: A transport has no more connections than that.
_MOST_REQUESTS = 64

#: What becomes of sidecars in a registry, which nothing that covers the manifest covers.
REFERRERS = ("accept", "ignore")

#: When the registry is asked what a tag names: always, or when nothing that it named is here.
PULLS = ("always", "missing")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``512M`` or ``10G`` (binary units)."""
    number, unit = text[:-1], text[-1:].upper()
    if unit.isdigit():
        number, unit = text, ""
    if unit not in _UNITS or not number.isascii() or not number.isdigit():
        raise UsageError(f"invalid size {text!r}", hint="write it like 512M or 10G")
    return int(number) * _UNITS[unit]


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one invocation.

    Args:
        cache_dir: devices and indexes; survives restarts and may be deleted at any time nothing is mounted.
        run_dir: state of live mounts; does not survive a reboot.
        cache_quota: bytes that the device cache may take.
        read_deadline_s: how long a read of a mounted file waits for bytes before it fails with EIO.
        platform: which image of a multi-platform index is meant.
        authfile: replaces the usual search for registry credentials.
        ca_file: additional trusted certificates (PEM) for registries.
        insecure: hosts (``host`` or ``host:port``) that may be spoken to over plain HTTP; loopback always may.
        backend: how images are mounted; one of :data:`BACKENDS`.
        most_requests: requests for data that may run at one registry, half of them for one image.
        background_rate: bytes a second that may be fetched for what nobody has asked for; 0 for any number.
        referrers: whether indexes and packs are used that the image's manifest does not name but that refer to
            it; one of :data:`REFERRERS`.
        pull: when the registry is asked what a tag names; one of :data:`PULLS`. Who starts or mounts says so.
    """

    cache_dir: Path
    run_dir: Path
    cache_quota: int
    read_deadline_s: float
    platform: Platform
    authfile: Path | None = None
    ca_file: Path | None = None
    insecure: frozenset[str] = frozenset()
    backend: str = BACKENDS[0]
    most_requests: int = DEFAULT_MOST_REQUESTS
    background_rate: int = 0
    referrers: str = REFERRERS[0]
    pull: str = PULLS[0]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings as the environment has them: that of this process, or ``environ``."""
        env, root = os.environ if environ is None else environ, os.geteuid() == 0
        home = Path(env.get("HOME") or Path.home())
        cache = Path("/var/cache") if root else Path(env.get("XDG_CACHE_HOME") or home / ".cache")
        fallback = "/run" if root else env.get("XDG_RUNTIME_DIR") or f"/tmp/veneer-{os.geteuid()}"
        platform = env.get("VENEER_PLATFORM")
        authfile = env.get("REGISTRY_AUTH_FILE")
        ca_file = env.get("VENEER_CA_FILE")
        return cls(
            cache_dir=Path(env.get("VENEER_CACHE_DIR") or cache / "veneer"),
            run_dir=Path(env.get("VENEER_RUN_DIR") or Path(fallback) / "veneer"),
            cache_quota=parse_size(env.get("VENEER_CACHE_QUOTA") or "20G"),
            read_deadline_s=_seconds(env.get("VENEER_READ_DEADLINE") or "30"),
            platform=Platform.parse(platform) if platform else Platform.host(),
            authfile=Path(authfile) if authfile else None,
            ca_file=Path(ca_file) if ca_file else None,
            insecure=frozenset(filter(None, env.get("VENEER_INSECURE", "").split(","))),
            backend=_backend(env.get("VENEER_BACKEND") or BACKENDS[0]),
            most_requests=_count(env.get("VENEER_MAX_REQUESTS") or str(DEFAULT_MOST_REQUESTS)),
            background_rate=parse_size(env.get("VENEER_BACKGROUND_RATE") or "0"),
            referrers=_referrers(env.get("VENEER_REFERRERS") or REFERRERS[0]),
        )


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=f"one of {', '.join(BACKENDS)}")
    return name


def _referrers(text: str) -> str:
    if text not in REFERRERS:
        raise UsageError(f"VENEER_REFERRERS is {text[:20]!r}", hint=f"one of {', '.join(REFERRERS)}")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= _MOST_REQUESTS):
        raise UsageError(f"invalid number of requests {text[:20]!r}", hint=f"from 1 to {_MOST_REQUESTS}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise UsageError(f"invalid number of seconds {text!r}")
    return value
