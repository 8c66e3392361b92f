"""Layouts are those of skopeo and umoci: each reads what the other wrote."""

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path

from tests.contract.repository_suite import push, push_referrer, streamed
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest, build_manifest
from veneer.oci.mediatypes import DOCKER_MANIFEST, OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST
from veneer.source.layout import OCILayout


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def push_real_image(layout: OCILayout, tag: str) -> Descriptor:
    """An image that can be unpacked: one file."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("hello")
        entry.size = 6
        archive.addfile(entry, io.BytesIO(b"world\n"))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/hello"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(tar.getvalue()))]},
    }
    config_blob = await push(layout, json.dumps(config).encode(), OCI_CONFIG)
    layer = await push(layout, gzip.compress(tar.getvalue(), mtime=0), OCI_LAYER_GZIP)
    return await layout.push_manifest(build_manifest(config_blob, [layer]), OCI_MANIFEST, tag)


async def read_all(layout: OCILayout, tag: str) -> tuple[Manifest, ImageConfig]:
    """Manifest and config, with every blob's digest checked."""
    raw = await layout.manifest(tag)
    manifest = Manifest.parse(raw.data, raw.descriptor.media_type)
    for blob in (manifest.config, *manifest.layers):
        blob.digest.check(await streamed(layout.blob(blob)), "blob")
    return manifest, ImageConfig.parse(await streamed(layout.blob(manifest.config)))


async def test_skopeo(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    layout = OCILayout(ours, create=True)
    image = await push_real_image(layout, "v1")
    await push_referrer(layout, image, "application/vnd.example.sbom")
    copy = ("skopeo", "--insecure-policy", "copy", "-q")
    run(*copy, f"oci:{ours}:v1", f"oci:{theirs}:copied")
    assert await OCILayout(theirs).resolve("copied") == image
    manifest, config = await read_all(OCILayout(theirs), "")
    assert (config.cmd, config.env, len(manifest.layers)) == (("/hello",), ("A=b",), 1)
    # Each of them into the other's layout.
    run(*copy, f"oci:{theirs}:copied", f"oci:{ours}:back")
    assert await layout.tags() == ["back", "v1"]
    assert await layout.resolve("back") == image
    second = await push_real_image(OCILayout(theirs), "ours")
    assert (
        run("skopeo", "inspect", "--raw", f"oci:{theirs}:ours").encode() == (await layout.manifest("v1")).data
    )
    assert second == image


async def test_skopeo_reads_what_it_converted_to_docker(tmp_path: Path) -> None:
    layout = OCILayout(tmp_path / "ours", create=True)
    await push_real_image(layout, "v1")
    directory = tmp_path / "dir"
    run(
        "skopeo",
        "--insecure-policy",
        "copy",
        "-q",
        "--format",
        "v2s2",
        f"oci:{tmp_path}/ours:v1",
        f"dir:{directory}",
    )
    manifest = Manifest.parse((directory / "manifest.json").read_bytes())
    assert manifest.media_type == DOCKER_MANIFEST
    assert ImageConfig.parse((directory / manifest.config.digest.hex).read_bytes()).cmd == ("/hello",)


async def test_umoci(tmp_path: Path) -> None:
    path = tmp_path / "layout"
    run("umoci", "init", "--layout", path)
    run("umoci", "new", "--image", f"{path}:empty")
    layout = OCILayout(path)
    manifest, config = await read_all(layout, "empty")
    assert (manifest.layers, config.diff_ids) == ((), ())
    image = await push_real_image(layout, "v1")
    await push_referrer(layout, image, "application/vnd.example.sbom")
    assert run("umoci", "ls", "--layout", path).split() == ["empty", "v1"]
    run("umoci", "unpack", "--rootless", "--image", f"{path}:v1", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "rootfs" / "hello").read_text() == "world\n"
    run("umoci", "config", "--image", f"{path}:v1", "--tag", "v2", "--config.cmd", "/other")
    assert (await read_all(layout, "v2"))[1].cmd == ("/other",)
    run("umoci", "gc", "--layout", path)
    assert len(await layout.referrers(image.digest)) == 1
