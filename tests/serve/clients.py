"""A plain HTTP client for the registry under test, and small images to push with it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST

__all__ = ["Image", "connect", "errors", "image", "push_blob", "push_image", "push_referrer"]


@dataclass(frozen=True)
class Image:
    config: bytes
    layer: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        return str(Digest.of(self.manifest))


def image(layer: bytes = b"layer" * 1000, note: str = "") -> Image:
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": {"note": note}},
            "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(layer))]},
        }
    ).encode()
    config_descriptor = Descriptor(OCI_CONFIG, Digest.of(config), len(config))
    layer_descriptor = Descriptor(OCI_LAYER, Digest.of(layer), len(layer))
    return Image(config, layer, build_manifest(config_descriptor, [layer_descriptor]))


@asynccontextmanager
async def connect(host: str, **options: httpx.Auth) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{host}", trust_env=False, **options) as client:  # type: ignore[arg-type]
        yield client


async def push_blob(client: httpx.AsyncClient, name: str, data: bytes) -> str:
    digest = str(Digest.of(data))
    response = await client.post(f"/v2/{name}/blobs/uploads/", params={"digest": digest}, content=data)
    assert response.status_code == 201, response.text
    return digest


async def push_manifest(
    client: httpx.AsyncClient, name: str, reference: str, data: bytes, media_type: str = OCI_MANIFEST
) -> httpx.Response:
    headers = {"Content-Type": media_type}
    return await client.put(f"/v2/{name}/manifests/{reference}", content=data, headers=headers)


async def push_image(client: httpx.AsyncClient, name: str, tag: str, pushed: Image) -> None:
    await push_blob(client, name, pushed.config)
    await push_blob(client, name, pushed.layer)
    response = await push_manifest(client, name, tag, pushed.manifest)
    assert response.status_code == 201, response.text


async def push_referrer(client: httpx.AsyncClient, name: str, subject: Image, kind: str) -> httpx.Response:
    empty = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2)
    await push_blob(client, name, b"{}")
    about = Descriptor(OCI_MANIFEST, Digest.of(subject.manifest), len(subject.manifest))
    data = build_manifest(empty, [empty], subject=about, artifact_type=kind)
    return await push_manifest(client, name, str(Digest.of(data)), data)


def errors(response: httpx.Response) -> list[str]:
    """The codes of an error document."""
    assert response.headers["content-type"] == "application/json"
    return [error["code"] for error in response.json()["errors"]]
