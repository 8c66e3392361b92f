"""index.json against a model, and from hostile bytes."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oci.strategies import damaged
from veneer.errors import IntegrityError
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_MANIFEST
from veneer.source.layout_index import EMPTY_INDEX, REF_NAME, LayoutIndex

MANIFESTS = [Descriptor(OCI_MANIFEST, Digest.of(bytes([number])), number) for number in range(4)]
ENTRY = {
    "mediaType": OCI_MANIFEST,
    "digest": str(Digest.of(b"x")),
    "size": 1,
    "annotations": {REF_NAME: "v1"},
    "platform": {"os": "linux", "architecture": "amd64"},
}
FULL = {
    "schemaVersion": 2,
    "manifests": [ENTRY, ENTRY | {"digest": str(Digest.of(b"y"))}],
    "annotations": {"a": "b"},
}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(MANIFESTS), st.sampled_from(["", "a", "b", "c"])), max_size=12))
def test_pushes_in_any_order(pushes: list[tuple[Descriptor, str]]) -> None:
    """A tag names what was pushed last under it; whatever was pushed stays listed; no entry is there twice."""
    data, tags, pushed = EMPTY_INDEX, {}, set()
    for manifest, tag in pushes:
        data = LayoutIndex.parse(data, "index.json").with_manifest(manifest, tag) or data
        pushed.add(manifest.digest)
        if tag:
            tags[tag] = manifest.digest
        index = LayoutIndex.parse(data, "index.json")
        assert {name: [entry.digest for entry in index.tagged(name)] for name in index.tags} == {
            name: [digest] for name, digest in tags.items()
        }
        assert {entry.digest for entry in index.entries} == pushed
        rows = [(entry.digest, entry.annotations.get(REF_NAME)) for entry in index.entries]
        assert len(rows) == len(set(rows))
        assert len(rows) <= len(tags) + len(pushed)
        assert index.with_manifest(manifest, tag) is None


@settings(deadline=None, max_examples=300)
@given(damaged(FULL), st.sampled_from(["", "v1", "v2"]))
def test_damaged_files_parse_or_are_refused(document: Any, tag: str) -> None:
    try:
        index = LayoutIndex.parse(json.dumps(document).encode(), "index.json")
    except IntegrityError:
        return
    changed = index.with_manifest(MANIFESTS[0], tag)
    assert changed is not None
    after = LayoutIndex.parse(changed, "index.json")
    assert after.listed(MANIFESTS[0].digest)
    assert {entry.digest for entry in index.entries} <= {entry.digest for entry in after.entries}
