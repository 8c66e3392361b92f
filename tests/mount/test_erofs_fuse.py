"""The backend erofs-fuse through the kernel: what it leaves to the kernel, and how it fails."""

import errno
import mmap
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.erofs.images import device_of, index_of
from tests.mount.images import Entry, MemoryStore, directory, file, image, symlink
from tests.mount.serving import Mounted, in_thread, mounter_of, serving
from veneer.errors import Unavailable
from veneer.mount.backends import Subject, open_mounter
from veneer.mount.erofs import takes_direct_io
from veneer.mount.kernel import mount_table
from veneer.mount.readahead import MIN_WINDOW
from veneer.mount.session import mounted
from veneer.store.pin import Freeze
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import difference, facts_of, node_at, scan

pytestmark = [pytest.mark.root, pytest.mark.fuse]

PAGE = mmap.PAGESIZE
BACKEND = "erofs-fuse"
#: Data that are not aligned to blocks in the file, so that their chunks have to be copied to a tail.
UNALIGNED = file(b"A" * 7001 + b"B" * 5000, sparse=(300_000, ((3, 7001), (100_001, 5000))))


def pread(path: Path, length: int, offset: int, advice: int = os.POSIX_FADV_RANDOM) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, advice)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def mount_lines() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def loop_devices() -> set[Path]:
    """Those in use."""
    return set(Path("/sys/block").glob("loop*/loop"))


def requests(mount: Mounted) -> int:
    stats = mount.stats
    return stats.lookups + stats.getattrs + stats.opens + stats.readdirs + stats.reads + stats.xattrs


async def test_every_attribute_is_the_index_s(tmp_path: Path) -> None:
    tree: dict[bytes, Entry | bytes] = {
        b"bin": directory(0o1777, uid=7, gid=8),
        b"bin/tool": file(b"tool" * 5000, 0o4755, uid=1000, gid=1_000_000),
        b"bin/same": b"bin/tool",
        b"empty": file(b"", 0o000),
        b"link": symlink(b"bin/tool"),
        b"null": Entry(stat.S_IFCHR | 0o666, rdev=(1, 3)),
        b"old": file(b"x", mtime_ns=-1_500_000_000),
        b"attributed": file(b"y", xattrs=((b"trusted.veneer", b"\x00\xff"), (b"user.empty", b""))),
        b"unaligned": UNALIGNED,
    }
    index, data = image(tree, root=directory(0o711, uid=3))
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        mount.store.warm = False
        assert difference(facts_of(index, [data]), await in_thread(lambda: scan(mount.path))) == []


async def test_the_kernel_answers_everything_but_cold_reads(tmp_path: Path) -> None:
    tree: dict[bytes, Entry | bytes] = {b"d": directory(), b"d/f": file(os.urandom(100_000))}
    index, data = image(tree | {b"d/g%d" % number: file(b"%d" % number) for number in range(100)})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        before = requests(mount)
        await in_thread(lambda: [entry.stat() for entry in os.scandir(mount.path / "d")])
        await in_thread((mount.path / "d/missing").exists)
        await in_thread(lambda: os.listxattr(mount.path / "d/f"))
        assert requests(mount) == before
        assert await in_thread((mount.path / "d/f").read_bytes) == data[:100_000]
        assert mount.stats.reads > 0
        before = requests(mount)
        for _ in range(3):
            assert await in_thread((mount.path / "d/f").read_bytes) == data[:100_000]
        assert requests(mount) == before


async def test_one_mount_of_files_and_no_loop_device(tmp_path: Path) -> None:
    before = loop_devices()
    index, data = image({b"f": file(b"1")})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        found = [entry for entry in mount_table() if tmp_path in entry.mountpoint.parents]
        assert [(entry.mountpoint, entry.fstype, entry.ours) for entry in found] == [
            (mount.path, "erofs", True)
        ]
        assert loop_devices() == before
        assert Path(found[0].source).parent == tmp_path / "cache/erofs"


async def test_a_failed_read_is_an_error_and_neither_zeros_nor_for_ever(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    index, data = image({b"f": file(content), b"unaligned": UNALIGNED})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        assert await in_thread(lambda: pread(mount.path / "f", PAGE, 0)) == content[:PAGE]
        mount.store.warm, mount.store.failure = False, Unavailable("registry.test: connection refused")
        for name, offset in (("f", 1 << 20), ("f", (2 << 20) - 10), ("unaligned", 100_001)):
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    await in_thread(lambda n=name, o=offset: pread(mount.path / n, 100, o))  # type: ignore[misc]
                assert caught.value.errno == errno.EIO
        assert mount.stats.failed_reads >= 3
        assert await in_thread(lambda: pread(mount.path / "f", PAGE, 0)) == content[:PAGE], "it was read before"
        mount.store.failure = None
        assert await in_thread((mount.path / "f").read_bytes) == content
        found = await in_thread((mount.path / "unaligned").read_bytes)
        assert found == b"\0" * 3 + b"A" * 7001 + bytes(92_997) + b"B" * 5000 + bytes(194_999)


async def test_a_mapped_page_that_cannot_be_read_kills_its_reader_and_comes_later(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    index, data = image({b"f": file(content)})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        mount.store.warm, mount.store.failure = False, Unavailable("registry.test: connection refused")
        program = "import mmap, sys; f = open(sys.argv[1]); print(mmap.mmap(f.fileno(), 0, prot=1)[700_000])"
        command = ["env", "python3", "-c", program, str(mount.path / "f")]
        done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
        assert done.returncode == -7, "SIGBUS"
        mount.store.failure = None
        done = await trio.run_process(command, capture_stdout=True)
        assert int(done.stdout) == content[700_000]


async def test_small_files_are_fetched_whole_and_large_ones_ahead(tmp_path: Path) -> None:
    index, data = image({b"small": file(b"s" * 300_000), b"large": file(os.urandom(32 << 20)), b"u": UNALIGNED})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        mount.store.warm = False
        await in_thread(lambda: pread(mount.path / "small", 10, 200_000))
        assert {window for _, _, window in mount.store.misses} == {(0, 300_000)}
        mount.store.misses.clear()
        large = index.data[node_at(index, b"large") or 0]
        at = large + (20 << 20)
        assert await in_thread(lambda: pread(mount.path / "large", PAGE, 20 << 20)) == data[at : at + PAGE]
        assert mount.store.misses[0][2] == (at, at + MIN_WINDOW)
        mount.store.misses.clear()
        unaligned = index.data[node_at(index, b"u") or 0]
        assert await in_thread(lambda: pread(mount.path / "u", 10, 100_001)) == b"B" * 10
        assert {window for _, _, window in mount.store.misses} == {(unaligned, unaligned + 12_001)}


async def test_a_file_read_in_order_takes_a_request_for_64_kib_or_more(tmp_path: Path) -> None:
    index, data = image({b"large": file(os.urandom(8 << 20))})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        assert await in_thread((mount.path / "large").read_bytes) == data
        assert mount.stats.read_bytes == len(data)
        assert mount.stats.reads <= len(data) // (64 << 10) + 1


async def test_many_cold_reads_wait_together(tmp_path: Path) -> None:
    """More than the kernel lets through by default, and nobody needs the answer of another one."""
    index, data = image({b"f%d" % number: file(b"x" * 5000) for number in range(40)})
    limit = trio.CapacityLimiter(40)

    async def read(path: Path) -> None:
        await trio.to_thread.run_sync(path.read_bytes, limiter=limit)

    async with serving(tmp_path, index, data, backend=BACKEND) as mount, trio.open_nursery() as nursery:
        mount.store.warm = False
        mount.store.blocked = trio.Event()
        for number in range(40):
            nursery.start_soon(read, mount.path / f"f{number}")
        try:
            with trio.fail_after(30):
                while len(mount.store.misses) < 40:
                    await mount.store.missed.wait()
        finally:
            mount.store.blocked.set()


async def test_a_killed_reader_takes_nobody_with_it(tmp_path: Path) -> None:
    """Two readers wait for one page; the first, whose read it is, is killed."""
    index, data = image({b"f": file(b"x" * 5000)})
    outcome: list[bytes] = []

    async def read(path: Path) -> None:
        outcome.append(await in_thread(path.read_bytes))

    async with serving(tmp_path, index, data, backend=BACKEND) as mount, trio.open_nursery() as nursery:
        mount.store.warm = False
        mount.store.blocked = trio.Event()
        victim = await trio.lowlevel.open_process(["env", "cat", str(mount.path / "f")])
        while not mount.store.misses:
            await mount.store.missed.wait()
        nursery.start_soon(read, mount.path / "f")
        victim.kill()
        mount.store.blocked.set()
        await victim.wait()
    assert outcome == [b"x" * 5000]


async def test_readers_without_rights(tmp_path: Path) -> None:
    """The devices are root's alone, what the mount shows is for everybody whom the image allows."""
    index, data = image({b"f": file(b"for all"), b"secret": file(b"not for all", 0o600)})
    async with serving(tmp_path, index, data, backend=BACKEND) as mount:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", "f", "secret"]
        done = await trio.run_process(
            command, cwd=mount.path, check=False, capture_stdout=True, capture_stderr=True
        )
        assert done.stdout == b"for all"
        assert b"Permission denied" in done.stderr


async def test_a_device_that_ends_within_a_block(tmp_path: Path) -> None:
    whole, data = image({b"a": file(os.urandom(5000)), b"b": file(b"b" * 700)})
    size = whole.data[node_at(whole, b"b") or 0] + 700
    index = replace(whole, devices=(device_of(data[:size]),))
    async with serving(tmp_path, index, data[:size], backend=BACKEND) as mount:
        for warm in (False, True):
            mount.store.warm = warm
            assert await in_thread((mount.path / "b").read_bytes) == b"b" * 700
        assert all(offset + length <= size for offset, length, _ in mount.store.misses)
        assert mount.stats.failed_reads == 0


@pytest.mark.parametrize("end", [700, 1024])
async def test_a_complete_device_is_read_to_its_end(tmp_path: Path, end: int) -> None:
    """By the kernel if it ends with a block; past the page cache if the disk has blocks as small."""
    whole, data = image({b"a": file(os.urandom(50_000)), b"b": file(b"b" * 700)})
    size = whole.data[node_at(whole, b"b") or 0] + end
    index = replace(whole, devices=(device_of(data[:size]),))
    (tmp_path / "mnt").mkdir()
    (tmp_path / "data").write_bytes(data[:size])
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    store = MemoryStore([data[:size]])
    subject = Subject("test", index.devices, lambda: index, device_of(data).key, store, [0])
    subject = replace(subject, freeze=lambda _: Freeze.take(tmp_path, fd))
    mounter = await open_mounter(BACKEND, subject, cache_dir=tmp_path / "cache", devices=tmp_path / "devices")
    async with mounted(mounter, tmp_path / "mnt"):
        assert list(mounter.direct) == ([0] if end == 1024 else [])
        assert await in_thread((tmp_path / "mnt/b").read_bytes) == b"b" * 700
        assert await in_thread((tmp_path / "mnt/a").read_bytes) == data[:50_000]
        (line,) = [line for line in mount_lines() if str(tmp_path / "mnt") in line]
        assert ("directio" in line) == (end == 1024 and takes_direct_io(tmp_path / "data"))
    assert not (tmp_path / "frozen").exists()
    os.close(fd)


async def test_three_hundred_devices(tmp_path: Path) -> None:
    layers = [tar([TarItem(b"own/%d" % n, content=b"%d" % n * 300), TarItem(b"same")]) for n in range(300)]
    index = index_of(layers)
    store = MemoryStore(layers)
    (tmp_path / "mnt").mkdir()
    mounter = await mounter_of(index, store, tmp_path, BACKEND)
    async with mounted(mounter, tmp_path / "mnt"):
        assert difference(facts_of(index, layers), await in_thread(lambda: scan(tmp_path / "mnt"))) == []
