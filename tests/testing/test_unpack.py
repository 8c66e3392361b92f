"""The reference unpacker is right itself: umoci leaves the same tree."""

import os
import subprocess
from pathlib import Path

import pytest

from veneer.testing.images import write_image
from veneer.testing.tars import TarItem, opaque, tar, whiteout
from veneer.testing.trees import difference, scan
from veneer.testing.unpack import unpack_layers

LOWER = (
    TarItem(b"./", "dir", mode=0o755, mtime_ns=1_500_000_000_000_000_001),
    TarItem(b"etc/", "dir", mode=0o750, gid=42, mtime_ns=1_500_000_001_000_000_000),
    TarItem(
        b"etc/passwd", content=b"root:x:0:0\n", mtime_ns=999_999_999, xattrs=((b"user.origin", b"lower\xff"),)
    ),
    TarItem(b"etc/hidden", content=b"x"),
    TarItem(b"cache/", "dir", mtime_ns=5),
    TarItem(b"cache/old", content=b"y"),
    TarItem(b"cache/sub/", "dir"),
    TarItem(b"cache/sub/older", content=b"z"),
    TarItem(b"bin/", "dir"),
    TarItem(b"bin/tool", mode=0o4755, content=b"#!" * 3000),
    TarItem(b"bin/alias", "link", link=b"bin/tool", mode=0o600, uid=9),
    TarItem(b"bin/sh", "symlink", link=b"tool", uid=3, gid=4, mtime_ns=7_000_000_007),
    TarItem(b"\xff\xfe", content=b"bytes"),
    TarItem(b"file-then-dir", content=b"1"),
    TarItem(b"dir-then-file/", "dir"),
    TarItem(b"dir-then-file/inside", content=b"2"),
)
UPPER = (
    TarItem(b"etc/", "dir", mode=0o711, uid=1, mtime_ns=1_600_000_000_000_000_123),
    whiteout(b"etc/hidden"),
    TarItem(b"cache/", "dir", mtime_ns=6),
    opaque(b"cache"),
    TarItem(b"cache/new", content=b"n"),
    TarItem(b"file-then-dir/", "dir", mode=0o700),
    TarItem(b"file-then-dir/now", content=b"3"),
    TarItem(b"dir-then-file", content=b"4"),
    TarItem(b"bin/pipe", "fifo", mode=0o640),
    TarItem(b"sparse", pieces=((0, b"a" * 512), (1 << 20, b"b" * 100)), size=3 << 20),
)


@pytest.mark.root
def test_umoci_leaves_the_same_tree(tmp_path: Path) -> None:
    layers = [tar(LOWER), tar(UPPER)]
    write_image(layers, tmp_path / "layout", "latest", "gzip")
    command = ["umoci", "unpack", "--image", f"{tmp_path}/layout:latest", str(tmp_path / "bundle")]
    subprocess.run(command, check=True, capture_output=True)

    (tmp_path / "ours").mkdir()
    unpack_layers(layers, tmp_path / "ours")

    assert difference(scan(tmp_path / "bundle/rootfs"), scan(tmp_path / "ours")) == []


def test_times_do_not_follow_a_symlink_in_the_place_of_a_parent(tmp_path: Path) -> None:
    below = tar(
        [
            TarItem(b"a/kept", "dir", mtime_ns=3),
            TarItem(b"a/gone", "dir", mtime_ns=5),
            TarItem(b"a/gone/kept", "dir", mtime_ns=7),
        ]
    )
    unpack_layers([below, tar([TarItem(b"a/gone", "symlink", link=b".")])], tmp_path)
    assert (tmp_path / "a/kept").stat().st_mtime_ns == 3


def test_a_scan_notices_every_kind_of_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.link(tmp_path / "file", tmp_path / "name")
    (tmp_path / "link").symlink_to("file")
    before = scan(tmp_path)
    assert difference(before, scan(tmp_path)) == []

    status = (tmp_path / "file").stat()
    (tmp_path / "file").write_bytes(b"CONTENT")
    os.utime(tmp_path / "file", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [line.split(" is ")[0] for line in difference(before, scan(tmp_path))] == [
        "/file: content",
        "/name: content",
    ]

    (tmp_path / "name").unlink()
    (tmp_path / "name").write_bytes(b"CONTENT")
    os.utime(tmp_path / "name", ns=(status.st_atime_ns, status.st_mtime_ns))
    lines = "\n".join(difference(before, scan(tmp_path)))
    assert "/file: nlink is 1, not 2" in lines
    assert "/name: group is b'name', not b'file'" in lines

    (tmp_path / "link").unlink()
    assert "/link: missing" in difference(before, scan(tmp_path))
    assert "/link: should not be there" in difference(scan(tmp_path), before)


def test_holes_and_zeros_are_the_same_content(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    data = b"a" * 1000 + bytes(1 << 18) + b"b"
    dense.write_bytes(data)
    with sparse.open("wb") as file:
        file.write(b"a" * 1000)
        file.seek(len(data) - 1)
        file.write(b"b")
    facts = scan(tmp_path)
    assert facts[b"dense"].content == facts[b"sparse"].content
    sparse.write_bytes(data[:-1] + b"c")
    assert scan(tmp_path)[b"sparse"].content != facts[b"sparse"].content
