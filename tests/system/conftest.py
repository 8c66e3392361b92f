"""Real programs for the system tests: docker-registry, containerd, buildah; and a Debian image with Python."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.programs import ROOT, Veneer, free_port, listening, program, run

SAMPLE = ROOT / "build/sample"


@pytest.fixture
def veneer(tmp_path: Path) -> Iterator[Veneer]:
    """``veneer`` with an empty cache."""
    command = Veneer(tmp_path / "cache", tmp_path / "run")
    yield command
    if (tmp_path / "run").exists():
        command("daemon", "stop", "--force")


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's docker-registry on loopback; its host."""
    directory, port = tmp_path_factory.mktemp("docker-registry"), free_port()
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\nlog: {{level: error}}\n'
    )
    argv = ["docker-registry", "serve", str(config)]
    with program(argv, directory / "log", lambda: listening(port)):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A containerd with directories of its own; its socket."""
    directory = tmp_path_factory.mktemp("containerd")
    address, config = directory / "c.sock", directory / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{address}"\n'
    )
    with program(["containerd", "-c", str(config)], directory / "log", address.exists):
        yield address


@pytest.fixture(scope="session")
def python_image(docker_registry: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian image with Python, changed by buildah, in docker-registry; its reference.

    buildah adds a layer with a whiteout of a directory, a replaced file, a hard link and a setuid bit.
    """
    run(ROOT / "scripts/sample-image", SAMPLE)
    directory = tmp_path_factory.mktemp("buildah")
    stores = ["--root", f"{directory}/root", "--runroot", f"{directory}/run"]
    buildah = ["buildah", *stores, "--storage-driver", "overlay"]
    reference = f"{docker_registry}/debian/python:source"
    run(*buildah, "from", "--name", "work", f"oci:{SAMPLE}:python")
    root = Path(run(*buildah, "mount", "work").stdout.strip())
    shutil.rmtree(root / "usr/share/man", ignore_errors=True)
    shutil.rmtree(root / "var/cache/apt")
    (root / "etc/motd").write_text("changed by a second layer\n")
    os.link(root / "etc/motd", root / "etc/motd.link")
    (root / "app/setuid").write_bytes(b"#!/bin/sh\n")
    (root / "app/setuid").chmod(0o4755)
    os.setxattr(root / "app/setuid", "user.note", b"kept")
    run(*buildah, "umount", "work")
    run(
        *buildah,
        "commit",
        "--quiet",
        "--timestamp",
        "1700000000",
        "work",
        "oci:" + str(directory / "image") + ":x",
    )
    run(
        "skopeo",
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        f"oci:{directory}/image:x",
        f"docker://{reference}",
    )
    run(*buildah, "rm", "work")
    return reference
