"""The registry as skopeo, a client of other hands, sees it."""

import json
from pathlib import Path

import pytest
import trio

from tests.serve.clients import image
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import OCI_MANIFEST
from veneer.serve.auth import BasicAuth, TokenAuth
from veneer.serve.registry import serve_registry
from veneer.source.layout import OCILayout

pytestmark = pytest.mark.network


async def skopeo(*arguments: str) -> str:
    command = ["skopeo", "--insecure-policy", *arguments]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def make_layout(path: Path) -> bytes:
    pushed = image(bytes(range(256)) * 20_000)
    layout = OCILayout(path, create=True)
    parsed = Manifest.parse(pushed.manifest)
    for descriptor, data in ((parsed.config, pushed.config), (parsed.layers[0], pushed.layer)):
        file = path.parent / descriptor.digest.hex
        file.write_bytes(data)
        await layout.push_blob(descriptor, lambda file=file: file.open("rb"))  # type: ignore[misc]
    await layout.push_manifest(pushed.manifest, OCI_MANIFEST, "v1")
    return pushed.manifest


@pytest.mark.parametrize("auth", ["none", "basic", "token"])
async def test_copy_there_and_back(tmp_path: Path, auth: str) -> None:
    manifest = await make_layout(tmp_path / "source")
    users = {"ann": "secret"}
    authorizer = {"none": None, "basic": BasicAuth(users), "token": TokenAuth(users)}[auth]
    credentials = [] if auth == "none" else ["ann:secret"]
    there = [text for item in credentials for text in ("--dest-creds", item)]
    back = [text for item in credentials for text in ("--src-creds", item)]
    async with serve_registry(tmp_path / "registry", auth=authorizer, grace_s=0) as server:
        url = f"docker://{server.host}/team/app:v1"
        await skopeo(
            "copy", "--preserve-digests", "--dest-tls-verify=false", *there, f"oci:{tmp_path}/source:v1", url
        )
        await skopeo(
            "copy", "--preserve-digests", "--src-tls-verify=false", *back, url, f"oci:{tmp_path}/back:v1"
        )
        listing = [text for item in credentials for text in ("--creds", item)]
        tags = await skopeo("list-tags", "--tls-verify=false", *listing, f"docker://{server.host}/team/app")
    assert json.loads(tags)["Tags"] == ["v1"]
    for directory in (tmp_path / "back", tmp_path / "registry" / "team" / "app"):
        stored = await OCILayout(directory).manifest("v1")
        assert stored.data == manifest
        layer = Manifest.parse(manifest).layers[0]
        path = directory / "blobs" / "sha256" / layer.digest.hex
        assert Digest.of(path.read_bytes()) == layer.digest


async def test_delete(tmp_path: Path) -> None:
    await make_layout(tmp_path / "source")
    async with serve_registry(tmp_path / "registry", grace_s=0) as server:
        url = f"docker://{server.host}/app:v1"
        await skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{tmp_path}/source:v1", url)
        await skopeo("delete", "--tls-verify=false", url)
        with pytest.raises(AssertionError):
            await skopeo("inspect", "--tls-verify=false", url)
