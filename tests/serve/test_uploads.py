"""Uploads: in one piece, in many, resumed, mounted, and what remains of those that fail."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.serve.clients import errors, push_blob
from veneer.oci.digest import Digest
from veneer.serve.registry import serve_registry

DATA = bytes(range(256)) * 8000
DIGEST = str(Digest.of(DATA))


def staged(directory: Path) -> list[Path]:
    """Files of a repository that are neither blobs nor part of every layout."""
    own = {"oci-layout", "index.json", ".veneer-lock"}
    return [path for path in directory.iterdir() if path.is_file() and path.name not in own]


async def begin(client: httpx.AsyncClient) -> str:
    response = await client.post("/v2/app/blobs/uploads/")
    assert response.status_code == 202
    return str(response.headers["location"])


async def patch(client: httpx.AsyncClient, location: str, first: int, last: int) -> httpx.Response:
    headers = {"Content-Range": f"{first}-{last}", "Content-Type": "application/octet-stream"}
    return await client.patch(location, content=DATA[first : last + 1], headers=headers)


async def test_chunks_in_order_make_the_blob(client: httpx.AsyncClient) -> None:
    location = await begin(client)
    for first in range(0, 1_500_000, 500_000):
        response = await patch(client, location, first, first + 499_999)
        assert (response.status_code, response.headers["range"]) == (202, f"0-{first + 499_999}")
        location = response.headers["location"]
    status = await client.get(location)
    assert (status.status_code, status.headers["range"]) == (204, "0-1499999")
    done = await client.put(location, params={"digest": DIGEST}, content=DATA[1_500_000:])
    assert (done.status_code, done.headers["docker-content-digest"]) == (201, DIGEST)
    assert (await client.get(done.headers["location"])).content == DATA
    assert errors(await client.get(location)) == ["BLOB_UPLOAD_UNKNOWN"]


async def test_a_chunk_out_of_order_is_refused_and_the_upload_goes_on(client: httpx.AsyncClient) -> None:
    location = await begin(client)
    await patch(client, location, 0, 99)
    for first, last in ((200, 299), (0, 99), (50, 149)):
        refused = await patch(client, location, first, last)
        assert (refused.status_code, refused.headers["range"]) == (416, "0-99")
    lying = await client.patch(location, content=b"xyz", headers={"Content-Range": "100-199"})
    assert errors(lying) == ["SIZE_INVALID"]
    assert (await patch(client, location, 100, len(DATA) - 1)).status_code == 202
    assert (await client.put(location, params={"digest": DIGEST})).status_code == 201


async def test_an_upload_that_breaks_off_is_resumed_where_it_stopped(client: httpx.AsyncClient) -> None:
    location = await begin(client)

    async def breaking() -> AsyncIterator[bytes]:
        yield DATA[:300_000]
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        await client.patch(location, content=breaking(), headers={"Content-Length": str(len(DATA))})
    # The status waits for nothing: the broken request may still be draining. A resuming client asks again.
    with trio.fail_after(60):
        while (status := await client.get(location)).headers["range"] != "0-299999":
            await trio.lowlevel.checkpoint()
    assert status.status_code == 204
    assert (await patch(client, location, 300_000, len(DATA) - 1)).status_code == 202
    assert (await client.put(location, params={"digest": DIGEST})).status_code == 201


async def test_wrong_bytes_leave_nothing_behind(client: httpx.AsyncClient, directory: Path) -> None:
    location = await begin(client)
    assert len(staged(directory / "app")) == 1
    wrong = await client.put(location, params={"digest": DIGEST}, content=DATA[:-1] + b"!")
    assert errors(wrong) == ["DIGEST_INVALID"]
    whole = await client.post("/v2/app/blobs/uploads/", params={"digest": DIGEST}, content=b"other")
    assert errors(whole) == ["DIGEST_INVALID"]
    cancelled = await begin(client)
    assert (await client.delete(cancelled)).status_code == 204
    assert errors(await client.get(cancelled)) == ["BLOB_UPLOAD_UNKNOWN"]
    assert staged(directory / "app") == []
    assert errors(await client.get(f"/v2/app/blobs/{DIGEST}")) == ["BLOB_UNKNOWN"]


async def test_unfinished_uploads_go_when_the_server_stops(directory: Path) -> None:
    async with (
        serve_registry(directory, grace_s=0) as server,
        httpx.AsyncClient(base_url=f"http://{server.host}", trust_env=False) as client,
    ):
        await patch(client, await begin(client), 0, 99)
        assert len(staged(directory / "app")) == 1
    assert staged(directory / "app") == []


async def test_a_session_belongs_to_its_repository(client: httpx.AsyncClient) -> None:
    location = await begin(client)
    await push_blob(client, "other", b"x")
    assert errors(await client.get(location.replace("/app/", "/other/"))) == ["BLOB_UPLOAD_UNKNOWN"]


async def test_mounting_from_another_repository(client: httpx.AsyncClient) -> None:
    await push_blob(client, "base", DATA)
    query = {"mount": DIGEST, "from": "base"}
    mounted = await client.post("/v2/app/blobs/uploads/", params=query)
    assert (mounted.status_code, mounted.headers["location"]) == (201, f"/v2/app/blobs/{DIGEST}")
    assert (await client.get(mounted.headers["location"])).content == DATA
    for origin, digest in (("base", Digest.of(b"no")), ("nowhere", DIGEST)):
        query = {"mount": str(digest), "from": origin}
        session = await client.post("/v2/new/blobs/uploads/", params=query)
        assert session.status_code == 202
        assert session.headers["location"].startswith("/v2/new/blobs/uploads/")


async def test_sha512(client: httpx.AsyncClient) -> None:
    digest = str(Digest.of(DATA, "sha512"))
    assert (
        await client.post("/v2/app/blobs/uploads/", params={"digest": digest}, content=DATA)
    ).status_code == 201
    assert (await client.get(f"/v2/app/blobs/{digest}")).content == DATA
    session = await client.post("/v2/app/blobs/uploads/", params={"digest-algorithm": "sha512"})
    location = session.headers["location"]
    await patch(client, location, 0, 99)
    other = str(Digest.of(DATA[:100], "sha512"))
    assert (await client.put(location, params={"digest": other})).status_code == 201
    late = await begin(client)
    await patch(client, late, 0, 99)
    assert errors(await client.put(late, params={"digest": other})) == ["DIGEST_INVALID"]
