"""``index.json`` of an OCI layout: what it lists, and the same with one manifest more. Pure.

The file belongs to several tools. What this one does not understand (members, annotations, platforms with
features) is written back as it was; only the entry and the tag concerned change.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from veneer.errors import IntegrityError, VeneerError
from veneer.oci.canonical import Json, canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE, Index
from veneer.oci.mediatypes import INDEXES, MANIFESTS, OCI_INDEX

__all__ = ["EMPTY_INDEX", "REF_NAME", "LayoutIndex", "referrers_tag"]

#: The annotation that holds a tag.
REF_NAME = "org.opencontainers.image.ref.name"
EMPTY_INDEX = canonical_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})

#: Tags that tools make to attach things to a manifest: the referrers fallback, and cosign's.
_ATTACHMENT_TAG = re.compile(r"sha(?:256|512)-[0-9a-f]{64}(?:\.[a-z]+)?")


def referrers_tag(subject: Digest) -> str:
    """The tag of the index of referrers, where a registry has no API for them (distribution-spec)."""
    return f"{subject.algorithm}-{subject.hex[:64]}"


@dataclass(frozen=True, slots=True)
class LayoutIndex:
    """A parsed ``index.json``; ``entries`` are in its order, with their annotations."""

    entries: tuple[Descriptor, ...]
    _document: Mapping[str, Json]

    @classmethod
    def parse(cls, data: bytes, what: str) -> Self:
        """Parse the file; ``what`` names it in the IntegrityError."""
        try:
            entries = Index.parse(data, OCI_INDEX).manifests
        except VeneerError as error:
            raise IntegrityError(f"{what}: {error.message}", hint=error.hint) from error
        document = parse_json(data, what, limit=MAX_MANIFEST_SIZE)
        assert isinstance(document, dict)
        return cls(entries, document)

    @property
    def tags(self) -> list[str]:
        """Tags of images, sorted; without those that attach something to an image."""
        names = {entry.annotations.get(REF_NAME, "") for entry in self.entries}
        return sorted(name for name in names if name and not _ATTACHMENT_TAG.fullmatch(name))

    @property
    def images(self) -> list[Descriptor]:
        """The distinct manifests and indexes, those aside that a tag attaches to another."""
        found: dict[Digest, Descriptor] = {}
        for entry in self.entries:
            attached = _ATTACHMENT_TAG.fullmatch(entry.annotations.get(REF_NAME, ""))
            if entry.media_type in MANIFESTS + INDEXES and not attached:
                found.setdefault(entry.digest, entry)
        return list(found.values())

    def tagged(self, tag: str) -> list[Descriptor]:
        """The distinct entries with this tag: one in any sane layout."""
        found = {entry.digest: entry for entry in self.entries if entry.annotations.get(REF_NAME) == tag}
        return list(found.values())

    def listed(self, digest: Digest) -> Descriptor | None:
        """The first entry with this digest."""
        return next((entry for entry in self.entries if entry.digest == digest), None)

    def with_manifest(self, manifest: Descriptor, tag: str) -> bytes | None:
        """The file with ``manifest`` listed and tagged, or None when nothing changes.

        A manifest that loses its tag stays listed without one, as skopeo has it: collectors of garbage
        would otherwise remove it under its users.
        """
        present = (
            self.tagged(tag) if tag else [entry for entry in self.entries if entry.digest == manifest.digest]
        )
        if [entry.digest for entry in present[:2]] == [manifest.digest] or (present and not tag):
            return None
        rows = [_row(entry) for entry in _list(self._document.get("manifests"))]
        listed = manifest.to_json()
        if tag:
            rows = _without_tag(rows, tag)
            listed["annotations"] = {**manifest.annotations, REF_NAME: tag}
        for place, row in enumerate(rows):
            if row["digest"] == listed["digest"] and _tag(row) is None:
                annotations = _annotations(row) | listed["annotations"]
                rows[place] = {**row, **listed, "annotations": annotations}
                break
        else:
            rows.append(listed)
        return canonical_json({**self._document, "manifests": rows})


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _row(value: Json) -> dict[str, Json]:
    assert isinstance(value, dict)  # Index.parse has seen it
    return value


def _annotations(row: dict[str, Json]) -> dict[str, Json]:
    annotations = row.get("annotations")
    return annotations if isinstance(annotations, dict) else {}


def _tag(row: dict[str, Json]) -> Json:
    return _annotations(row).get(REF_NAME)


def _without_tag(rows: list[dict[str, Json]], tag: str) -> list[dict[str, Json]]:
    """The rows with ``tag`` taken off; a row that would then say nothing new goes."""
    listed = {row["digest"] for row in rows if _tag(row) != tag}
    kept = []
    for row in rows:
        if _tag(row) == tag:
            if row["digest"] in listed:
                continue
            listed.add(row["digest"])
            rest = {name: text for name, text in _annotations(row).items() if name != REF_NAME}
            row = {name: value for name, value in row.items() if name != "annotations"}
            row = row | {"annotations": rest} if rest else row
        kept.append(row)
    return kept
