"""What a user may say about a container, checked: the options of ``veneer run`` and ``veneer bundle``."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from veneer.errors import UsageError

__all__ = ["ContainerOptions", "Volume", "parse_environment", "parse_volume"]

#: The network of the host, or one with nothing but loopback in it.
NETWORKS = ("host", "none")


@dataclass(frozen=True, slots=True)
class Volume:
    """A file or directory of the host, seen in the container."""

    source: Path
    destination: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ContainerOptions:
    """How a container differs from what its image says.

    Args:
        arguments: replace the image's cmd; () keeps it.
        entrypoint: replaces the image's entrypoint and drops its cmd; None keeps both.
        environment: added to the image's, or put in place of it.
        volumes: more mounts.
        hostname: "" for the host's name on the host's network, else for one made up.
        user: "" for the image's.
        working_dir: "" for the image's.
        network: one of :data:`NETWORKS`.
        terminal: give it a terminal.
        interactive: connect standard input.
        read_only: do not let it write to its root.
    """

    arguments: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    hostname: str = ""
    user: str = ""
    working_dir: str = ""
    network: str = "host"
    terminal: bool = False
    interactive: bool = False
    read_only: bool = False

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise UsageError(f"unknown network {self.network!r}", hint=f"one of {', '.join(NETWORKS)}")
        if self.working_dir and not self.working_dir.startswith("/"):
            raise UsageError(f"working directory {self.working_dir!r} is not absolute")

    def to_json(self) -> dict[str, object]:
        """The options by name."""
        volumes = [[os.fspath(v.source), v.destination, v.read_only] for v in self.volumes]
        return asdict(self) | {"volumes": volumes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote."""
        entrypoint = value["entrypoint"]
        return cls(
            **value
            | {
                "arguments": tuple(value["arguments"]),
                "entrypoint": None if entrypoint is None else tuple(entrypoint),
                "volumes": tuple(Volume(Path(source), *rest) for source, *rest in value["volumes"]),
            }
        )


def parse_volume(text: str) -> Volume:
    """Parse ``SRC:DST[:ro|rw]``."""
    source, *rest = text.split(":")
    mode = rest[1] if len(rest) == 2 else "rw"
    if len(rest) not in (1, 2) or not source or not rest[0] or mode not in ("ro", "rw"):
        raise UsageError(f"invalid volume {text!r}", hint="write it as SRC:DST or SRC:DST:ro")
    if not rest[0].startswith("/") or os.path.normpath(rest[0]) == "/":
        raise UsageError(f"volume {text!r}: {rest[0]} must be an absolute path below /")
    if not os.path.lexists(source):
        raise UsageError(f"volume {text!r}: {source} does not exist")
    return Volume(Path(source).absolute(), rest[0], mode == "ro")


def parse_environment(items: Sequence[str]) -> dict[str, str]:
    """Parse ``NAME=VALUE``; ``NAME`` alone passes the variable on if it is set here."""
    out: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name:
            raise UsageError(f"invalid environment variable {item!r}", hint="write it as NAME=VALUE")
        if equals:
            out[name] = value
        elif name in os.environ:
            out[name] = os.environ[name]
    return out
