"""Mounting without root, through fusermount3."""

import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.mount.images import directory, file, image, symlink
from tests.mount.serving import in_thread, serving
from veneer.errors import MountError
from veneer.mount.access import FUSE_DEVICE
from veneer.mount.kernel import mounts_at

pytestmark = [pytest.mark.root, pytest.mark.fuse]

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of a user without rights; pytest's own ones are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="veneer-rootless-"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse as distributions have it, whatever this machine thinks."""
    mode = stat.S_IMODE(FUSE_DEVICE.stat().st_mode)
    FUSE_DEVICE.chmod(0o666)
    yield
    FUSE_DEVICE.chmod(mode)


def as_nobody(function: Callable[[], None]) -> None:
    """Run in a child without rights. It executes nothing: the interpreter's own files may be closed to it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            function()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent must be told by the exit code, whatever it was
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("open_device")
def test_a_user_mounts_reads_and_unmounts(home: Path) -> None:
    tree = {
        b"d": directory(),
        b"d/f": file(b"content" * 50_000),
        b"l": symlink(b"d/f"),
        b"secret": file(b"for root", 0o600),
        b"mine": file(b"for nobody", 0o600, uid=NOBODY),
    }
    index, data = image(tree)

    def check(path: Path) -> None:
        assert (path / "l").read_bytes() == b"content" * 50_000
        assert (path / "mine").read_bytes() == b"for nobody"
        with pytest.raises(PermissionError):
            (path / "secret").read_bytes()

    async def work() -> None:
        async with serving(home, index, data) as mount:
            await in_thread(lambda: check(mount.path))
            async with await trio.open_file(mount.path / "d/f"):
                with pytest.raises(MountError, match="in use"):
                    await mount.session.unmount()
            await mount.session.unmount()
            await mount.session.ended.wait()
        assert not mounts_at(home / "mnt")

    as_nobody(lambda: trio.run(work))


def test_a_closed_device_is_explained(home: Path) -> None:
    index, data = image({b"f": file(b"1")})
    mode = stat.S_IMODE(FUSE_DEVICE.stat().st_mode)
    FUSE_DEVICE.chmod(0o600)

    async def work() -> None:
        with pytest.raises(MountError, match="cannot open /dev/fuse: Permission denied") as caught:
            async with serving(home, index, data):
                pytest.fail("mounted")
        assert caught.value.hint

    try:
        as_nobody(lambda: trio.run(work))
    finally:
        FUSE_DEVICE.chmod(mode)
