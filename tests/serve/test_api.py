"""The distribution API on the wire: pulling, pushing, listing, removing, and what is refused."""

import json
from email import message_from_bytes
from pathlib import Path

import httpx
import pytest

from tests.serve.clients import errors, image, push_blob, push_image, push_manifest, push_referrer
from veneer.errors import UsageError
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_index
from veneer.oci.mediatypes import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from veneer.serve.registry import RegistryServer, serve_registry

DATA = bytes(range(256)) * 40


async def test_an_image_comes_back_as_it_was_pushed(client: httpx.AsyncClient) -> None:
    pushed = image()
    await push_image(client, "team/app", "v1", pushed)
    for reference in ("v1", pushed.digest):
        got = await client.get(f"/v2/team/app/manifests/{reference}")
        assert got.content == pushed.manifest
        assert got.headers["content-type"] == OCI_MANIFEST
        assert got.headers["docker-content-digest"] == pushed.digest
        assert got.headers["docker-distribution-api-version"] == "registry/2.0"
        head = await client.head(f"/v2/team/app/manifests/{reference}")
        assert (head.content, head.headers["content-length"]) == (b"", str(len(pushed.manifest)))
    again = await client.get("/v2/team/app/manifests/v1", headers={"If-None-Match": got.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    layer = await client.get(f"/v2/team/app/blobs/{Digest.of(pushed.layer)}")
    assert layer.content == pushed.layer


async def test_the_media_type_of_a_push_is_kept(client: httpx.AsyncClient) -> None:
    pushed = image()
    await push_image(client, "app", "oci", pushed)
    data = json.loads(pushed.manifest) | {"mediaType": DOCKER_MANIFEST}
    response = await push_manifest(client, "app", "docker", json.dumps(data).encode(), DOCKER_MANIFEST)
    assert response.status_code == 201
    got = await client.get("/v2/app/manifests/docker")
    assert got.headers["content-type"] == DOCKER_MANIFEST
    wrong = await push_manifest(client, "app", "wrong", pushed.manifest, DOCKER_MANIFEST)
    assert errors(wrong) == ["MANIFEST_INVALID"]


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("0-0", 0, 0),
        ("100-199", 100, 199),
        ("10000-", 10000, 10239),
        ("-5", 10235, 10239),
        ("9-99999", 9, 10239),
    ],
)
async def test_one_range(client: httpx.AsyncClient, wanted: str, first: int, last: int) -> None:
    digest = await push_blob(client, "app", DATA)
    got = await client.get(f"/v2/app/blobs/{digest}", headers={"Range": f"bytes={wanted}"})
    assert got.status_code == 206
    assert got.content == DATA[first : last + 1]
    assert got.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"
    assert got.headers["etag"] == f'"{digest}"'


async def test_several_ranges_come_as_multipart(client: httpx.AsyncClient) -> None:
    digest = await push_blob(client, "app", DATA)
    got = await client.get(f"/v2/app/blobs/{digest}", headers={"Range": "bytes=300-309, 5-7,-2"})
    assert got.status_code == 206
    assert int(got.headers["content-length"]) == len(got.content)
    kind = got.headers["content-type"]
    message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + got.content)
    parts = [(part["Content-Range"], part.get_payload(decode=True)) for part in message.walk()][1:]
    assert parts == [
        ("bytes 300-309/10240", DATA[300:310]),
        ("bytes 5-7/10240", DATA[5:8]),
        ("bytes 10238-10239/10240", DATA[-2:]),
    ]


async def test_ranges_that_cannot_be_served(client: httpx.AsyncClient) -> None:
    digest = await push_blob(client, "app", DATA)
    outside = await client.get(f"/v2/app/blobs/{digest}", headers={"Range": "bytes=10240-"})
    assert outside.status_code == 416
    assert outside.headers["content-range"] == "bytes */10240"
    for headers in ({"Range": "lines=1-2"}, {"Range": "bytes=0-1", "If-Range": '"other"'}):
        whole = await client.get(f"/v2/app/blobs/{digest}", headers=headers)
        assert (whole.status_code, whole.content) == (200, DATA)


async def test_an_empty_blob(client: httpx.AsyncClient) -> None:
    digest = await push_blob(client, "app", b"")
    got = await client.get(f"/v2/app/blobs/{digest}")
    assert (got.status_code, got.content, got.headers["content-length"]) == (200, b"", "0")


async def test_tags_are_listed_in_pages(client: httpx.AsyncClient) -> None:
    tags = ["a", "b", "c", "d", "e", "f", f"sha256-{'0' * 64}"]
    for tag in tags:
        await push_image(client, "app", tag, image())
    first = await client.get("/v2/app/tags/list", params={"n": 100})
    assert first.json() == {"name": "app", "tags": tags[:4]}  # the server's limit
    rest = await client.get(first.links["next"]["url"])
    assert rest.json()["tags"] == tags[4:]
    assert "link" not in rest.headers
    few = await client.get("/v2/app/tags/list", params={"n": 2, "last": "b"})
    assert few.json()["tags"] == ["c", "d"]
    none = await client.get("/v2/app/tags/list", params={"n": 0})
    assert none.json()["tags"] == []
    assert errors(await client.get("/v2/app/tags/list", params={"n": "-1"})) == ["PAGINATION_NUMBER_INVALID"]


async def test_referrers_are_found_filtered_and_paged(client: httpx.AsyncClient) -> None:
    subject = image()
    await push_image(client, "app", "v1", subject)
    empty = await client.get(f"/v2/app/referrers/{subject.digest}")
    assert (empty.status_code, empty.json()["manifests"]) == (200, [])
    kinds = [f"application/x-{number}" for number in range(6)]
    for kind in kinds:
        pushed = await push_referrer(client, "app", subject, kind)
        assert pushed.headers["oci-subject"] == subject.digest
    found, url = [], f"/v2/app/referrers/{subject.digest}"
    while url:
        got = await client.get(url)
        assert got.headers["content-type"] == OCI_INDEX
        found += [entry["artifactType"] for entry in got.json()["manifests"]]
        url = got.links.get("next", {}).get("url", "")
    assert sorted(found) == kinds
    one = await client.get(f"/v2/app/referrers/{subject.digest}", params={"artifactType": kinds[2]})
    assert [entry["artifactType"] for entry in one.json()["manifests"]] == [kinds[2]]
    assert one.headers["oci-filters-applied"] == "artifactType"
    assert "oci-filters-applied" not in empty.headers
    nowhere = await client.get(f"/v2/no/such/referrers/{subject.digest}")
    assert (nowhere.status_code, nowhere.json()["manifests"]) == (200, [])


async def test_the_images_of_an_index_can_be_pulled_by_digest(client: httpx.AsyncClient) -> None:
    from veneer.oci.manifest import Manifest

    parts = [image(note="one"), image(note="two")]
    for part in parts:
        await push_blob(client, "multi", part.config)
        await push_blob(client, "multi", part.layer)
        assert (await push_manifest(client, "multi", part.digest, part.manifest)).status_code == 201
    index = build_index([Manifest.parse(part.manifest).descriptor for part in parts])
    assert (await push_manifest(client, "multi", "all", index, OCI_INDEX)).status_code == 201
    for part in parts:
        assert (await client.get(f"/v2/multi/manifests/{part.digest}")).content == part.manifest
    assert (await client.get("/v2/multi/manifests/all")).headers["content-type"] == OCI_INDEX


async def test_removal(client: httpx.AsyncClient) -> None:
    pushed = image()
    for tag in ("one", "two"):
        await push_image(client, "app", tag, pushed)
    assert (await client.delete("/v2/app/manifests/one")).status_code == 202
    assert errors(await client.get("/v2/app/manifests/one")) == ["MANIFEST_UNKNOWN"]
    assert (await client.get("/v2/app/manifests/two")).content == pushed.manifest
    layer = Digest.of(pushed.layer)
    assert errors(await client.delete(f"/v2/app/manifests/{layer}")) == ["MANIFEST_UNKNOWN"]
    assert (await client.delete(f"/v2/app/manifests/{pushed.digest}")).status_code == 202
    for reference in ("two", pushed.digest):
        assert errors(await client.get(f"/v2/app/manifests/{reference}")) == ["MANIFEST_UNKNOWN"]
    assert (await client.get("/v2/app/tags/list")).json()["tags"] == []
    assert (await client.delete(f"/v2/app/blobs/{layer}")).status_code == 202
    assert errors(await client.get(f"/v2/app/blobs/{layer}")) == ["BLOB_UNKNOWN"]
    assert errors(await client.delete(f"/v2/app/blobs/{layer}")) == ["BLOB_UNKNOWN"]


async def test_manifests_that_are_refused(client: httpx.AsyncClient) -> None:
    pushed = image()
    assert errors(await push_manifest(client, "app", "v1", pushed.manifest)) == ["MANIFEST_BLOB_UNKNOWN"]
    await push_image(client, "app", "v1", pushed)
    other = str(Digest.of(b"other"))
    assert errors(await push_manifest(client, "app", other, pushed.manifest)) == ["DIGEST_INVALID"]
    assert errors(await push_manifest(client, "app", "v2", b"{}")) == ["MANIFEST_INVALID"]
    assert errors(await push_manifest(client, "app", ".v", pushed.manifest)) == ["MANIFEST_INVALID"]
    large = await push_manifest(client, "app", "v2", b" " * ((4 << 20) + 1))
    assert (large.status_code, errors(large)) == (413, ["SIZE_INVALID"])
    assert (await client.get("/v2/app/tags/list")).json()["tags"] == ["v1"]


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e",
        "a/%2e%2e/b",
        "a%2f%2e%2e%2f%2e%2e",
        "A",
        "a//b",
        "-a",
        "a/blobs",
        "app/blobs/sha256",
        "index.json",
        "x" * 256,
        ".hidden",
    ],
)
async def test_names_that_are_refused(client: httpx.AsyncClient, directory: Path, name: str) -> None:
    await push_image(client, "app", "v1", image())
    before = sorted(directory.parent.rglob("*"))
    for request in (
        client.build_request("GET", "/v2/app/tags/list"),
        client.build_request("POST", "/v2/app/blobs/uploads/"),
    ):
        raw = request.url.raw_path.replace(b"app", name.encode())
        request.url = request.url.copy_with(raw_path=raw)
        assert errors(await client.send(request)) == ["NAME_INVALID"]
    assert sorted(directory.parent.rglob("*")) == before


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    digest = Digest.of(b"nothing")
    assert errors(await client.get("/v2/no/tags/list")) == ["NAME_UNKNOWN"]
    assert errors(await client.get(f"/v2/no/blobs/{digest}")) == ["NAME_UNKNOWN"]
    await push_blob(client, "app", b"x")
    assert errors(await client.get(f"/v2/app/blobs/{digest}")) == ["BLOB_UNKNOWN"]
    assert errors(await client.get("/v2/app/blobs/md5:abc")) == ["DIGEST_INVALID"]
    assert errors(await client.get(f"/v2/app/manifests/{Digest.of(b'x')}")) == ["MANIFEST_UNKNOWN"]
    assert (await client.get("/v3/")).status_code == 404
    refused = await client.post("/v2/app/tags/list")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_repositories_nest_whichever_comes_first(client: httpx.AsyncClient) -> None:
    for name in ("team/app", "team", "team/app/part"):
        await push_image(client, name, "v1", image(note=name))
    for name in ("team/app", "team", "team/app/part"):
        assert (await client.get(f"/v2/{name}/manifests/v1")).content == image(note=name).manifest
    assert (await client.get("/v2/_catalog")).json()["repositories"] == ["team", "team/app", "team/app/part"]


async def test_a_directory_that_is_a_layout_is_one_repository(
    directory: Path, client: httpx.AsyncClient
) -> None:
    pushed = image()
    await push_image(client, "team/app", "v1", pushed)
    await push_image(client, "team/app/part", "v1", pushed)  # a repository inside of another's directory
    assert (await client.get("/v2/_catalog")).json() == {"repositories": ["team/app", "team/app/part"]}
    async with (
        serve_registry(directory / "team" / "app", grace_s=0) as single,
        httpx.AsyncClient(base_url=f"http://{single.host}", trust_env=False) as other,
    ):
        assert (await other.get("/v2/_catalog")).json() == {"repositories": ["app"]}
        assert (await other.get("/v2/app/manifests/v1")).content == pushed.manifest
        assert errors(await other.get("/v2/part/manifests/v1")) == ["NAME_UNKNOWN"]


async def test_a_layout_whose_name_cannot_be_a_repository(tmp_path: Path) -> None:
    layout = tmp_path / "My Images"
    layout.mkdir()
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    with pytest.raises(UsageError):
        async with serve_registry(layout):
            pass


async def test_requests_are_recorded_with_what_was_sent(
    server: RegistryServer, client: httpx.AsyncClient
) -> None:
    digest = await push_blob(client, "app", DATA)
    await client.get(f"/v2/app/blobs/{digest}", headers={"Range": "bytes=0-99"})
    await client.head(f"/v2/app/blobs/{digest}")
    seen = [(record.method, record.range, record.status, record.bytes_sent) for record in server.requests]
    assert seen == [("POST", None, 201, 0), ("GET", "bytes=0-99", 206, 100), ("HEAD", None, 200, 0)]
