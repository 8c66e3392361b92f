"""Mounts that other mount namespaces have copies of, as containers started meanwhile do."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.layouts import LARGE
from tests.processes import kill_at_once
from tests.waiting import eventually
from veneer.daemon import client, mounts
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import MountError
from veneer.mount.kernel import mount_table, mounts_at
from veneer.mount.state import mount_records
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]

#: Reads all of a file when it is told to, and says with which error if it cannot.
HOLDER = """
import sys
print("up", flush=True)
sys.stdin.read(1)
try:
    with open(sys.argv[1], "rb") as file:
        sys.stdout.buffer.write(file.read())
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture(params=["fuse", "erofs-fuse", "erofs-fanotify"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Everything here holds for every backend."""
    return replace(settings, backend=str(request.param))


def mount(image: str, mountpoint: Path, settings: Settings, *, writable: bool = False) -> MountInfo:
    return client.mount_image(MountRequest.create(image, mountpoint, settings, writable=writable))


@contextmanager
def elsewhere(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with copies of all mounts that there are now. It reads the file with its first input."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", HOLDER]
    with subprocess.Popen([*command, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield process
        finally:
            process.kill()


def left(directory: Path) -> list[Path]:
    """What a finished mount may not leave."""
    found = [path for name in ("run/mounts", "cache/uppers") for path in (directory / name).glob("[!.]*")]
    return found + [path for path in [directory / "mnt"] if path.exists()]


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
def test_whoever_has_a_copy_is_named_and_served_until_they_leave(
    workplace: Path, settings: Settings, image: str, writable: bool
) -> None:
    mount(image, workplace / "mnt", settings, writable=writable)
    with elsewhere(workplace / "mnt/large") as holder:
        _, stopped = mounts.umount(workplace / "mnt", settings.run_dir)
        (user,) = stopped.users or ["nobody"]
        assert re.fullmatch(rf"\S+ \({holder.pid}\) on {workplace}/mnt", user)
        assert not mounts_at(workplace / "mnt")
        (found,) = mounts.list_mounts(settings.run_dir).mounts
        assert found.record.kind == "detached"
        assert found.report is not None

        mount(image, workplace / "mnt", settings)
        assert mounts.umount(workplace / "mnt", settings.run_dir)[1].users is None
        data, _ = holder.communicate(b"!")
        assert data == LARGE, "cold, and in a directory that was made for the mount"
        assert holder.returncode == 0
    eventually(lambda: not left(workplace))


def test_a_mount_that_was_unmounted_by_hand_frees_its_place(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings)
    with elsewhere(workplace / "mnt/large") as holder:
        subprocess.run(["umount", workplace / "mnt"], check=True)
        eventually(lambda: [record.kind for record in mount_records(settings.run_dir)] == ["detached"])
        mount(image, workplace / "mnt", settings)
        assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
        assert holder.communicate(b"!")[0] == LARGE
    mounts.umount(workplace / "mnt", settings.run_dir)
    eventually(lambda: not [path for path in left(workplace) if path.name != "mnt"])


def test_what_a_copy_is_read_as_when_its_process_is_killed(
    workplace: Path, settings: Settings, image: str
) -> None:
    info = mount(image, workplace / "mnt", settings)
    with elsewhere(workplace / "mnt/large") as holder:
        mounts.umount(workplace / "mnt", settings.run_dir)
        daemon = mounts.list_mounts(settings.run_dir).daemon
        kill_at_once([info.pid if daemon is None else int(daemon["worker"])])
        data, _ = holder.communicate(b"!")
        if daemon is not None:
            assert data == LARGE, "another worker serves it"
        else:
            assert data == b""
            assert holder.returncode in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
    mounts.list_mounts(settings.run_dir)
    eventually(lambda: not left(workplace))


def test_unmounting_in_another_mount_namespace_unmounts_in_both(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings, writable=True)
    command = f"{sys.executable} -m veneer umount --json {workplace}/mnt"
    environ = {"VENEER_RUN_DIR": str(settings.run_dir), "VENEER_CACHE_DIR": str(settings.cache_dir)}
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *command.split()],
        env=os.environ | environ,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert json.loads(done.stdout)["in_use"] is False
    assert not [entry for entry in mount_table() if workplace in entry.mountpoint.parents]
    eventually(lambda: not left(workplace))


def test_users_in_the_same_mount_namespace_are_named(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "mnt", settings)
    (workplace / "bound").mkdir()
    subprocess.run(["mount", "--bind", workplace / "mnt/etc", workplace / "bound"], check=True)
    with ExitStack() as stack:
        stack.callback(lambda: subprocess.run(["umount", workplace / "bound"], check=True))
        file = stack.enter_context((workplace / "mnt/large").open("rb"))
        with pytest.raises(MountError, match="in use by"):
            mounts.umount(workplace / "mnt", settings.run_dir)
        _, stopped = mounts.umount(workplace / "mnt", settings.run_dir, lazy=True)
        assert stopped.users is not None
        assert stopped.users[0].endswith(f"({os.getpid()})")
        assert stopped.users[1] == f"the mount {workplace}/bound"
        assert not (workplace / "mnt").exists()
        assert file.read() == LARGE
    eventually(lambda: not left(workplace))
