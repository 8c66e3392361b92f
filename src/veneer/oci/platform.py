"""What images run on (OCI image-spec, image-index.md)."""

import os
import re
from dataclasses import dataclass
from typing import Self

from veneer.errors import IntegrityError, UsageError

__all__ = ["Platform"]

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on, as in ``linux/arm/v7``."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``os/arch[/variant]``."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", p) for p in parts):
            raise UsageError(f"invalid platform {text!r}", hint="write it as os/arch or os/arch/variant")
        return cls(*parts)

    @classmethod
    def host(cls) -> Self:
        """The platform of this machine."""
        machine = os.uname().machine
        return cls("linux", _MACHINES.get(machine, machine), "v7" if machine == "armv7l" else "")

    @classmethod
    def from_json(cls, value: object) -> Self | None:
        """The ``platform`` member of a descriptor, or None when it is absent."""
        if value is None:
            return None
        if not isinstance(value, dict):
            raise IntegrityError("platform of a descriptor is not an object")
        parts = [value.get(key, "") for key in ("os", "architecture", "variant")]
        if not all(isinstance(part, str) and len(part) <= 64 for part in parts):
            raise IntegrityError("platform of a descriptor is malformed")
        return cls(*parts)

    def to_json(self) -> dict[str, str]:
        """The ``platform`` member of a descriptor."""
        out = {"architecture": self.architecture, "os": self.os}
        if self.variant:
            out["variant"] = self.variant
        return out

    def matches(self, wanted: "Platform") -> bool:
        """Whether an image of this platform satisfies ``wanted`` (an empty variant wants any)."""
        return (self.os, self.architecture) == (wanted.os, wanted.architecture) and (
            not wanted.variant or not self.variant or self.variant == wanted.variant
        )

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))
