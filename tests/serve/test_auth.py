"""Who gets in: Basic, and the Bearer token flow as clients go through it."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from trio.testing import MockClock

from tests.serve.clients import connect, errors, image, push_blob, push_image
from veneer.oci.digest import Digest
from veneer.serve.auth import Authorizer, BasicAuth, TokenAuth
from veneer.serve.registry import serve_registry

USERS = {"ann": "s3cret:with:colons"}
ANN = ("ann", "s3cret:with:colons")


@asynccontextmanager
async def registry(directory: Path, auth: Authorizer) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_registry(directory, grace_s=0) as server, connect(server.host) as client:
        await push_image(client, "app", "v1", image())
        await push_blob(client, "base", b"base")
    async with serve_registry(directory, auth=auth, grace_s=0) as server, connect(server.host) as client:
        yield client


def challenge(response: httpx.Response) -> dict[str, str]:
    assert (response.status_code, errors(response)) == (401, ["UNAUTHORIZED"])
    kind, _, rest = response.headers["www-authenticate"].partition(" ")
    return {"kind": kind, **dict(re.findall(r'([a-z]+)="([^"]*)"', rest))}


async def token(client: httpx.AsyncClient, scope: str, user: tuple[str, str] | None = ANN) -> dict[str, str]:
    """The headers that a token for ``scope`` makes."""
    auth = httpx.BasicAuth(*user) if user else None
    response = await client.get("/token", params={"service": "veneer", "scope": scope}, auth=auth)
    assert response.status_code == 200
    return {"Authorization": f"Bearer {response.json()['token']}"}


async def test_basic(directory: Path) -> None:
    async with registry(directory, BasicAuth(USERS)) as client:
        assert challenge(await client.get("/v2/"))["kind"] == "Basic"
        for wrong in (("ann", "wrong"), ("bob", "x"), ("ann", ""), ("", "")):
            assert challenge(await client.get("/v2/", auth=wrong))["kind"] == "Basic"
        broken = await client.get("/v2/", headers={"Authorization": "Basic !!!"})
        assert challenge(broken)["kind"] == "Basic"
        assert (await client.get("/v2/", auth=ANN)).status_code == 200
        assert (await client.get("/v2/app/manifests/v1", auth=ANN)).status_code == 200
        assert (await client.get("/token", auth=ANN)).status_code == 404


async def test_the_challenge_says_what_to_ask_for(directory: Path) -> None:
    async with registry(directory, TokenAuth(USERS)) as client:
        ping = challenge(await client.get("/v2/"))
        assert (ping["kind"], ping["realm"], ping["service"]) == (
            "Bearer",
            f"{client.base_url}/token",
            "veneer",
        )
        assert "scope" not in ping
        assert challenge(await client.get("/v2/app/manifests/v1"))["scope"] == "repository:app:pull"
        assert challenge(await client.post("/v2/app/blobs/uploads/"))["scope"] == "repository:app:pull,push"
        assert challenge(await client.delete("/v2/app/manifests/v1"))["scope"] == "repository:app:delete"
        mount = await client.post("/v2/app/blobs/uploads/", params={"mount": "sha256:0", "from": "base"})
        assert challenge(mount)["scope"] == "repository:app:pull,push repository:base:pull"
        behind_proxy = await client.get("/v2/", headers={"Host": "registry.example:8443"})
        assert challenge(behind_proxy)["realm"] == "http://registry.example:8443/token"
        odd = await client.get("/v2/", headers={"Host": 'x"/evil'})
        assert challenge(odd)["realm"] == f"{client.base_url}/token"


async def test_a_token_is_good_for_its_scope_only(directory: Path) -> None:
    async with registry(directory, TokenAuth(USERS)) as client:
        pull = await token(client, "repository:app:pull")
        assert (await client.get("/v2/", headers=pull)).status_code == 200
        assert (await client.get("/v2/app/manifests/v1", headers=pull)).status_code == 200
        for method, path in (
            ("GET", "/v2/base/tags/list"),
            ("POST", "/v2/app/blobs/uploads/"),
            ("DELETE", "/v2/app/manifests/v1"),
        ):
            assert challenge(await client.request(method, path, headers=pull))["error"] == "insufficient_scope"
        unknown = await client.get("/v2/", headers={"Authorization": "Bearer guess"})
        assert challenge(unknown)["error"] == "invalid_token"
        both = await token(client, "repository:app:pull,push repository:base:pull")
        query = {"mount": str(Digest.of(b"base")), "from": "base"}
        mounted = await client.post("/v2/app/blobs/uploads/", params=query, headers=both)
        assert mounted.status_code == 201


async def test_anonymous_pull(directory: Path) -> None:
    async with registry(directory, TokenAuth(USERS, anonymous_pull=True)) as client:
        anonymous = await token(client, "repository:app:pull,push", user=None)
        assert (await client.get("/v2/app/manifests/v1", headers=anonymous)).status_code == 200
        refused = await client.post("/v2/app/blobs/uploads/", headers=anonymous)
        assert challenge(refused)["error"] == "insufficient_scope"
    async with registry(directory, TokenAuth(USERS)) as client:
        assert challenge(await client.get("/token", params={"scope": "repository:app:pull"}))["kind"] == "Basic"
        assert challenge(await client.get("/token", auth=("ann", "wrong")))["kind"] == "Basic"


async def test_refresh_tokens(directory: Path) -> None:
    auth = TokenAuth(USERS)
    async with registry(directory, auth) as client:
        login = await client.get("/token", params={"offline_token": "true"}, auth=ANN)
        form = {"grant_type": "refresh_token", "scope": "repository:app:pull", "service": "veneer"}
        for refresh in (login.json()["refresh_token"], auth.identity_token("ann")):
            got = await client.post("/token", data=form | {"refresh_token": refresh})
            headers = {"Authorization": f"Bearer {got.json()['access_token']}"}
            assert (await client.get("/v2/app/manifests/v1", headers=headers)).status_code == 200
        assert challenge(await client.post("/token", data=form | {"refresh_token": "guess"}))["kind"] == "Basic"
        password = {"grant_type": "password", "username": ANN[0], "password": ANN[1], "access_type": "offline"}
        assert "refresh_token" in (await client.post("/token", data=password)).json()
        assert (await client.post("/token", data={"grant_type": "magic"})).status_code == 400
        assert (await client.post("/token", content=b"\xff=\xff")).status_code == 400


async def test_tokens_expire_and_can_be_revoked(directory: Path, mock_clock: MockClock) -> None:
    auth = TokenAuth(USERS, expires_in_s=60)
    async with registry(directory, auth) as client:
        first = await token(client, "repository:app:pull")
        mock_clock.jump(59)
        assert (await client.get("/v2/app/manifests/v1", headers=first)).status_code == 200
        mock_clock.jump(1)
        expired = await client.get("/v2/app/manifests/v1", headers=first)
        assert challenge(expired)["error"] == "invalid_token"
        second = await token(client, "repository:app:pull")
        assert (await client.get("/v2/app/manifests/v1", headers=second)).status_code == 200
        auth.revoke()
        assert (await client.get("/v2/app/manifests/v1", headers=second)).status_code == 401
        assert auth.issued == 2
