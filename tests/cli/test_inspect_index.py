"""``veneer inspect --index``: the index of an image as JSON, merged and by layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.invoking import invoke
from veneer.testing.images import write_image
from veneer.testing.tars import TarItem, whiteout

Show = Callable[..., Any]


@pytest.fixture
def show(tmp_path: Path) -> Show:
    """``veneer inspect --index`` of a converted image of two layers."""
    lower = (TarItem(b"etc", "dir", mode=0o755), TarItem(b"etc/\xff", content=b"text"), TarItem(b"gone"))
    upper = (whiteout(b"gone"), TarItem(b"sym", "symlink", link=b"etc"))
    write_image([lower, upper], tmp_path / "images", "plain")
    common = ["--cache-dir", str(tmp_path / "cache"), "--platform", "linux/amd64"]

    def run(*arguments: str) -> str:
        result = invoke(*arguments, *common)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    run("convert", f"oci:{tmp_path}/images:plain", f"oci:{tmp_path}/images:native", "--no-progress")
    return lambda *options: json.loads(
        run("inspect", f"oci:{tmp_path}/images:native", *(options or ("--index", "image")))
    )


def test_the_merged_image_is_shown_with_extents_and_spans(show: Show) -> None:
    document = show()
    assert [entry["path"] for entry in document["entries"]] == ["", "etc", "etc/\ufffd", "sym"]
    file = document["entries"][2]
    assert (file["path_b64"], file["type"], file["size"]) == ("ZXRjL/8=", "file", 4)
    (extent,) = file["extents"]
    spans = document["devices"][extent["device"]]["spans"]
    assert any(span["offset"] <= extent["offset"] < span["offset"] + span["length"] for span in spans)
    assert document["origin"] == "annotation"
    assert show("--index", "image", "--json") == document


def test_layers_are_shown_as_the_index_has_them(show: Show) -> None:
    lower, upper = show("--index", "layers")["layers"]
    assert [row["path"] for row in lower["rows"]] == ["", "etc", "gone", "etc/\ufffd"]
    assert [(row["path"], row["type"]) for row in upper["rows"]] == [
        ("", "implicit directory"),
        ("gone", "whiteout"),
        ("sym", "symlink"),
    ]
