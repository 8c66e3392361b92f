"""The tree as its users see it through the kernel."""

import ctypes
import errno
import logging
import os
import stat
import struct
from pathlib import Path

import pyfuse3
import pytest
import trio

from tests.mount.images import Entry, directory, file, image, symlink
from tests.mount.serving import in_thread, serving
from veneer.errors import MountError, Unavailable
from veneer.mount.fsmount import unattached
from veneer.mount.kernel import mounts_at
from veneer.mount.readahead import MAX_WINDOW, MIN_WINDOW
from veneer.testing.trees import difference, facts_of, node_at, scan

pytestmark = [pytest.mark.root, pytest.mark.fuse]

EVERYTHING: dict[bytes, Entry | bytes] = {
    b"bin": directory(0o1777, uid=7, gid=8),
    b"bin/tool": file(b"tool" * 5000, 0o4755, uid=1000, gid=1_000_000),
    b"bin/same": b"bin/tool",
    b"empty": file(b"", 0o000),
    b"link": symlink(b"bin/tool"),
    b"null": Entry(stat.S_IFCHR | 0o666, rdev=(1, 3)),
    b"disk": Entry(stat.S_IFBLK | 0o660, rdev=(259, 70_000)),
    b"pipe": Entry(stat.S_IFIFO | 0o600),
    b"old": file(b"x", mtime_ns=-1_500_000_000),
    b"attributed": file(b"y", xattrs=((b"trusted.veneer", b"\x00\xff"), (b"user.empty", b""))),
    b"\xff\n name": directory(),
    b"sparse": file(b"A" * 700 + b"B" * 5, sparse=(200_000, ((0, 700), (100_000, 5)))),
}


async def test_every_attribute_is_the_index_s(tmp_path: Path) -> None:
    index, data = image(EVERYTHING, root=directory(0o711, uid=3))
    async with serving(tmp_path, index, data) as mount:
        found = await in_thread(lambda: scan(mount.path))
        assert difference(facts_of(index, [data]), found) == []
        await in_thread(lambda: check_numbers(mount.path))


def check_numbers(path: Path) -> None:
    tool, same = [os.stat(path / "bin" / name) for name in ("tool", "same")]
    assert (tool.st_ino, tool.st_dev, tool.st_nlink) == (same.st_ino, same.st_dev, 2)
    assert tool.st_atime_ns == tool.st_ctime_ns == tool.st_mtime_ns
    assert os.stat(path / "bin").st_nlink == 2
    assert os.stat(path).st_ino == 1
    assert tool.st_blocks == -(-20_000 // 512)
    assert os.stat(path / "sparse").st_blocks == 2
    assert sorted(os.listdir(path)) == sorted(os.fsdecode(n) for n in EVERYTHING if b"/" not in n)
    assert os.statvfs(path).f_files == len(EVERYTHING)  # the hard link has no inode, the root has
    assert not os.access(path, os.W_OK)


def raw_listing(path: Path) -> dict[bytes, int]:
    """Names and inode numbers as the directory has them, before anything below the C library adds to it."""
    buffer = ctypes.create_string_buffer(1 << 16)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        length = ctypes.CDLL(None).getdents64(fd, buffer, len(buffer))
    finally:
        os.close(fd)
    found, at = {}, 0
    while at < length:
        inode, _, size, _ = struct.unpack_from("=QqHB", buffer, at)
        found[buffer.raw[at + 19 : at + size].partition(b"\0")[0]] = inode
        at += size
    return found


async def test_listings_hold_the_directory_and_its_parent(tmp_path: Path) -> None:
    index, data = image({b"a": directory(), b"a/b": directory(), b"a/b/c": file(b"1")})
    async with serving(tmp_path, index, data) as mount:
        path = mount.path / "a"
        found = await in_thread(lambda: raw_listing(path / "b"))
        statuses = await in_thread(lambda: [os.stat(p) for p in (path / "b", path, path / "b" / "c")])
        assert found == dict(zip((b".", b"..", b"c"), (s.st_ino for s in statuses), strict=True))


async def test_a_directory_of_20_000_entries(tmp_path: Path) -> None:
    names = [b"d/entry-%05d" % number for number in range(20_000)]
    index, data = image({b"d": directory(), **{name: file(b"") for name in names}})
    async with serving(tmp_path, index, data) as mount:
        listed = await in_thread(lambda: os.listdir(os.fsencode(mount.path) + b"/d"))
        assert listed == [name[2:] for name in names]
        lookups = mount.stats.lookups
        await in_thread(lambda: [os.lstat(os.fsencode(mount.path) + b"/" + name) for name in names[:500]])
        assert mount.stats.lookups == lookups, "the listing brought the attributes along"


async def test_a_sparse_file_of_many_gigabytes(tmp_path: Path) -> None:
    size, places = 9 << 30, (0, (4 << 30) - 3, (8 << 30) + 1)
    content = b"abcdefgh" * len(places)
    sparse = (size, tuple((place, 8) for place in places))
    index, data = image({b"big": file(content, sparse=sparse), b"hole": file(b"", sparse=(5 << 30, ()))})
    async with serving(tmp_path, index, data) as mount:

        def check() -> None:
            assert os.stat(mount.path / "big").st_size == size
            assert os.stat(mount.path / "hole").st_blocks == 0
            with open(mount.path / "big", "rb", buffering=0) as big, open(mount.path / "hole", "rb") as hole:
                for place in places:
                    got = os.pread(big.fileno(), 40, max(0, place - 16))
                    before = bytes(min(16, place))
                    assert got == (before + b"abcdefgh" + bytes(40))[:40]
                assert os.pread(big.fileno(), 100, size - 10) == bytes(10)
                assert os.pread(big.fileno(), 100, size) == b""
                assert os.pread(hole.fileno(), 4096, 3 << 30) == bytes(4096)

        mount.store.warm = False
        await in_thread(check)
        assert all(offset + length <= len(data) for offset, length, _ in mount.store.misses)
        assert mount.stats.reads > len(mount.store.misses), "holes are never asked of the store"


async def test_missing_names_are_asked_for_once(tmp_path: Path) -> None:
    index, data = image({b"a": directory()})
    async with serving(tmp_path, index, data) as mount:
        for _ in range(5):
            assert not await in_thread((mount.path / "a" / "no").exists)
        assert mount.stats.lookups == 2


async def test_warm_reads_and_attributes_stay_in_the_kernel(tmp_path: Path) -> None:
    index, data = image({b"f": file(b"0123456789" * 10_000)})
    async with serving(tmp_path, index, data) as mount:
        first = await in_thread((mount.path / "f").read_bytes)
        stats = mount.stats
        before = (stats.lookups, stats.getattrs, stats.reads)
        for _ in range(3):
            assert await in_thread((mount.path / "f").read_bytes) == first == data[:100_000]
            assert (await in_thread((mount.path / "f").stat)).st_size == 100_000
        assert (stats.lookups, stats.getattrs, stats.reads) == before


async def test_an_image_without_xattrs_is_asked_for_them_once(tmp_path: Path) -> None:
    index, data = image({b"f": file(b"1"), b"g": file(b"2")})

    def ask(path: Path) -> None:
        assert os.listxattr(path) == []
        with pytest.raises(OSError, match="not supported"):
            os.getxattr(path, "security.capability")

    async with serving(tmp_path, index, data) as mount:
        await in_thread(lambda: ask(mount.path / "f"))
        asked = mount.stats.xattrs
        await in_thread(lambda: ask(mount.path / "g"))
        assert mount.stats.xattrs == asked + 1  # for the list


@pytest.mark.parametrize("backend", ["fuse", "erofs-fuse"])
async def test_access_control_lists_are_enforced(tmp_path: Path, backend: str) -> None:
    # Version 2: owner rw, user 65534 r, group none, mask r, others none.
    entries = ((0x01, 6, -1), (0x02, 4, 65534), (0x04, 0, -1), (0x10, 4, -1), (0x20, 0, -1))
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, bits, who in entries
    )
    allowed = file(b"1", 0o640, xattrs=((b"system.posix_acl_access", acl),))
    index, data = image({b"allowed": allowed, b"denied": file(b"1", 0o640)})
    async with serving(tmp_path, index, data, backend=backend) as mount:
        for name, code in (("allowed", 0), ("denied", 1)):
            # The path down to the mount is closed to others, so the working directory is the mount itself. env
            # goes there: between vfork and exec nobody could answer, as this process waits with the GIL held.
            enter = ["env", "--chdir", str(mount.path)]
            done = await trio.run_process(
                [*enter, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", name],
                check=False,
                capture_stdout=True,
                capture_stderr=True,
            )
            assert done.returncode == code, done.stderr


def abort_connection(path: Path) -> None:
    """What an administrator does to a mount that hangs."""
    connection = os.minor(os.lstat(path).st_dev)
    with unattached("fusectl") as control:
        abort = os.open(f"{connection}/abort", os.O_WRONLY, dir_fd=control)
        try:
            os.write(abort, b"1")
        finally:
            os.close(abort)


async def test_an_aborted_connection_ends_the_mount(tmp_path: Path) -> None:
    index, data = image({b"f": file(b"content")})
    async with serving(tmp_path, index, data) as mount:
        await in_thread(lambda: abort_connection(mount.path))
        with trio.fail_after(60):
            await mount.session.ended.wait()
        with pytest.raises(OSError) as caught:
            await in_thread((mount.path / "f").read_bytes)
        assert caught.value.errno == errno.ENOTCONN
    assert not mounts_at(tmp_path / "mnt")


async def test_a_kernel_that_says_aborted_means_the_end_and_not_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some kernels report the end of a connection so, when it comes while requests are being taken.
    async def main(max_tasks: int) -> None:
        raise ExceptionGroup("tasks", [ConnectionAbortedError(errno.ECONNABORTED, "receive_buf failed")])

    monkeypatch.setattr(pyfuse3, "main", main)
    index, data = image({b"f": file(b"content")})
    async with serving(tmp_path, index, data) as mount:
        with trio.fail_after(60):
            await mount.session.ended.wait()
    assert not mounts_at(tmp_path / "mnt")


async def test_a_failed_read_is_an_error_and_not_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index, data = image({b"a": directory(), b"a/f": file(b"content")})
    async with serving(tmp_path, index, data) as mount:
        mount.store.warm, mount.store.failure = False, Unavailable("registry.test: connection refused")
        for _ in range(3):
            with caplog.at_level(logging.ERROR), pytest.raises(OSError) as caught:
                await in_thread((mount.path / "a/f").read_bytes)
            assert caught.value.errno == errno.EIO
        assert mount.stats.failed_reads >= 3
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1, "once, however often it is tried"
        assert all(part in told[0] for part in ("image=test", "'/a/f'", "registry.test: connection refused"))
        mount.store.failure = None
        assert await in_thread((mount.path / "a/f").read_bytes) == b"content"


async def test_small_files_are_fetched_whole_and_large_ones_ahead(tmp_path: Path) -> None:
    index, data = image({b"small": file(b"s" * 300_000), b"large": file(os.urandom(32 << 20))})
    async with serving(tmp_path, index, data) as mount:
        mount.store.warm = False

        def read(name: str, offset: int, length: int) -> bytes:
            fd = os.open(mount.path / name, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead by the kernel
                return os.pread(fd, length, offset)
            finally:
                os.close(fd)

        await in_thread(lambda: read("small", 200_000, 10))
        assert {window for _, _, window in mount.store.misses} == {(0, 300_000)}
        mount.store.misses.clear()
        large = index.data[node_at(index, b"large") or 0]
        assert await in_thread(lambda: read("large", 20 << 20, 4096)) == data[large + (20 << 20) :][:4096]
        at = large + (20 << 20)
        assert mount.store.misses[0][2] == (at, at + MIN_WINDOW)
        mount.store.misses.clear()
        assert await in_thread((mount.path / "large").read_bytes) == data[large:]
        sizes = [window[1] - window[0] for _, _, window in mount.store.misses if window is not None]
        assert max(sizes) == MAX_WINDOW
        assert all(window and window[1] <= len(data) for _, _, window in mount.store.misses)


async def test_unmounting_says_who_is_in_the_way(tmp_path: Path) -> None:
    index, data = image({b"f": file(b"1")})
    async with serving(tmp_path, index, data) as mount:
        async with await trio.open_file(mount.path / "f"):  # in a thread
            with pytest.raises(MountError, match=rf"in use by .*\({os.getpid()}\)") as caught:
                await mount.session.unmount()
            assert caught.value.hint
            assert mounts_at(mount.path)
        await mount.session.unmount()
        await mount.session.ended.wait()
        assert not mounts_at(mount.path)


async def test_reads_under_way_end_when_the_mount_goes(tmp_path: Path) -> None:
    """Threads stuck in cold reads must come free, with an error, and nothing must hang."""
    index, data = image({b"f%d" % number: file(b"x" * 5000) for number in range(30)})
    outcomes: list[int | None] = []

    def read(path: Path) -> None:
        try:
            path.read_bytes()
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno)

    async with trio.open_nursery() as nursery, serving(tmp_path, index, data) as mount:
        mount.store.warm = False
        mount.store.blocked = trio.Event()
        for number in range(30):
            nursery.start_soon(trio.to_thread.run_sync, read, mount.path / f"f{number}")
        while len(mount.store.misses) < 30:
            await mount.store.missed.wait()
        # Look-ups are answered although thirty reads wait.
        assert await in_thread(lambda: (mount.path / "f3").stat().st_size) == 5000
    assert len(outcomes) == 30
    assert 0 not in outcomes
    assert not mounts_at(mount.path)
