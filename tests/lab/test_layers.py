"""Layers cut from root file systems put together again give the root file system."""

import gzip
import io
import py_compile
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from veneer.errors import UsageError
from veneer.lab.build import build_images, built_image, layout_of, store_image
from veneer.lab.imageset import IMAGES, ImageSpec, Probe, find_images
from veneer.lab.layers import EPOCH, app_layer, compress, difference, survey

BASE = {
    "bin/": b"",
    "bin/sh": b"shell",
    "bin/ls": b"list",
    "etc/": b"",
    "etc/passwd": b"root",
    "old/": b"",
    "old/x": b"x",
}


def write(path: Path, entries: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            entry = tarfile.TarInfo(f"./{name}")
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"./{target}"
            tar.addfile(entry)
    return path


def contents(path: Path) -> dict[str, bytes | None]:
    with tarfile.open(path) as tar:
        return {
            entry.name.removeprefix("./"): file.read() if (file := tar.extractfile(entry)) else None
            for entry in tar
        }


def test_a_layer_has_what_is_new_and_hides_what_is_gone(tmp_path: Path) -> None:
    full = {name: data for name, data in BASE.items() if not name.startswith("old")}
    full |= {"etc/passwd": b"root and more", "lib/": b"", "lib/a": b"a", "etc/key": b"secret"}
    base, whole = write(tmp_path / "base", BASE), write(tmp_path / "whole", full)
    count = difference(survey(base), whole, tmp_path / "layer", removed=["etc/key"])
    expected = {"etc/passwd": b"root and more", "lib": None, "lib/a": b"a", ".wh.old": b""}
    assert contents(tmp_path / "layer") == expected
    assert count == len(expected)


def test_other_names_of_files_below_become_files(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    whole = write(tmp_path / "whole", BASE | {"bin/new": b"new"}, {"bin/dir": "bin/ls", "bin/newer": "bin/new"})
    difference(survey(base), whole, tmp_path / "layer")
    with tarfile.open(tmp_path / "layer") as tar:
        kinds = {entry.name.removeprefix("./"): entry.type for entry in tar}
        copy = tar.extractfile("./bin/dir")
        assert copy is not None
        assert copy.read() == b"list"
    assert kinds == {"bin/new": tarfile.REGTYPE, "bin/dir": tarfile.REGTYPE, "bin/newer": tarfile.LNKTYPE}


def test_compiled_modules_stay_those_of_their_source(tmp_path: Path) -> None:
    """Clamping times makes them stale, and every start would compile what it imports."""
    source = tmp_path / "root/lib/module.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 1\n")
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    with tarfile.open(tmp_path / "whole", "w") as tar:

        def clamped(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime = EPOCH
            return entry

        tar.add(tmp_path / "root", ".", filter=clamped)
    difference({}, tmp_path / "whole", tmp_path / "layer")
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "layer", "-C", tmp_path / "there"], check=True)
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'there/lib')!r}); import module"
    told = subprocess.run([sys.executable, "-Bv", "-c", program], capture_output=True, text=True, check=True)
    assert f"module.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc matches" in told.stderr


def test_the_same_files_make_the_same_bytes(tmp_path: Path) -> None:
    stored = []
    for name in ("one", "two"):
        app_layer(tmp_path / name, {"app/x": b"x", "a/b/c": b"deep"}, synthetic=1)
        stored.append(compress(tmp_path / name, tmp_path / f"{name}.gz"))
    assert (stored[0].digest, stored[0].diff_id) == (stored[1].digest, stored[1].diff_id)
    tar = gzip.decompress(stored[0].path.read_bytes())
    assert len(tar) == stored[0].size
    assert tar == (tmp_path / "one").read_bytes()
    assert list(contents(tmp_path / "one")) == ["a", "a/b", "app", "data", "a/b/c", "app/x", "data/00"]
    # Neither nothing nor all of the made-up bytes compresses away.
    assert 0.2 < stored[0].stored / stored[0].size < 0.8


def test_an_image_of_the_same_definition_is_not_built_again(tmp_path: Path) -> None:
    spec = ImageSpec("tiny", "", (), ("/x",), Probe("exit"), {"x": b"program"})
    made = store_image(spec, (), tmp_path)
    assert built_image(tmp_path, spec) == made
    assert build_images([spec], tmp_path) == [made]  # and needs no mmdebstrap for it
    assert (layout_of(tmp_path) / "blobs/sha256" / made.digest.removeprefix("sha256:")).exists()
    changed = ImageSpec("tiny", "", (), ("/x", "-v"), Probe("exit"), {"x": b"program"})
    assert built_image(tmp_path, changed) is None


def test_the_set_is_complete_and_its_ports_are_its_own() -> None:
    interpreters, servers = ["base", "python", "python-sci"], ["node", "nginx", "redis", "postgres"]
    assert list(IMAGES) == [*interpreters, *servers, "openjdk", "gcc", "synthetic"]
    ports = [image.probe.port for image in IMAGES.values() if image.probe.is_server]
    assert len(ports) == len(set(ports)) == 4
    assert find_images(("gcc", "base")) == (IMAGES["gcc"], IMAGES["base"])
    with pytest.raises(UsageError, match="no such image: gc"):
        find_images(("gc",))
