"""Which profiles are attached to an image: the latest ones, asked for again when the answer is old."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from veneer.errors import NotFound
from veneer.image import hints
from veneer.image.contents import Contents
from veneer.image.hints import FRESH_S, attached_profiles
from veneer.oci.canonical import canonical_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import (
    ANNOTATION_CREATED,
    ANNOTATION_WORKLOAD,
    OCI_MANIFEST,
    VENEER_PROFILE,
    VENEER_PROFILE_ARTIFACT,
)

IMAGE = Descriptor(OCI_MANIFEST, Digest.of(b"image"), 5)
EMPTY = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2)


class Registry:
    """What refers to the image."""

    def __init__(self) -> None:
        self.asked = 0
        self.manifests: dict[Digest, bytes] = {}

    def attach(self, data: bytes, workload: str, created: str, subject: Descriptor = IMAGE) -> None:
        profile = Descriptor(VENEER_PROFILE, Digest.of(data), len(data), {ANNOTATION_WORKLOAD: workload})
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": VENEER_PROFILE_ARTIFACT,
            "config": EMPTY.to_json(),
            "layers": [profile.to_json()],
            "subject": subject.to_json(),
            "annotations": {ANNOTATION_CREATED: created},
        }
        raw = canonical_json(manifest)
        self.manifests[Digest.of(raw)] = raw

    async def referrers(self, _subject: Digest, _kind: str) -> list[Descriptor]:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return [Descriptor(OCI_MANIFEST, digest, len(raw)) for digest, raw in self.manifests.items()]

    async def manifest(self, descriptor: Descriptor, _what: str) -> bytes:
        await trio.lowlevel.checkpoint()
        if not (raw := self.manifests[descriptor.digest]):
            raise NotFound("deleted", status=404)
        return raw

    async def found(self, cache_dir: Path) -> dict[str, Digest]:
        contents = cast("Contents", SimpleNamespace(repository=self, manifest=self.manifest))
        manifest = cast("Manifest", SimpleNamespace(digest=IMAGE.digest))
        every = await attached_profiles(contents, manifest, cache_dir)
        return {one.annotations[ANNOTATION_WORKLOAD]: one.digest for one in every}


async def test_of_each_workload_the_latest_counts_and_only_those_of_the_image(tmp_path: Path) -> None:
    registry = Registry()
    registry.attach(b"new", "web", "2026-02-02T00:00:00Z")
    registry.attach(b"old", "web", "2026-01-01T00:00:00Z")
    registry.attach(b"job", "job", "2025-01-01T00:00:00Z")
    registry.manifests[Digest.of(b"listed, but deleted")] = b""
    registry.manifests[Digest.of(b"no manifest")] = b"{}"
    registry.attach(b"strange", "web", "2027-01-01T00:00:00Z", Descriptor(OCI_MANIFEST, Digest.of(b"x"), 1))
    assert await registry.found(tmp_path) == {"web": Digest.of(b"new"), "job": Digest.of(b"job")}


async def test_an_answer_is_good_for_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, now = Registry(), [1_000_000.0]
    monkeypatch.setattr(hints, "time", SimpleNamespace(time=lambda: now[0]))
    assert await registry.found(tmp_path) == {}
    registry.attach(b"new", "web", "2026-02-02T00:00:00Z")
    now[0] += FRESH_S - 1
    assert await registry.found(tmp_path) == {}
    now[0] += 2
    assert await registry.found(tmp_path) == {"web": Digest.of(b"new")}
    now[0] -= 3 * FRESH_S
    await registry.found(tmp_path)
    assert registry.asked == 3, "a clock that was put back makes no answer good for ever"
    (note,) = (tmp_path / "profiles/attached").iterdir()
    for damage in (
        b"",
        b"{}",
        b'{"asked": 0',
        note.read_bytes()[:-2],
        note.read_bytes().replace(b"sha256", b"sha"),
    ):
        note.write_bytes(damage)
        assert await registry.found(tmp_path) == {"web": Digest.of(b"new")}
    assert registry.asked == 8, "a damaged answer is none"
