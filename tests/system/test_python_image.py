"""The main job on real input: a Debian image in a real registry, converted, copied, mounted and run."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.programs import Veneer, free_port, listening, program, run
from veneer.testing.trees import difference, scan

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.network, pytest.mark.slow]

START = ("python3", "-c", "import json, ssl, urllib.request, email; print('started')")


@pytest.fixture(scope="module")
def lazy(python_image: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The image converted within its registry: its reference and manifest digest."""
    directory = tmp_path_factory.mktemp("convert")
    destination = python_image.replace(":source", ":lazy")
    own = Veneer(directory / "cache", directory / "run")
    result = own("convert", "--devices", "keep", "--json", python_image, destination)
    return destination, json.loads(result.stdout)["digest"]


def test_converting_again_on_an_empty_cache_gives_the_same_digest(
    python_image: str, lazy: tuple[str, str], veneer: Veneer
) -> None:
    again = veneer("convert", "--devices", "keep", "--json", python_image, lazy[0] + "-again")
    assert json.loads(again.stdout)["digest"] == lazy[1]


def test_containerd_pulls_and_runs_it_like_any_image(lazy: tuple[str, str], containerd: Path) -> None:
    ctr = ["ctr", "--address", str(containerd)]
    run(*ctr, "images", "pull", "--plain-http", lazy[0])
    assert run(*ctr, "run", "--rm", lazy[0], "test", *START).stdout == "started\n"


def test_skopeo_copies_it_and_the_diff_ids_are_right(lazy: tuple[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{lazy[0]}", f"oci:{copy}:x")

    def blob(digest: str) -> Path:
        return copy / "blobs" / digest.replace(":", "/")

    index = json.loads((copy / "index.json").read_text())
    assert index["manifests"][0]["digest"] == lazy[1]
    manifest = json.loads(blob(lazy[1]).read_text())
    config = json.loads(blob(manifest["config"]["digest"]).read_text())
    assert len(manifest["layers"]) == len(config["rootfs"]["diff_ids"]) >= 2
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+zstd"
        tar = subprocess.run(["zstd", "-dc", blob(layer["digest"])], capture_output=True, check=True).stdout
        assert "sha256:" + hashlib.sha256(tar).hexdigest() == diff_id


@pytest.mark.parametrize("backend", ["fuse", "erofs-fuse", "erofs-fanotify"])
def test_the_mounted_tree_equals_what_umoci_unpacks(
    python_image: str, lazy: tuple[str, str], veneer: Veneer, tmp_path: Path, backend: str
) -> None:
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{python_image}", f"oci:{tmp_path}/source:x")
    run("umoci", "unpack", "--image", f"{tmp_path}/source:x", tmp_path / "bundle")
    mountpoint = tmp_path / "mnt"
    veneer("mount", "--read-only", "--backend", backend, lazy[0], mountpoint)
    try:
        mounted = scan(mountpoint)
        reference = scan(tmp_path / "bundle/rootfs")
        assert len(mounted) > 5000
        # umoci makes mount points in the root after it has set the root's time.
        apart_from_umoci = [
            line for line in difference(reference, mounted) if not line.startswith("/: mtime_ns")
        ]
        assert apart_from_umoci == []
    finally:
        veneer("umount", mountpoint)
    assert list(mountpoint.parent.glob("mnt/*")) == []


def test_run_from_the_cold_and_afar_fetches_a_part_and_the_second_run_nothing(
    lazy: tuple[str, str], veneer: Veneer, tmp_path: Path
) -> None:
    host, _, rest = lazy[0].partition("/")
    port = free_port()
    distance = ["--listen", str(port), "--target", host.rpartition(":")[2], "--rtt-ms", "10", "--mbit", "1000"]
    pinned = f"127.0.0.1:{port}/{rest.rpartition(':')[0]}@{lazy[1]}"
    reports = []
    with program(
        [sys.executable, "-m", "veneer.testing.delay", *distance], tmp_path / "log", lambda: listening(port)
    ):
        for number in range(2):
            report = tmp_path / f"report-{number}.json"
            assert veneer("run", "--report", report, pinned, "--", *START).stdout == "started\n"
            reports.append(json.loads(report.read_text()))
    cold, warm = reports
    stored = json.loads(veneer("inspect", "--json", lazy[0]).stdout)["stored_size"]
    assert 0 < cold["bytes_fetched"] < stored / 2
    assert 0 < cold["requests"] < 400
    assert (warm["requests"], warm["bytes_fetched"]) == (0, 0)


def test_one_file_in_a_few_requests(lazy: tuple[str, str], veneer: Veneer) -> None:
    assert veneer("cat", lazy[0], "/etc/motd.link").stdout == "changed by a second layer\n"
    listing = veneer("ls", lazy[0], "/app").stdout
    assert "hello.py" in listing
    assert "setuid" in listing


def test_the_default_command_runs(lazy: tuple[str, str], veneer: Veneer) -> None:
    assert json.loads(veneer("run", lazy[0]).stdout)["hello"].startswith("from 3.")


def test_verify_reads_every_byte(lazy: tuple[str, str], veneer: Veneer) -> None:
    report = json.loads(veneer("verify", "--json", lazy[0]).stdout)
    assert report["ok"] is True
