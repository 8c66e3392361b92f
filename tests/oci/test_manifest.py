"""Manifests and indexes from hostile bytes."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.oci.strategies import annotations, damaged, descriptors, media_types
from veneer.errors import IntegrityError, NotFound, UnsupportedFormat, VeneerError
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest
from veneer.oci.manifest import (
    MAX_INDEX_ENTRIES,
    MAX_LAYERS,
    MAX_MANIFEST_SIZE,
    Index,
    Manifest,
    build_index,
    build_manifest,
    parse_manifest,
)
from veneer.oci.mediatypes import (
    DOCKER_CONFIG,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
)

CONFIG = Descriptor(OCI_CONFIG, Digest.of(b"config"), 6)
LAYER = Descriptor(OCI_LAYER_ZSTD, Digest.of(b"layer"), 5)


def document(**members: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": CONFIG.to_json(),
        "layers": [LAYER.to_json()],
    } | members


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def entry(platform: str | None, name: str = "", media_type: str = OCI_MANIFEST) -> Descriptor:
    digest = Digest.of(f"{platform} {name}".encode())
    return Descriptor(media_type, digest, 7, platform=Platform.parse(platform) if platform else None)


# Reading.


def test_digest_is_of_the_bytes_as_they_came() -> None:
    data = json.dumps(document(), indent=7).encode()
    manifest = Manifest.parse(data)
    assert manifest.raw == data
    assert manifest.digest == Digest.of(data)
    assert manifest.descriptor == Descriptor(OCI_MANIFEST, Digest.of(data), len(data))
    assert (manifest.config, manifest.layers) == (CONFIG, (LAYER,))


def test_docker_schema_2() -> None:
    config = Descriptor(DOCKER_CONFIG, Digest.of(b"c"), 1)
    layer = Descriptor(DOCKER_LAYER_GZIP, Digest.of(b"l"), 1)
    data = build_manifest(config, [layer], media_type=DOCKER_MANIFEST)
    manifest = parse_manifest(data, DOCKER_MANIFEST)
    assert isinstance(manifest, Manifest)
    assert (manifest.media_type, manifest.layers) == (DOCKER_MANIFEST, (layer,))
    child = entry("linux/amd64", media_type=DOCKER_MANIFEST)
    index = parse_manifest(build_index([child], media_type=DOCKER_MANIFEST_LIST), None)
    assert isinstance(index, Index)
    assert (index.media_type, index.manifests) == (DOCKER_MANIFEST_LIST, (child,))


@pytest.mark.parametrize(
    ("members", "implied"),
    [
        ({"config": CONFIG.to_json(), "layers": []}, OCI_MANIFEST),
        ({"config": CONFIG.to_json()}, OCI_MANIFEST),
        ({"config": CONFIG.to_json() | {"mediaType": DOCKER_CONFIG}, "layers": []}, DOCKER_MANIFEST),
        ({"manifests": []}, OCI_INDEX),
        ({"manifests": None}, OCI_INDEX),
    ],
)
@pytest.mark.parametrize("outside", [None, "", "application/json", "text/plain"])
def test_missing_media_type_is_implied_by_the_members(
    members: dict[str, Any], implied: str, outside: str | None
) -> None:
    data = encoded({"schemaVersion": 2} | members)
    assert parse_manifest(data, outside).media_type == implied


def test_missing_media_type_is_what_the_outside_says() -> None:
    data = encoded({key: value for key, value in document().items() if key != "mediaType"})
    assert parse_manifest(data, DOCKER_MANIFEST).media_type == DOCKER_MANIFEST
    with pytest.raises(IntegrityError, match="ambiguous"):
        parse_manifest(data, OCI_INDEX)


def test_manifest_and_index_are_not_taken_for_each_other() -> None:
    with pytest.raises(UnsupportedFormat, match="got an image index"):
        Manifest.parse(build_index([]))
    with pytest.raises(UnsupportedFormat, match="got an image manifest"):
        Index.parse(encoded(document()))


@pytest.mark.parametrize(
    "data",
    [
        document(manifests=[]),
        document(manifests=None),
        document(mediaType=OCI_INDEX, manifests=[]),
        document(mediaType=OCI_INDEX),
        document(fsLayers=[]),
        document(history=[]),
        {"schemaVersion": 2, "manifests": [], "layers": []},
        {"schemaVersion": 2, "manifests": [], "config": {}},
        {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST_LIST, "manifests": [], "layers": []},
    ],
)
def test_documents_with_two_readings_are_refused(data: dict[str, Any]) -> None:
    """As in CVE-2021-41190: one signed document, two images."""
    with pytest.raises(IntegrityError, match="ambiguous"):
        parse_manifest(encoded(data), None)


@pytest.mark.parametrize("name", ["Layers", "MANIFESTS", "mediatype", "Config", "layer\u017f"])
def test_members_that_other_readers_would_take_for_known_ones_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="some readers"):
        parse_manifest(encoded(document(**{name: []})), None)


@pytest.mark.parametrize("name", ["Digest", "\u017fize", "MEDIATYPE"])
def test_so_are_those_of_descriptors(name: str) -> None:
    data = document()
    data["layers"][0][name] = 7
    with pytest.raises(IntegrityError, match=r"layer 0 has a member .* some readers"):
        parse_manifest(encoded(data), None)


def test_media_type_must_be_the_one_it_is_served_as() -> None:
    with pytest.raises(IntegrityError, match="is served as"):
        parse_manifest(encoded(document()), DOCKER_MANIFEST)


def test_docker_schema_1_is_named_with_a_hint() -> None:
    old = {"schemaVersion": 1, "name": "library/old", "fsLayers": [], "history": [], "signatures": []}
    for data, outside in [
        (old, None),
        (old, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        (old, "application/json"),
    ]:
        with pytest.raises(UnsupportedFormat, match="schema 1") as caught:
            parse_manifest(encoded(data), outside)
        assert caught.value.hint


def test_unknown_types_are_unsupported() -> None:
    data = document(mediaType="application/vnd.oci.image.manifest.v2+json")
    with pytest.raises(UnsupportedFormat, match=r"manifest\.v2"):
        parse_manifest(encoded(data), None)


@pytest.mark.parametrize(
    "data",
    [
        [],
        None,
        "manifest",
        {},
        document(schemaVersion=None),
        document(schemaVersion=2.0),
        document(schemaVersion=True),
        document(schemaVersion="2"),
        document(mediaType=5),
        document(config=None),
        document(config=[]),
        document(layers={}),
        document(layers=[None]),
        document(layers=[LAYER.to_json() | {"size": -1}]),
        document(layers=[LAYER.to_json() | {"size": 1 << 63}]),
        document(layers=[LAYER.to_json() | {"size": 5.0}]),
        document(layers=[LAYER.to_json() | {"digest": "sha256:abc"}]),
        document(layers=[LAYER.to_json() | {"digest": "md5:" + "0" * 32}]),
        document(layers=[LAYER.to_json() | {"digest": "sha256:../../../../etc/passwd"}]),
        document(layers=[LAYER.to_json() | {"size": True}]),
        document(layers=[LAYER.to_json() | {"mediaType": ""}]),
        document(layers=[LAYER.to_json() | {"mediaType": f"{OCI_LAYER_ZSTD}\n"}]),
        document(annotations={"a": 1}),
        document(annotations=[]),
        document(artifactType=1),
        document(subject={}),
        document(layers=[LAYER.to_json()] * (MAX_LAYERS + 1)),
        {"schemaVersion": 2, "manifests": [LAYER.to_json()] * (MAX_INDEX_ENTRIES + 1)},
    ],
    ids=range(28),
)
def test_malformed_documents(data: Any) -> None:
    with pytest.raises(IntegrityError):
        parse_manifest(encoded(data), None)


def test_bounds_themselves_are_allowed() -> None:
    assert len(Manifest.parse(encoded(document(layers=[LAYER.to_json()] * MAX_LAYERS))).layers) == MAX_LAYERS
    full = encoded({"schemaVersion": 2, "manifests": [LAYER.to_json()] * MAX_INDEX_ENTRIES})
    assert len(Index.parse(full).manifests) == MAX_INDEX_ENTRIES
    data = encoded(document())
    assert Manifest.parse(data.ljust(MAX_MANIFEST_SIZE)).config == CONFIG
    with pytest.raises(IntegrityError, match="bytes, more than"):
        Manifest.parse(data.ljust(MAX_MANIFEST_SIZE + 1))


def test_embedded_data_of_descriptors_is_ignored() -> None:
    manifest = Manifest.parse(encoded(document(config=CONFIG.to_json() | {"data": "bm90IHRoZSBjb25maWc="})))
    assert manifest.config == CONFIG


# Writing.


@settings(deadline=None)
@given(
    descriptors,
    st.lists(descriptors, max_size=3),
    annotations,
    st.none() | descriptors,
    st.just("") | media_types,
)
def test_manifest_round_trip(
    config: Descriptor,
    layers: list[Descriptor],
    notes: dict[str, str],
    subject: Descriptor | None,
    artifact_type: str,
) -> None:
    data = build_manifest(config, layers, annotations=notes, subject=subject, artifact_type=artifact_type)
    manifest = parse_manifest(data, OCI_MANIFEST)
    assert manifest == Manifest(OCI_MANIFEST, config, tuple(layers), notes, subject, artifact_type, data)
    shuffled = dict(reversed(notes.items()))
    again = build_manifest(config, layers, annotations=shuffled, subject=subject, artifact_type=artifact_type)
    assert again == data
    assert manifest.referrer.artifact_type == (artifact_type or config.media_type)
    assert manifest.referrer.annotations == notes


@settings(deadline=None)
@given(st.lists(descriptors, max_size=3), annotations, st.none() | descriptors, st.just("") | media_types)
def test_index_round_trip(
    entries: list[Descriptor], notes: dict[str, str], subject: Descriptor | None, artifact_type: str
) -> None:
    data = build_index(entries, annotations=notes, subject=subject, artifact_type=artifact_type)
    assert parse_manifest(data, OCI_INDEX) == Index(
        OCI_INDEX, tuple(entries), notes, subject, artifact_type, data
    )


def test_manifest_bytes_are_a_fixed_form() -> None:
    data = build_manifest(CONFIG, [LAYER], annotations={"b": "2", "a": "1"})
    assert data == (
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        b'"config":{"mediaType":"application/vnd.oci.image.config.v1+json",'
        b'"digest":"sha256:b79606fb3afea5bd1609ed40b622142f1c98125abcfe89a76a661b0e8e343910","size":6},'
        b'"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+zstd",'
        b'"digest":"sha256:dac1d7cfa95021764849fd102524e141488c5e3a90f861dbb5a12d9ac8584f85","size":5}],'
        b'"annotations":{"a":"1","b":"2"}}'
    )


# Hostile input.

FULL = document(
    subject=CONFIG.to_json(), annotations={"a": "b"}, artifactType="application/x", layers=[LAYER.to_json()] * 2
)
FULL_INDEX = {
    "schemaVersion": 2,
    "mediaType": OCI_INDEX,
    "manifests": [entry("linux/arm/v7").to_json(), entry("linux/amd64").to_json()],
    "annotations": {"a": "b"},
}


@settings(deadline=None, max_examples=300)
@given(damaged(FULL) | damaged(FULL_INDEX), st.sampled_from([None, OCI_MANIFEST, OCI_INDEX]))
def test_damaged_documents_parse_or_are_refused(data: Any, outside: str | None) -> None:
    raw = encoded(data)
    try:
        parsed = parse_manifest(raw, outside)
        if isinstance(parsed, Index):
            parsed.select(Platform("linux", "amd64"), "image")
    except VeneerError:
        return
    assert parsed.digest == Digest.of(raw)


@settings(deadline=None)
@given(st.binary(max_size=40))
@example(b"\xff")
@example(b"[" * 100_000)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse_manifest(data, None)


# Selecting.


def select(platform: str, *entries: Descriptor) -> Descriptor:
    return Index.parse(build_index(entries)).select(Platform.parse(platform), "app")


def test_select_by_platform() -> None:
    amd64, arm64 = entry("linux/amd64"), entry("linux/arm64/v8")
    assert select("linux/amd64", arm64, amd64) == amd64
    assert select("linux/arm64", amd64, arm64) == arm64
    assert select("linux/arm64/v8", amd64, arm64) == arm64


def test_exact_variant_is_preferred() -> None:
    v5, v6, v7, plain = (entry(f"linux/arm{variant}") for variant in ("/v5", "/v6", "/v7", ""))
    assert select("linux/arm/v6", v5, plain, v6, v7) == v6
    assert select("linux/arm/v6", v5, plain, v7) == plain
    assert select("linux/arm", v5, v6, plain, v7) == plain
    assert select("linux/arm", v5, v6, v7) == v7
    assert select("linux/arm", v5, v6) == v5
    with pytest.raises(NotFound):
        select("linux/arm/v7", v5, v6)


def test_first_of_equals_wins() -> None:
    first, second = entry("linux/amd64", "first"), entry("linux/amd64", "second")
    assert select("linux/amd64", first, second) == first


def test_select_says_what_there_is() -> None:
    with pytest.raises(NotFound, match="app has no image for linux/riscv64") as caught:
        select("linux/riscv64", entry("linux/amd64"), entry("linux/arm64/v8"), entry("unknown/unknown"))
    assert caught.value.hint == "it has linux/amd64, linux/arm64/v8; choose with --platform"


def test_entry_without_platform_is_taken_only_when_there_is_no_choice() -> None:
    nested = entry(None, media_type=OCI_INDEX)
    assert select("linux/amd64", nested) == nested
    about_it = Descriptor(OCI_MANIFEST, Digest.of(b"sbom"), 4, artifact_type="application/vnd.example.sbom")
    assert select("linux/amd64", about_it, nested) == nested
    for entries in ((nested, entry(None, "2")), (nested, entry("linux/arm64")), ()):
        with pytest.raises(NotFound):
            select("linux/amd64", *entries)


def test_entries_that_are_no_images_are_passed_over() -> None:
    blob = entry("linux/amd64", media_type="application/vnd.example.blob")
    image = entry("linux/amd64", "image")
    assert select("linux/amd64", blob, image) == image
