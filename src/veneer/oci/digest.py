"""Content digests (OCI image-spec, descriptor.md, "Digests").

A digest is always of raw bytes as they were received or stored, never of a re-serialisation.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Protocol, Self

from veneer.errors import IntegrityError, UsageError

__all__ = ["Digest", "Hasher"]

_PATTERN = re.compile(r"(sha256):([a-f0-9]{64})|(sha512):([a-f0-9]{128})")


class Hasher(Protocol):
    """The part of a :mod:`hashlib` object that streaming verification needs."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add bytes."""

    def digest(self) -> bytes:
        """Bytes of the hash so far."""

    def hexdigest(self) -> str:
        """The same in lower-case hexadecimal."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A parsed digest: ``algorithm`` is sha256 or sha512, ``hex`` is lower case and of exact length."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``algorithm:hex``; raises :class:`UsageError` for anything else."""
        match = _PATTERN.fullmatch(text) if len(text) <= 160 else None
        if match is None:
            raise UsageError(
                f"invalid digest {text[:160]!r}",
                hint="a digest is sha256: and 64, or sha512: and 128 lower-case hexadecimal digits",
            )
        return cls(match[1] or match[3], match[2] or match[4])

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, algorithm: str = "sha256") -> Self:
        """The digest of ``data``."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The sha256 digest whose 32 bytes are ``raw``."""
        if len(raw) != 32:
            raise ValueError("a sha256 digest has 32 bytes")
        return cls("sha256", raw.hex())

    @property
    def raw(self) -> bytes:
        """The bytes of the hash: 32 for sha256, 64 for sha512."""
        return bytes.fromhex(self.hex)

    def hasher(self) -> Hasher:
        """A new hash object of this algorithm."""
        return hashlib.new(self.algorithm)

    def check(self, data: bytes | bytearray | memoryview, what: str) -> None:
        """Raise :class:`IntegrityError` unless ``data`` has this digest; ``what`` names it in the message."""
        self.check_hash(hashlib.new(self.algorithm, data), what)

    def check_hash(self, hasher: Hasher, what: str) -> None:
        """The same for bytes that were hashed while they streamed by."""
        if (actual := hasher.hexdigest()) != self.hex:
            raise IntegrityError(f"{what}: expected {self}, got {self.algorithm}:{actual}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
