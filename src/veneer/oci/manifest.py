"""Image manifests and image indexes: OCI image-spec 1.1 and Docker schema 2, parsed strictly.

A parsed value keeps the raw bytes; its digest is of those and never of a re-serialisation. What the bytes
say and what the outside (a Content-Type, a descriptor) says must agree, and a document that could be read
both as a manifest and as an index is refused: a signature over it would cover two different images.

Not for: fetching, following nested indexes, or deciding which layers can be read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.oci.canonical import Json, canonical_json, parse_json
from veneer.oci.descriptor import Descriptor, Platform, check_members, folded, string_map
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import DOCKER_CONFIG, DOCKER_MANIFEST, INDEXES, MANIFESTS, OCI_INDEX, OCI_MANIFEST

__all__ = [
    "MAX_INDEX_ENTRIES",
    "MAX_LAYERS",
    "MAX_MANIFEST_SIZE",
    "Index",
    "Manifest",
    "build_index",
    "build_manifest",
    "parse_manifest",
]

#: Registries must accept 4 MiB (distribution-spec 1.1) and other clients refuse more.
MAX_MANIFEST_SIZE = 4 << 20
#: The kernel's overlayfs stacks 500 layers and Docker builds 127: more is an attack or a mistake.
MAX_LAYERS = 1_000
#: As many entries of usual length as fit the size limit; the largest index seen in public has some 2,000.
MAX_INDEX_ENTRIES = 10_000

#: Content types that say nothing about the document; static file servers and old registries send them.
_VAGUE_TYPES = frozenset({"", "application/json", "application/octet-stream", "text/plain"})
_SCHEMA_1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
_FOREIGN = ("fsLayers", "history")  # of Docker schema 1
#: Members that give a document its meaning.
_MEMBERS = folded(
    (
        *("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "subject"),
        *("annotations", *_FOREIGN),
    )
)
_FOREIGN_TO_MANIFESTS = ("manifests", *_FOREIGN)
_FOREIGN_TO_INDEXES = ("config", "layers", *_FOREIGN)
#: What an architecture without a variant means, as in ``linux/arm`` for ``linux/arm/v7``.
_USUAL_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
_NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})


class _Document:
    """What manifests and indexes have in common."""

    __slots__ = ()
    media_type: str
    raw: bytes

    @property
    def digest(self) -> Digest:
        """SHA-256 of the raw bytes."""
        return Digest.of(self.raw)

    @property
    def descriptor(self) -> Descriptor:
        """Media type, digest and size of the raw bytes."""
        return Descriptor(self.media_type, self.digest, len(self.raw))


@dataclass(frozen=True, slots=True)
class Manifest(_Document):
    """One image for one platform, or an artifact: a config and the layers, lowest first.

    Args:
        media_type: the one it states, or the one its shape implies.
        artifact_type: "" for images.
        subject: the manifest that this one says something about.
        raw: the bytes that its digest is of.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Descriptor | None
    artifact_type: str
    raw: bytes

    @classmethod
    def parse(cls, data: bytes, media_type: str | None = None) -> Self:
        """Parse a manifest; ``media_type`` is what the outside calls it. Raises for an index."""
        document, stated = _open(data, media_type)
        if stated not in MANIFESTS:
            raise UnsupportedFormat(f"expected an image manifest, got an image index ({stated})")
        return cls._of(document, stated, data)

    @classmethod
    def _of(cls, document: dict[str, Json], media_type: str, raw: bytes) -> Self:
        return cls(
            media_type,
            Descriptor.from_json(document.get("config"), "config descriptor"),
            _descriptors(document.get("layers"), "layer", MAX_LAYERS),
            string_map(document.get("annotations"), "annotations of the manifest"),
            _subject(document),
            _artifact_type(document),
            raw,
        )

    @property
    def referrer(self) -> Descriptor:
        """The descriptor as a list of referrers shows it: with artifact type and annotations."""
        kind = self.artifact_type or self.config.media_type
        return Descriptor(self.media_type, self.digest, len(self.raw), self.annotations, artifact_type=kind)


@dataclass(frozen=True, slots=True)
class Index(_Document):
    """Several manifests, one for each platform, or further indexes."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Descriptor | None
    artifact_type: str
    raw: bytes

    @classmethod
    def parse(cls, data: bytes, media_type: str | None = None) -> Self:
        """Parse an index; ``media_type`` is what the outside calls it. Raises for a manifest."""
        document, stated = _open(data, media_type)
        if stated not in INDEXES:
            raise UnsupportedFormat(f"expected an image index, got an image manifest ({stated})")
        return cls._of(document, stated, data)

    @classmethod
    def _of(cls, document: dict[str, Json], media_type: str, raw: bytes) -> Self:
        return cls(
            media_type,
            _descriptors(document.get("manifests"), "index entry", MAX_INDEX_ENTRIES),
            string_map(document.get("annotations"), "annotations of the index"),
            _subject(document),
            _artifact_type(document),
            raw,
        )

    @property
    def referrer(self) -> Descriptor:
        """The descriptor as a list of referrers shows it: with artifact type and annotations."""
        return Descriptor(
            self.media_type, self.digest, len(self.raw), self.annotations, artifact_type=self.artifact_type
        )

    def select(self, platform: Platform, what: str) -> Descriptor:
        """The entry for ``platform``, which may be an index again.

        The very same variant is preferred, then the usual one of the architecture, then the first entry
        that the platform accepts. An entry that names no platform is taken only when it is the only one of
        its kind: then there is nothing to choose, and its config says what it runs on.

        Raises NotFound that lists the platforms of ``what``.
        """
        images = [entry for entry in self.manifests if entry.media_type in MANIFESTS + INDEXES]
        offers = [(entry, entry.platform) for entry in images if entry.platform is not None]
        fitting = [(entry, offer) for entry, offer in offers if offer.matches(platform)]
        if fitting:
            usual = _USUAL_VARIANTS.get(platform.architecture, "")
            preference = [platform.variant, usual, ""]

            def rank(fit: tuple[Descriptor, Platform]) -> int:
                variant = fit[1].variant
                return preference.index(variant) if variant in preference else len(preference)

            return min(fitting, key=rank)[0]
        unspecified = [entry for entry in images if entry.platform is None and not entry.artifact_type]
        if len(unspecified) == 1 and not offers:
            return unspecified[0]
        names = sorted({str(offer) for _, offer in offers if offer.os != "unknown"})
        raise NotFound(
            f"{what} has no image for {platform}",
            hint=f"it has {', '.join(names[:20])}; choose with --platform" if names else None,
        )


def parse_manifest(data: bytes, media_type: str | None) -> Manifest | Index:
    """Parse whichever of the two ``data`` is; ``media_type`` is what the outside calls it, if anything.

    Raises IntegrityError for what is malformed or contradicts itself or ``media_type``, and
    UnsupportedFormat for other kinds of documents.
    """
    document, stated = _open(data, media_type)
    reader = Manifest._of if stated in MANIFESTS else Index._of
    return reader(document, stated, data)


def build_manifest(
    config: Descriptor,
    layers: Sequence[Descriptor],
    *,
    annotations: Mapping[str, str] = _NO_ANNOTATIONS,
    subject: Descriptor | None = None,
    artifact_type: str = "",
    media_type: str = OCI_MANIFEST,
) -> bytes:
    """The canonical bytes of a manifest; equal arguments give equal bytes."""
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": media_type}
    if artifact_type:
        document["artifactType"] = artifact_type
    document |= {"config": config.to_json(), "layers": [layer.to_json() for layer in layers]}
    return _finish(document, subject, annotations)


def build_index(
    manifests: Sequence[Descriptor],
    *,
    annotations: Mapping[str, str] = _NO_ANNOTATIONS,
    subject: Descriptor | None = None,
    artifact_type: str = "",
    media_type: str = OCI_INDEX,
) -> bytes:
    """The canonical bytes of an image index; equal arguments give equal bytes."""
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": media_type}
    if artifact_type:
        document["artifactType"] = artifact_type
    document["manifests"] = [entry.to_json() for entry in manifests]
    return _finish(document, subject, annotations)


def _finish(document: dict[str, object], subject: Descriptor | None, annotations: Mapping[str, str]) -> bytes:
    if subject:
        document["subject"] = subject.to_json()
    if annotations:
        document["annotations"] = dict(sorted(annotations.items()))
    return canonical_json(document)


def _open(data: bytes, media_type: str | None) -> tuple[dict[str, Json], str]:
    """The decoded document and its media type, when all that names its kind agrees."""
    if media_type in _SCHEMA_1:
        raise _schema_1()
    document = parse_json(data, "manifest", limit=MAX_MANIFEST_SIZE)
    if not isinstance(document, dict):
        raise IntegrityError("manifest is not a JSON object")
    check_members(document, _MEMBERS, "manifest")
    version = document.get("schemaVersion")
    if type(version) is int and version == 1:
        raise _schema_1()
    if type(version) is not int or version != 2:
        raise IntegrityError(f"manifest has schemaVersion {str(version)[:20]!r}, expected 2")
    stated = _media_type(document, media_type)
    foreign = _FOREIGN_TO_MANIFESTS if stated in MANIFESTS else _FOREIGN_TO_INDEXES
    if extra := [name for name in foreign if name in document]:
        kind = "an image manifest" if stated in MANIFESTS else "an image index"
        raise IntegrityError(f"ambiguous manifest: {kind} ({stated}) with {' and '.join(extra)}")
    return document, stated


def _media_type(document: dict[str, Json], outside: str | None) -> str:
    inside = document.get("mediaType")
    if inside is not None and not isinstance(inside, str):
        raise IntegrityError("mediaType of the manifest is not a string")
    if outside in _VAGUE_TYPES:
        outside = None
    if inside and outside and inside != outside:
        raise IntegrityError(f"manifest says it is {inside[:160]!r} but is served as {outside[:160]!r}")
    stated = inside or outside or _implied_type(document)
    if stated not in MANIFESTS + INDEXES:
        raise UnsupportedFormat(
            f"unknown manifest type {stated[:160]!r}", hint="OCI and Docker schema 2 images can be read"
        )
    return stated


def _implied_type(document: dict[str, Json]) -> str:
    """OCI lets the media type be left out; config or manifests tell the kinds apart."""
    if "manifests" in document:
        return OCI_INDEX
    config = document.get("config")
    if not isinstance(config, dict):
        raise IntegrityError("manifest has neither mediaType nor config nor manifests")
    return DOCKER_MANIFEST if config.get("mediaType") == DOCKER_CONFIG else OCI_MANIFEST


def _schema_1() -> UnsupportedFormat:
    return UnsupportedFormat(
        "the image has a Docker schema 1 manifest",
        hint="this format was given up in 2019; push the image again with a current tool",
    )


def _descriptors(value: Json, what: str, limit: int) -> tuple[Descriptor, ...]:
    if value is None:  # how Go writes a list that nobody filled
        return ()
    if not isinstance(value, list):
        raise IntegrityError(f"the list of {what} descriptors is not a list")
    if len(value) > limit:
        raise IntegrityError(f"{len(value)} {what} descriptors, more than the {limit} allowed")
    return tuple(Descriptor.from_json(item, f"{what} {number}") for number, item in enumerate(value))


def _subject(document: dict[str, Json]) -> Descriptor | None:
    value = document.get("subject")
    return None if value is None else Descriptor.from_json(value, "subject")


def _artifact_type(document: dict[str, Json]) -> str:
    value = document.get("artifactType") or ""
    if not isinstance(value, str):
        raise IntegrityError("artifactType of the manifest is not a string")
    return value
