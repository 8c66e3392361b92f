"""OCI layouts beyond the repository contract: the directory, index.json, tags and referrers."""

import json
import os
from pathlib import Path

import pytest

from tests.contract.repository_suite import described, digests, push, push_image, push_referrer
from tests.source.on_disk import REF_NAME, blob_file, edit_index, exists, files, index_of
from veneer.errors import IntegrityError, NotFound, UnsupportedFormat, UsageError
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_index, build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from veneer.source.layout import OCILayout

# The directory.


async def test_nothing_is_made_before_the_first_push(layout: OCILayout, path: Path) -> None:
    assert not await layout.has_blob(described(b"x"))
    with pytest.raises(NotFound, match="not an OCI layout"):
        await layout.manifest("latest")
    with pytest.raises(NotFound):
        await layout.referrers(Digest.of(b"x"))
    assert not exists(path)


async def test_a_layout_is_made_only_when_asked(path: Path) -> None:
    layout = OCILayout(path)
    with pytest.raises(NotFound):
        await push(layout, b"x")
    with pytest.raises(NotFound):
        await layout.push_manifest(build_index([]), OCI_INDEX)
    assert not exists(path)


async def test_what_is_written(layout: OCILayout, path: Path) -> None:
    image, _ = await push_image(layout, "v1")
    assert json.loads((path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert index_of(path) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [image.to_json() | {"annotations": {REF_NAME: "v1"}}],
    }
    assert {name for name in files(path) if not name.startswith("blobs/sha256/")} == {
        "oci-layout",
        "index.json",
        ".veneer-lock",
    }
    assert blob_file(path, image.digest).stat().st_mode & 0o444 == 0o444


async def test_directories_with_other_things_in_them_are_left_alone(path: Path) -> None:
    (path.parent / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        await push(OCILayout(path.parent, create=True), b"x")
    assert files(path.parent) == {"thesis.txt"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"imageLayoutVersion": "2.0.0"}', UnsupportedFormat),
        ('{"imageLayoutVersion": 1}', IntegrityError),
        ("{}", IntegrityError),
        ("[]", IntegrityError),
        ("", IntegrityError),
        ('{"imageLayoutVersion": "1.0.0"}' + " " * 5000, IntegrityError),
    ],
)
async def test_version_of_the_layout(
    layout: OCILayout, path: Path, content: str, error: type[Exception]
) -> None:
    await push_image(layout, "v1")
    (path / "oci-layout").write_text(content)
    for other in (OCILayout(path), OCILayout(path, create=True)):
        with pytest.raises(error):
            await other.resolve("v1")
        with pytest.raises(error):
            await push(other, b"another")


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"schemaVersion": 2, "manifests": [{}]}', " " * (5 << 20)]
)
async def test_damaged_index(layout: OCILayout, path: Path, content: str | None) -> None:
    await push_image(layout, "v1")
    if content is None:
        (path / "index.json").unlink()
    else:
        (path / "index.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"index\.json"):
        await layout.resolve("v1")
    with pytest.raises(IntegrityError, match=r"index\.json"):
        await push_image(layout, "v2")
    if content is not None:
        assert (path / "index.json").read_text() == content


# Choosing an image.


async def test_only_image(layout: OCILayout) -> None:
    image, _ = await push_image(layout)
    assert await layout.resolve("") == image
    await push_image(layout, "v1")
    assert await layout.resolve("") == image
    await push_referrer(layout, image, "application/vnd.example.sbom")
    assert await layout.resolve("") == image


async def test_parts_of_the_only_index_do_not_count(layout: OCILayout) -> None:
    one, _ = await push_image(layout, "", b"one")
    two, _ = await push_image(layout, "", b"two")
    index = await layout.push_manifest(build_index([one, two]), OCI_INDEX)
    assert await layout.resolve("") == index


async def test_several_images_are_listed(layout: OCILayout, path: Path) -> None:
    await push_image(layout, "v2", b"two")
    await push_image(layout, "v1", b"one")
    attached = Digest.of(b"x")
    await push_image(layout, f"sha256-{attached.hex}", b"attached")
    with pytest.raises(UsageError, match="2 images") as caught:
        await layout.resolve("")
    assert caught.value.hint == "it has the tags v1, v2"
    assert await layout.tags() == ["v1", "v2"]
    with pytest.raises(NotFound) as missing:
        await layout.resolve("v3")
    assert missing.value.hint == "it has the tags v1, v2"


async def test_empty_layout_has_no_only_image(layout: OCILayout) -> None:
    await push(layout, b"x")
    with pytest.raises(NotFound, match="holds no image"):
        await layout.resolve("")


async def test_a_tag_of_two_manifests_is_refused(layout: OCILayout, path: Path) -> None:
    one, _ = await push_image(layout, "v1", b"one")
    two, _ = await push_image(layout, "", b"two")
    edit_index(path, two.to_json() | {"annotations": {REF_NAME: "v1"}})
    with pytest.raises(IntegrityError, match="2 manifests"):
        await layout.resolve("v1")
    assert await layout.resolve(str(one.digest)) == one
    await push_image(layout, "v1", b"one")
    assert await layout.resolve("v1") == one


async def test_a_tag_that_looks_like_a_digest_is_no_digest(layout: OCILayout, path: Path) -> None:
    image, _ = await push_image(layout, "v1")
    false = str(Digest.of(b"another"))
    edit_index(path, image.to_json() | {"annotations": {REF_NAME: false}})
    with pytest.raises(NotFound):
        await layout.resolve(false)


async def test_names_that_other_tools_use_as_tags(layout: OCILayout, path: Path) -> None:
    image, _ = await push_image(layout)
    edit_index(path, image.to_json() | {"annotations": {REF_NAME: "docker.io/library/app:1"}})
    assert await layout.resolve("docker.io/library/app:1") == image


@pytest.mark.parametrize("tag", ["a/b", "../x", "-", "a b", "t" * 129, "a\n"])
async def test_invalid_tags_are_not_written(layout: OCILayout, path: Path, tag: str) -> None:
    with pytest.raises(UsageError):
        await layout.push_manifest(build_index([]), OCI_INDEX, tag)
    assert not exists(path)


async def test_what_others_wrote_into_the_index_stays(layout: OCILayout, path: Path) -> None:
    await push(layout, b"x")
    strange = {
        "mediaType": OCI_MANIFEST,
        "digest": str(Digest.of(b"elsewhere")),
        "size": 9,
        "platform": {"architecture": "amd64", "os": "windows", "os.version": "10", "os.features": ["a"]},
        "urls": ["https://example.org/"],
        "annotations": {"org.example": "kept", REF_NAME: "v1"},
        "x-unknown": [1, {"a": None}],
    }
    edit_index(path, strange, annotations={"org.example": "index"}, **{"x-top": True})
    image, _ = await push_image(layout, "v1")
    document = index_of(path)
    assert document["annotations"] == {"org.example": "index"}
    assert document["x-top"] is True
    untagged = strange | {"annotations": {"org.example": "kept"}}
    assert document["manifests"] == [untagged, image.to_json() | {"annotations": {REF_NAME: "v1"}}]


async def test_an_entry_that_gets_a_tag_keeps_what_it_says(layout: OCILayout, path: Path) -> None:
    image, data = await push_image(OCILayout(path.parent / "other", create=True))
    await push(layout, b"x")
    described_well = image.to_json() | {
        "platform": {"architecture": "amd64", "os": "linux", "os.features": ["a"]},
        "annotations": {"org.example": "kept"},
    }
    edit_index(path, described_well)
    await layout.push_manifest(data, OCI_MANIFEST, "v1")
    described_well["annotations"] = {"org.example": "kept", REF_NAME: "v1"}
    assert index_of(path)["manifests"] == [described_well]


async def test_the_former_image_of_a_tag_stays_listed(layout: OCILayout, path: Path) -> None:
    """Otherwise the next collection of garbage would take it from under a running container."""
    first, _ = await push_image(layout, "v1", b"one")
    second, _ = await push_image(layout, "v1", b"two")
    assert index_of(path)["manifests"] == [
        first.to_json(),
        second.to_json() | {"annotations": {REF_NAME: "v1"}},
    ]
    await push_image(layout, "v1", b"one")
    assert [entry["digest"] for entry in index_of(path)["manifests"]] == [str(first.digest), str(second.digest)]
    assert await layout.resolve("v1") == first


async def test_pushing_again_changes_no_byte(layout: OCILayout, path: Path) -> None:
    await push_image(layout, "v1")
    before = (path / "index.json").stat()
    await push_image(layout, "v1")
    await push_image(layout)
    after = (path / "index.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("data", "media_type", "error"),
    [
        (b"", OCI_MANIFEST, IntegrityError),
        (b"{}", OCI_MANIFEST, IntegrityError),
        (build_index([]), OCI_MANIFEST, IntegrityError),
        (b'{"schemaVersion":1}', "application/json", UnsupportedFormat),
    ],
)
async def test_what_is_no_manifest_is_not_stored_as_one(
    layout: OCILayout, path: Path, data: bytes, media_type: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await layout.push_manifest(data, media_type, "v1")
    assert not exists(path)


async def test_blobs_are_not_manifests(layout: OCILayout) -> None:
    config = await push(layout, b'{"os":"linux"}', OCI_CONFIG)
    layer = await push(layout, os.urandom(100))
    large = await push(layout, bytes(5 << 20))
    for blob in (config, layer, large):
        with pytest.raises(NotFound, match="not a manifest"):
            await layout.resolve(str(blob.digest))


# Referrers.


async def test_referrers_of_a_fallback_tag(layout: OCILayout, path: Path) -> None:
    """As tools write them that copy from registries without the referrers API."""
    image, _ = await push_image(layout, "v1")
    config = await push(layout, b"{}", OCI_CONFIG)
    data = build_manifest(config, [], subject=image, artifact_type="application/vnd.example.sbom")
    referrer = await push(layout, data, OCI_MANIFEST)
    stranger = described(build_manifest(config, [], subject=config), OCI_MANIFEST)
    absent = described(b"absent", OCI_MANIFEST)
    await layout.push_manifest(
        build_index([referrer, stranger, absent]), OCI_INDEX, f"sha256-{image.digest.hex}"
    )
    found = await layout.referrers(image.digest)
    assert digests(found) == digests([referrer])
    assert found[0].artifact_type == "application/vnd.example.sbom"


async def test_entries_without_files_and_of_other_kinds_are_passed_over(layout: OCILayout, path: Path) -> None:
    image, _ = await push_image(layout, "v1")
    junk = await push(layout, b'{"schemaVersion": 2, "layers": 5}', OCI_MANIFEST)
    old = await push(layout, b'{"schemaVersion": 1}', OCI_MANIFEST)
    edit_index(
        path,
        described(b"absent", OCI_MANIFEST).to_json(),
        described(b"absent", "application/vnd.example.blob").to_json(),
        junk.to_json(),
        old.to_json(),
    )
    referrer = await push_referrer(layout, image, "application/vnd.example.sbom")
    assert digests(await layout.referrers(image.digest)) == digests([referrer])


async def test_an_index_may_be_a_referrer(layout: OCILayout) -> None:
    image, _ = await push_image(layout, "v1")
    data = build_index([], subject=image, artifact_type="application/vnd.example.bundle")
    referrer = await layout.push_manifest(data, OCI_INDEX)
    assert digests(await layout.referrers(image.digest, "application/vnd.example.bundle")) == digests(
        [referrer]
    )
