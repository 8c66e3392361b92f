"""``veneer index``: an image as it is becomes lazily loadable, for this host or for everybody."""

import json
from pathlib import Path

import pytest

from tests.cli.invoking import invoke
from veneer.testing.images import write_image
from veneer.testing.tars import TarItem


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    write_image(
        [(TarItem(b"text", content=b"text"), TarItem(b"null", "char", rdev=(1, 3)))], tmp_path / "i", "x"
    )
    return ["--cache-dir", str(tmp_path / "cache"), "--platform", "linux/amd64", "--no-progress"]


def test_an_index_is_kept_for_this_host(tmp_path: Path, common: list[str]) -> None:
    image = f"oci:{tmp_path}/i:x"
    before = sorted((tmp_path / "i").rglob("*"))
    made = invoke("index", image, *common)
    assert made.exit_code == 0, made.stderr
    assert "1 layers" in made.stdout
    assert "left out of the index: 1 x device node" in made.stdout
    assert made.stdout.endswith("kept for this host\n")
    assert sorted((tmp_path / "i").rglob("*")) == before
    assert invoke("cat", image, "/text", *common).stdout == "text"
    shown = json.loads(invoke("inspect", "--index", "layers", image, *common).stdout)
    assert shown["origin"] == "local"
    assert shown["layers"][0]["device"]["windows"]["spans"][0]["codec"] == "zstd"


def test_a_pushed_index_is_an_artifact_of_the_image(tmp_path: Path, common: list[str]) -> None:
    image = f"oci:{tmp_path}/i:x"
    made = invoke("index", "--push", "--json", "--devices", "keep", image, *common)
    assert made.exit_code == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["dropped"] == {}
    artifact = json.loads((tmp_path / "i/blobs" / document["artifact"].replace(":", "/")).read_text())
    assert artifact["artifactType"] == "application/vnd.veneer.index.v1"
    assert document["image"].endswith(artifact["subject"]["digest"])
    assert artifact["layers"][0] == document["index"]
    other = ["--cache-dir", str(tmp_path / "other"), *common[2:]]
    assert invoke("cat", image, "/text", *other).stdout == "text"


def test_what_is_wrong_is_said(tmp_path: Path, common: list[str]) -> None:
    assert invoke("index", "--profile", str(tmp_path / "none"), f"oci:{tmp_path}/i:x", *common).exit_code == 2
    assert invoke("index", "--workload-command", "'", f"oci:{tmp_path}/i:x", *common).exit_code == 2
    assert invoke("index", f"oci:{tmp_path}/i:none", *common).exit_code == 11
