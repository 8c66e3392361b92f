"""An image as it is, in Debian's docker-registry, which knows no referrers API: mounted and run lazily."""

import json
from pathlib import Path

import pytest

from tests.system.programs import Veneer, run
from veneer.testing.trees import difference, scan

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.network, pytest.mark.slow]

START = ("python3", "-c", "import json, ssl, urllib.request, email; print('started')")


@pytest.fixture(scope="module")
def sidecar(python_image: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What ``veneer index --push`` said; another host's cache is not this one's."""
    directory = tmp_path_factory.mktemp("index")
    own = Veneer(directory / "cache", directory / "run")
    made: dict[str, object] = json.loads(
        own("index", "--push", "--devices", "keep", "--json", python_image).stdout
    )
    return made


def test_the_mounted_tree_equals_what_umoci_unpacks(
    python_image: str, sidecar: dict[str, object], veneer: Veneer, tmp_path: Path
) -> None:
    shown = json.loads(veneer("inspect", "--json", python_image).stdout)
    assert shown["lazy"]
    assert shown["layers"][0]["codecs"] == ["deflate"]
    assert isinstance(sidecar["size"], int)
    assert sidecar["size"] < shown["stored_size"] * 0.03
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{python_image}", f"oci:{tmp_path}/source:x")
    run("umoci", "unpack", "--image", f"{tmp_path}/source:x", tmp_path / "bundle")
    mountpoint = tmp_path / "mnt"
    veneer("mount", "--read-only", python_image, mountpoint)
    try:
        lines = difference(scan(tmp_path / "bundle/rootfs"), scan(mountpoint))
        # umoci makes mount points in the root after it has set the root's time.
        assert [line for line in lines if not line.startswith("/: mtime_ns")] == []
    finally:
        veneer("umount", mountpoint)


def test_a_start_fetches_a_part_and_the_second_one_nothing(
    python_image: str, sidecar: dict[str, object], veneer: Veneer, tmp_path: Path
) -> None:
    pinned, reports = str(sidecar["image"]), []
    for number in range(2):
        report = tmp_path / f"report-{number}.json"
        assert veneer("run", "--report", report, pinned, "--", *START).stdout == "started\n"
        reports.append(json.loads(report.read_text()))
    stored = json.loads(veneer("inspect", "--json", python_image).stdout)["stored_size"]
    assert 0 < reports[0]["bytes_fetched"] < stored / 2
    assert (reports[1]["requests"], reports[1]["bytes_fetched"]) == (0, 0)
