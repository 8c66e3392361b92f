"""Descriptors (OCI image-spec, descriptor.md).

``from_json`` takes decoded JSON from outside, believes nothing and raises :class:`IntegrityError`;
``to_json`` gives plain dicts with keys in the order of the specification and without empty members.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from veneer.errors import IntegrityError, UsageError
from veneer.oci.digest import Digest
from veneer.oci.platform import Platform

__all__ = ["MAX_BLOB_SIZE", "Descriptor", "Platform", "check_members", "folded", "string_map"]

#: Larger blobs are refused: no registry stores them, and sizes must fit 63 bits with room for sums.
MAX_BLOB_SIZE = 1 << 48

_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")


def folded(names: Iterable[str]) -> dict[str, str]:
    """Names of members, for :func:`check_members`."""
    return {name.casefold(): name for name in names}


def check_members(document: Mapping[str, object], names: Mapping[str, str], what: str) -> None:
    """Raise IntegrityError for a member that readers which ignore case would take for one of ``names``.

    Go's is such a reader, and takes the last of them.
    """
    for name in document:
        if names.get(name.casefold(), name) != name:
            raise IntegrityError(f"{what} has a member {name!r} that some readers would take for another")


_MEMBERS = folded(("mediaType", "digest", "size", "urls", "annotations", "data", "platform", "artifactType"))


def string_map(value: object, what: str) -> dict[str, str]:
    """A JSON object of strings (annotations, labels), checked; None counts as empty."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise IntegrityError(f"{what} is not an object of strings")
    return dict(value)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a blob is (``media_type``), how long it is (``size``, bytes) and what it must hash to."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""

    @classmethod
    def from_json(cls, value: object, what: str = "descriptor") -> Self:
        """Check and parse one descriptor; ``what`` names it in errors."""
        if not isinstance(value, dict):
            raise IntegrityError(f"{what} is not an object")
        check_members(value, _MEMBERS, what)
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
            raise IntegrityError(f"{what} has no valid mediaType")
        if not isinstance(digest, str):
            raise IntegrityError(f"{what} has no digest")
        if type(size) is not int or not 0 <= size <= MAX_BLOB_SIZE:
            raise IntegrityError(f"{what} has no valid size")
        artifact_type = value.get("artifactType") or ""
        if not isinstance(artifact_type, str):
            raise IntegrityError(f"{what} has a malformed artifactType")
        try:
            parsed = Digest.parse(digest)
        except UsageError as error:
            raise IntegrityError(f"{what}: {error.message}") from error
        annotations = string_map(value.get("annotations"), f"annotations of {what}")
        platform = Platform.from_json(value.get("platform"))
        return cls(media_type, parsed, size, annotations, platform, artifact_type)

    def to_json(self) -> dict[str, Any]:
        """The descriptor as a JSON object."""
        out: dict[str, Any] = {"mediaType": self.media_type}
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        out |= {"digest": str(self.digest), "size": self.size}
        if self.platform:
            out["platform"] = self.platform.to_json()
        if self.annotations:
            out["annotations"] = dict(sorted(self.annotations.items()))
        return out
