"""Single files without a mount: paths as a container sees them, content in few requests."""

import json
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.cli.invoking import Result, invoke
from tests.convert.layouts import Layout
from tests.image.conftest import BASE, BIG, TOP
from veneer.convert.convert import convert
from veneer.errors import NotFound, UsageError
from veneer.image import open_image
from veneer.image.files import list_path, read_file
from veneer.index.paths import find
from veneer.settings import Settings
from veneer.store.spanstore import open_store
from veneer.testing.images import write_image
from veneer.testing.registry import ScriptedRegistry
from veneer.testing.tars import TarItem
from veneer.testing.trees import node_at

pytestmark = pytest.mark.network


async def content(reference: str, path: bytes, settings: Settings) -> bytes:
    pieces: list[bytes] = []
    async with (
        open_image(reference, settings) as image,
        open_store(settings) as store,
        aclosing(read_file(image, store, path)) as reader,
    ):
        pieces += [piece async for piece in reader]
    return b"".join(pieces)


async def test_files_are_read_whole_holes_and_all(registry: ScriptedRegistry, settings: Settings) -> None:
    reference = f"{registry.host}/app:v1"
    sparse = bytes(5_000_000) + b"middle" + bytes(9_000_000 - 5_000_006)
    expected = {
        b"/big": BIG,
        b"sparse": sparse,
        b"empty": b"",
        b"/release": b"ID=test\n",
        b"out": b"ID=test\n",
        b"bin/absolute": b"ID=test\n",
        b"../../etc/./os-release": b"ID=test\n",
        b"tool": b"#!tool",
        b"/hard": b"#!tool",
        b"bin/../bin/tool": b"#!tool",
    }
    for path, data in expected.items():
        assert await content(reference, path, settings) == data


async def test_a_large_file_takes_few_requests_and_no_more_bytes_than_its_spans(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    reference = f"{registry.host}/app:v1"
    async with open_image(reference, settings) as image:
        base = image.manifest.layers[0]
    del registry.requests[:]
    assert await content(reference, b"big", settings) == BIG
    of_layer = registry.asked("GET", str(base.digest))
    assert 1 <= len(of_layer) <= 3
    assert sum(record.bytes_sent for record in of_layer) < base.size
    del registry.requests[:]
    assert await content(reference, b"big", settings) == BIG
    assert not registry.asked("GET", "/blobs/")


async def test_what_is_no_file_is_refused(registry: ScriptedRegistry, settings: Settings) -> None:
    reference = f"{registry.host}/app:v1"
    for path, why in (
        (b"nothing", "no such file"),
        (b"big/below", "not a directory"),
        (b"loop", "too many levels"),
        (b"etc/os-release/..", "not a directory"),
    ):
        with pytest.raises(NotFound, match=why):
            await content(reference, path, settings)
    with pytest.raises(UsageError, match="is a directory"):
        await content(reference, b"etc", settings)


async def test_forty_symlinks_are_followed_and_one_more_is_not(tmp_path: Path, settings: Settings) -> None:
    links = [TarItem(b"link%d" % n, "symlink", link=b"link%d" % (n - 1)) for n in range(1, 42)]
    write_image([(TarItem(b"link0", content=b"end"), *links)], tmp_path / "source", "v1")
    target = f"oci:{tmp_path / 'target'}:v1"
    await convert(f"oci:{tmp_path / 'source'}:v1", target, settings)
    async with open_image(target, settings) as image:
        assert find(image.index, b"link40", "x") == node_at(image.index, b"link0")
        with pytest.raises(NotFound, match="too many levels"):
            find(image.index, b"link41", "x")


async def test_listing_shows_what_the_tar_says(registry: ScriptedRegistry, settings: Settings) -> None:
    async with open_image(f"{registry.host}/app:v1", settings) as image:
        top = {entry.path: entry for entry in list_path(image.index, b"/", "x")}
        everything = [entry.path for entry in list_path(image.index, b"", "x", recursive=True)]
        (single,) = list_path(image.index, b"etc/os-release", "x")
        (link,) = list_path(image.index, b"bin", "x")
        through = [entry.path for entry in list_path(image.index, b"bin/", "x")]
    assert list(top) == sorted(top)
    assert top[b"hard"].nlink == 2
    assert top[b"bin"].target == b"usr/bin"
    assert top[b"xattrs"].xattrs == (b"user.note",)
    assert b"usr/bin/tool" in everything
    assert len(everything) == len(set(everything))
    assert (single.mode, single.uid, single.gid, single.size) == (0o100644, 1, 2, 8)
    assert single.mtime_ns == 1_700_000_000 * 10**9
    assert link.type == "symlink"
    assert through == [b"bin/absolute", b"bin/tool"]


class TestCommands:
    """The commands over a layout, as a user types them."""

    @pytest.fixture
    def lazy(self, tmp_path: Path) -> str:
        write_image([BASE, TOP], tmp_path / "source", "v1", config={"Cmd": ["/bin/tool"]})
        result = self.run(tmp_path, "convert", "--json", f"oci:{tmp_path}/source:v1", f"oci:{tmp_path}/lazy:v1")
        document = json.loads(result.stdout)
        assert document["digest"] == Layout(tmp_path / "lazy").tags()["v1"]["digest"]
        return f"oci:{tmp_path}/lazy:v1"

    @staticmethod
    def run(tmp_path: Path, *argv: str, code: int = 0) -> Result:
        environment = {"VENEER_CACHE_DIR": str(tmp_path / "cache"), "VENEER_PLATFORM": "linux/amd64"}
        result = invoke(*argv, env=environment)
        assert result.exit_code == code, result.stderr
        return result

    def test_inspect(self, lazy: str, tmp_path: Path) -> None:
        text = self.run(tmp_path, "inspect", lazy).stdout
        assert "yes, because the manifest names an index" in text
        document = json.loads(self.run(tmp_path, "inspect", lazy, "--json").stdout)
        assert document["lazy"] is True
        assert document["stored_size"] == sum(layer["stored_size"] for layer in document["layers"])
        plain = json.loads(self.run(tmp_path, "inspect", f"oci:{tmp_path}/source:v1", "--json").stdout)
        assert plain["lazy"] is False
        assert [layer["diff_id"] for layer in plain["layers"]] == [
            layer["diff_id"] for layer in document["layers"]
        ]

    def test_ls(self, lazy: str, tmp_path: Path) -> None:
        assert self.run(tmp_path, "ls", lazy, "/usr/bin").stdout == "/usr/bin/absolute\n/usr/bin/tool\n"
        assert "-rwsr-xr-x" in self.run(tmp_path, "ls", "-lR", lazy).stdout
        entries = json.loads(self.run(tmp_path, "ls", "--json", lazy, "etc").stdout)
        assert [(entry["path"], entry["mode"], entry["size"]) for entry in entries] == [
            ("/etc/os-release", "0644", 8)
        ]
        assert "no such file" in self.run(tmp_path, "ls", lazy, "/none", code=11).stderr

    def test_cat(self, lazy: str, tmp_path: Path) -> None:
        assert self.run(tmp_path, "cat", lazy, "/big").content == BIG

    def test_verify(self, lazy: str, tmp_path: Path) -> None:
        assert json.loads(self.run(tmp_path, "verify", "--json", lazy).stdout)["ok"] is True
        layout = Layout(tmp_path / "lazy")
        layout.flip(layout.manifest("v1")["layers"][0]["digest"], 100)
        result = self.run(tmp_path, "verify", lazy, code=20)
        assert "NOT ok" in result.stdout
