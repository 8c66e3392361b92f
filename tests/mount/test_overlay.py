"""A writable layer over an image, as programs use it."""

import mmap
import os
import shutil
import stat
from pathlib import Path

import pytest
import trio

from tests.mount.images import Entry, MemoryStore, directory, file, image
from tests.mount.serving import in_thread, mounter_of, serving
from veneer.errors import MountError
from veneer.mount import kernel
from veneer.mount.kernel import mount_table, mounts_at
from veneer.mount.session import mounted
from veneer.mount.upper import Upper

pytestmark = [pytest.mark.root, pytest.mark.fuse]

BACKENDS = pytest.mark.parametrize("backend", ["fuse", "erofs-fuse"])

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
TREE: dict[bytes, Entry | bytes] = {
    b"bin": directory(),
    b"bin/busybox": file(Path("/bin/busybox").read_bytes(), 0o755),
    b"bin/echo": b"bin/busybox",
    b"d": directory(0o750, uid=5),
    b"d/one": file(b"one", 0o640, uid=5, gid=6, xattrs=((b"trusted.veneer", b"1"), (b"user.u", b"2"))),
    b"d/two": file(b"two" * 100_000),
    b"d/three": file(b"three"),
    b"ping": file(b"p", 0o755, xattrs=((b"security.capability", CAPABILITY),)),
}
ROOT = directory(
    0o711,
    uid=3,
    gid=4,
    mtime_ns=1_500_000_000_123_456_789,
    xattrs=((b"security.selinux", b"label"), (b"user.root", b"r")),
)


@BACKENDS
async def test_programs_write_and_the_image_does_not_change(tmp_path: Path, backend: str) -> None:
    index, data = image(TREE, root=ROOT)

    def work(path: Path) -> None:
        root = path.stat()
        assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid) == (0o711, 3, 4)
        attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        assert attributes["user.root"] == b"r"
        assert b"label" not in attributes.values(), "labels are for the host to give"
        assert root.st_mtime_ns == 1_500_000_000_123_456_789
        # Appending copies the file up, with everything that belongs to it.
        with (path / "d/one").open("ab") as one:
            one.write(b"+more")
        status = (path / "d/one").stat()
        assert (path / "d/one").read_bytes() == b"one+more"
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 5, 6)
        assert os.getxattr(path / "d/one", "trusted.veneer") == b"1"
        assert os.getxattr(path / "d/one", "user.u") == b"2"
        os.chown(path / "ping", 0, 1)
        assert "security.capability" not in os.listxattr(path / "ping"), "chown drops capabilities"
        # Mapped, changed through the mapping, and read back.
        with (path / "d/two").open("r+b") as two, mmap.mmap(two.fileno(), 0) as view:
            assert view[:6] == b"twotwo"
            view[:3] = b"TWO"
        assert (path / "d/two").read_bytes() == b"TWO" + b"two" * 99_999
        (path / "new").write_bytes(b"new")
        (path / "new").rename(path / "d/three")
        assert (path / "d/three").read_bytes() == b"new"
        (path / "d/two").unlink()
        assert sorted(os.listdir(path / "d")) == ["one", "three"]
        shutil.move(path / "d", path / "e")
        assert not (path / "d").exists()
        (path / "d").mkdir()
        assert os.listdir(path / "d") == [], "a new directory does not show the one it replaces"
        os.mknod(path / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert (path / "node").read_bytes() == b""

    async with serving(tmp_path, index, data, overlay=True, backend=backend) as mount:
        await in_thread(lambda: work(mount.path))
        # Through env: between vfork and exec nobody could answer, as this process waits with the GIL held.
        done = await trio.run_process(["env", mount.path / "bin/echo", "hello"], capture_stdout=True)
        assert done.stdout == b"hello\n"
        assert (await in_thread((tmp_path / "lower/d/one").read_bytes)) == b"one"
    assert not (tmp_path / "upper").exists(), "a private layer goes with its mount"


@BACKENDS
async def test_a_layer_that_is_kept_can_be_used_again(tmp_path: Path, backend: str) -> None:
    index, data = image(TREE, root=ROOT)
    # Characters that mean something in mount options.
    kept = tmp_path / "a:b,c\\d e" / "upper"
    mountpoint, lower = tmp_path / "m,n:t", tmp_path / "l:o,w\\er"
    mountpoint.mkdir()
    lower.mkdir()
    for turn in range(2):
        mounter = await mounter_of(index, MemoryStore([data]), tmp_path, backend)
        async with mounted(mounter, mountpoint, lower=lower, upper=Upper.at(kept)):
            if turn == 0:
                await in_thread(lambda: (mountpoint / "d/kept").write_bytes(b"kept"))
                await in_thread((mountpoint / "ping").unlink)
            assert await in_thread((mountpoint / "d/kept").read_bytes) == b"kept"
            assert not await in_thread((mountpoint / "ping").exists)
        assert [entry.name for entry in kept.parent.iterdir()] == ["upper"], "no scratch space is left"
    assert not [entry for entry in mount_table() if tmp_path in entry.mountpoint.parents]


@BACKENDS
async def test_unmounting_the_overlay_by_hand_ends_the_session(tmp_path: Path, backend: str) -> None:
    index, data = image(TREE)
    async with serving(tmp_path, index, data, overlay=True, backend=backend) as mount:
        await trio.run_process(["umount", mount.path])
        await mount.session.ended.wait()
        assert not mounts_at(tmp_path / "lower")


async def test_an_unmount_whose_notice_got_lost_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between a look at the table of mounts and the wait for its next change."""
    look = kernel.our_mountpoints
    raced: list[bytes] = []

    def unmount_after_looking() -> dict[bytes, str]:
        found = look()
        mountpoint = os.fsencode(tmp_path / "mnt")
        if mountpoint in found and not raced:
            raced.append(mountpoint)
            kernel.unmount_ours(tmp_path / "mnt", lazy=True)
        return found

    monkeypatch.setattr(kernel, "our_mountpoints", unmount_after_looking)
    index, data = image(TREE)
    async with serving(tmp_path, index, data, overlay=True) as mount:
        with trio.fail_after(30):
            await mount.session.ended.wait()
    assert raced


@BACKENDS
async def test_a_layer_that_cannot_be_used_leaves_nothing_mounted(tmp_path: Path, backend: str) -> None:
    index, data = image(TREE)
    mountpoint, lower = tmp_path / "mnt", tmp_path / "lower"
    mountpoint.mkdir()
    lower.mkdir()
    (tmp_path / "file").write_text("")
    mounter = await mounter_of(index, MemoryStore([data]), tmp_path, backend)
    with pytest.raises(MountError, match="upper directory"):
        async with mounted(mounter, mountpoint, lower=lower, upper=Upper.at(tmp_path / "file/upper")):
            pytest.fail("mounted")
    assert not [entry for entry in mount_table() if tmp_path in entry.mountpoint.parents]
