"""The backend erofs-fanotify with the real store: mounting, tails, evictions, and when it cannot be had."""

import errno
import hashlib
import os
import select
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.daemon.layouts import BUSYBOX
from tests.erofs.images import index_of
from tests.mount.guarding import SPAN, guarding, guards, in_thread, run
from tests.mount.images import digest, directory, file, image
from tests.store.rig import RAW, Sample, ScriptedSource, sample_of
from veneer.errors import MountError, Unavailable, UnsupportedFormat
from veneer.index.model import ImageIndex
from veneer.mount import fanotify, kernel, resident, tail
from veneer.mount.backends import Subject, choose, choose_for_daemon
from veneer.mount.base import Choice
from veneer.mount.erofs_fanotify import mount_guarded, try_fanotify
from veneer.mount.filetable import FileTable
from veneer.mount.metadata import MetadataImage, metadata_image
from veneer.mount.resident import Existing, Guards, ResidentMounter
from veneer.mount.session import mounted
from veneer.mount.superblocks import Superblocks
from veneer.mount.tail import tail_file
from veneer.mount.upper import Upper, private_upper
from veneer.store.cache import DeviceCache
from veneer.store.maintenance import Cleared, clear
from veneer.store.owned import IdleRule
from veneer.store.spanstore import AttachedDevice, SpanStore
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root]

CONTENT = os.urandom(3 << 20)


@pytest.fixture
def on_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A directory in which no file can be marked."""
    path = tmp_path / "tmpfs"
    path.mkdir()
    assert os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", "none", os.fspath(path)) == 0
    yield path
    assert os.spawnlp(os.P_WAIT, "umount", "umount", os.fspath(path)) == 0


# Whether it works here


def test_a_trial_decides_and_leaves_nothing(tmp_path: Path) -> None:
    cache_dir, descriptors = tmp_path / "cache", len(os.listdir("/proc/self/fd"))
    assert choose_for_daemon("auto", cache_dir) == Choice("erofs-fanotify", "a trial mount worked")
    assert choose_for_daemon("erofs-fanotify", cache_dir) == Choice("erofs-fanotify", "asked for")
    assert choose_for_daemon("fuse", cache_dir) == Choice("fuse", "asked for")
    assert list(cache_dir.iterdir()) == []
    # Not more: somebody else's may have been closed meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_trial_in_the_group_that_is_to_be_used(tmp_path: Path) -> None:
    group = fanotify.open_group()
    try_fanotify(tmp_path, group)
    assert fanotify.read_events(group) == []
    assert "fanotify ino:" not in Path(f"/proc/self/fdinfo/{group}").read_text()
    os.close(group)


def test_where_files_cannot_be_watched(on_tmpfs: Path) -> None:
    choice = choose_for_daemon("auto", on_tmpfs)
    assert choice.backend == "auto"
    assert "erofs-fanotify failed: cannot watch files" in choice.reason
    assert "ext4, xfs or btrfs" in choice.reason
    with pytest.raises(MountError, match="cannot watch files") as caught:
        choose_for_daemon("erofs-fanotify", on_tmpfs)
    assert caught.value.hint is not None


@pytest.mark.parametrize(("number", "hint"), [(errno.EINVAL, "6.14"), (errno.EPERM, "CAP_SYS_ADMIN")])
def test_kernels_and_users_without_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fanotify, "open_group", refuse)
    with pytest.raises(MountError, match="no pre-content events") as caught:
        choose_for_daemon("erofs-fanotify", tmp_path / "unseen")
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_a_kernel_that_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanotify, "mark", lambda *_: None)
    with pytest.raises(MountError, match="does not ask"):
        choose_for_daemon("erofs-fanotify", tmp_path / "unseen")


def test_a_kernel_that_fails_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fanotify.answer
    monkeypatch.setattr(fanotify, "answer", lambda group, fd: answer(group, fd, errno.EIO))
    with pytest.raises(MountError, match="cannot read from EROFS: Input/output error"):
        choose_for_daemon("erofs-fanotify", tmp_path / "unseen")


def test_a_disk_that_takes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MountError, match="cannot be answered: No space left"):
        try_fanotify(tmp_path)


def test_a_read_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanotify, "read_events", lambda _: [])
    monkeypatch.setattr(select, "select", lambda *_: ([], [], []))
    with pytest.raises(MountError, match="did not end"):
        choose_for_daemon("erofs-fanotify", tmp_path / "unseen")


def test_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert choose_for_daemon("auto", tmp_path).backend == "fuse"
    with pytest.raises(MountError, match="needs root"):
        choose_for_daemon("erofs-fanotify", tmp_path)


def test_a_process_of_its_own_cannot_serve_it(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="daemon only"):
        choose("erofs-fanotify", tmp_path)


# The tail


@dataclass
class Reading:
    """A store of one device in memory."""

    data: bytes
    reads: int = 0
    failure: Unavailable | None = None

    async def read(self, _attached: int, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.reads += 1
        if self.failure:
            raise self.failure
        return self.data[offset : offset + length]


def unaligned(cache_dir: Path) -> tuple[MetadataImage, bytes]:
    """A metadata image with a tail, and the device that it copies from."""
    layer = tar([TarItem(b"odd", pieces=((3, b"x" * 10_000), (1 << 19, b"y" * 6000)), size=1 << 20)])
    return metadata_image(lambda: index_of([layer]), digest(layer), 1, cache_dir), layer


async def test_a_tail_is_what_its_copies_say_and_made_once(tmp_path: Path) -> None:
    metadata, layer = unaligned(tmp_path)
    store = Reading(layer)
    path = await tail_file(metadata, store, [0])
    assert path is not None
    expected = bytearray(metadata.devices[-1].size)
    for copy in metadata.copies:
        expected[copy.offset : copy.offset + copy.length] = layer[copy.source : copy.source + copy.length]
    assert path.read_bytes() == expected
    assert path.parent == metadata.path.parent
    reads = store.reads
    assert reads > 0
    assert await tail_file(metadata, store, [0]) == path
    assert store.reads == reads


@pytest.mark.parametrize("damage", ["byte", "hole", "gap", "short", "no note", "note", "nonsense"])
async def test_a_tail_that_was_changed_is_made_anew(tmp_path: Path, damage: str) -> None:
    metadata, layer = unaligned(tmp_path)
    path = await tail_file(metadata, Reading(layer), [0])
    assert path is not None
    good, note = path.read_bytes(), path.with_suffix(".tail.json")
    gap = max(range(0, len(good), 4096), key=lambda at: good[at : at + 4096].count(0))
    if damage in ("byte", "gap"):
        with path.open("r+b") as tail_:
            tail_.seek(metadata.copies[0].offset if damage == "byte" else gap)
            tail_.write(b"?")
    elif damage == "hole":
        path.write_bytes(bytes(len(good)))
    elif damage == "short":
        os.truncate(path, len(good) - 1)
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text('{"sha256": "%s"}' % ("0" * 64) if damage == "note" else "[")
    store = Reading(layer)
    assert await tail_file(metadata, store, [0]) == path
    assert store.reads > 0
    assert path.read_bytes() == good


async def test_a_tail_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    metadata, layer = unaligned(tmp_path)
    before = set(metadata.path.parent.iterdir())
    with pytest.raises(Unavailable):
        await tail_file(metadata, Reading(layer, failure=Unavailable("registry.test: refused")), [0])
    assert set(metadata.path.parent.iterdir()) == before


async def test_tails_of_images_that_are_gone_go_too(tmp_path: Path) -> None:
    metadata, layer = unaligned(tmp_path)
    first = await tail_file(metadata, Reading(layer), [0])
    other = replace(metadata, path=metadata.path.with_name("other.veneer-erofs"))
    metadata.path.rename(other.path)
    second = await tail_file(other, Reading(layer), [0])
    assert first is not None
    assert second is not None
    assert sorted(second.parent.glob("*.tail*")) == [second, second.with_suffix(".tail.json")]


async def test_too_much_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, layer = unaligned(tmp_path)
    monkeypatch.setattr(tail, "MOST_COPIED", 1000)
    with pytest.raises(UnsupportedFormat, match="too much to copy") as caught:
        await tail_file(metadata, Reading(layer), [0])
    assert caught.value.hint == "use --backend erofs-fuse"
    assert await tail_file(replace(metadata, copies=()), Reading(layer), [0]) is None


# Mounts


async def test_a_device_file_that_is_too_short_is_not_mounted(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        os.truncate(guarded.device.path, len(CONTENT) - 1)
        with pytest.raises(MountError, match="shorter"):
            await guarded.mount()


async def test_a_place_that_cannot_be_mounted_on(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        metadata = metadata_image(lambda: guarded.index, digest(b""), 1, tmp_path)
        with pytest.raises(MountError, match="No such file"):
            mount_guarded(metadata, [guarded.device.real], None, tmp_path / "missing", guarded.superblocks)


def loop_devices() -> set[Path]:
    """Those in use."""
    return set(Path("/sys/block").glob("loop*/loop"))


async def test_one_mount_and_no_loop_device(tmp_path: Path) -> None:
    before = loop_devices()
    async with guarding(tmp_path, *image({b"d": directory(), b"d/f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        assert await in_thread(lambda: os.listdir(path / "d")) == ["f"]
        assert guarded.devices.stats.events == 0, "names and attributes ask nobody"
        assert loop_devices() == before


async def test_lost_notices_of_unmounts(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(b"1")})) as guarded:
        superblocks = Superblocks()
        first, _ = await guarded.mount("first")
        second, _ = await guarded.mount("second")
        gone, there = superblocks.watch(first), superblocks.watch(second)
        assert superblocks.watch(first) is gone
        await run("umount", first)
        os.read(superblocks._inotify, 4096)  # the notice is lost
        superblocks._look()
        assert (gone.is_set(), there.is_set()) == (True, False)
        superblocks.close()


@dataclass
class Rig:
    """A real store with a clock that the test sets, and one image."""

    guards: Guards
    store: SpanStore
    cache: DeviceCache
    source: ScriptedSource
    attached: AttachedDevice
    index: ImageIndex
    directory: Path
    now_s: list[int] = field(default_factory=lambda: [1000])

    @asynccontextmanager
    async def mounted(self, name: str = "mnt", upper: Upper | None = None) -> AsyncIterator[Path]:
        path, lower = self.directory / name, self.directory / "lower" if upper else None
        for made in filter(None, (path, lower)):
            made.mkdir()
        subject = Subject(
            "test", self.index.devices, lambda: self.index, digest(b"test"), self.store, [self.attached]
        )
        files = FileTable(subject.index)
        mounter = ResidentMounter(
            self.guards,
            subject,
            self.store,
            files,
            cache_dir=self.directory / "cache",
            choice=Choice("erofs-fanotify", "asked for"),
        )
        async with mounted(mounter, path, lower=lower, upper=upper):
            yield path

    async def evict_everything(self) -> None:
        """What has been idle for long enough."""
        for _ in range(2):
            self.now_s[0] += 61
            await trio.to_thread.run_sync(self.cache.collect, 0)

    async def settled(self) -> None:
        """Wait until no device has to ask."""
        while self.guards.devices.stats.marked:
            await trio.testing.wait_all_tasks_blocked(0.001)


def layered(content: bytes) -> tuple[Sample, ImageIndex]:
    """An image of one file, its layer in spans of raw bytes."""
    index, data = image({b"f": file(content)})
    one = sample_of([data[at : at + SPAN] for at in range(0, len(data), SPAN)], codecs=[RAW])
    return one, replace(index, devices=(one.device,))


@asynccontextmanager
async def rig(tmp_path: Path, content: bytes = CONTENT) -> AsyncIterator[Rig]:
    one, index = layered(content)
    now_s = [1000]
    cache = DeviceCache(tmp_path / "cache", 1 << 30, rule=IdleRule(clock=lambda: now_s[0] * 10**9))
    async with guards() as shared, trio.open_nursery() as nursery:
        store = SpanStore(cache, nursery=nursery, read_deadline_s=10)
        source = ScriptedSource(one.blob)
        attached = store.attach(one.device, source)
        yield Rig(shared, store, cache, source, attached, index, tmp_path, now_s)
        nursery.cancel_scope.cancel()
    store.close()


async def test_a_device_that_is_read_whole_is_proven_and_asks_no_more(tmp_path: Path) -> None:
    async with rig(tmp_path) as one, one.mounted() as path:
        assert await in_thread((path / "f").read_bytes) == CONTENT
        await one.settled()
        assert one.attached.complete
        assert hashlib.sha256(CONTENT).digest() == one.attached.device.diff_id.raw
        before = one.guards.devices.stats.events
        await in_thread(lambda: _drop(path / "f"))
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert one.guards.devices.stats.events == before


@pytest.mark.parametrize("complete", [False, True])
async def test_what_is_evicted_while_mounted_is_fetched_again_when_it_is_read(
    tmp_path: Path, complete: bool
) -> None:
    async with rig(tmp_path) as one, one.mounted() as path:
        part = len(CONTENT) if complete else len(CONTENT) // 2
        assert await in_thread(lambda: _read(path / "f", part)) == CONTENT[:part]
        if complete:
            await one.settled()
        # What a miss brought along may be on its way still.
        while jobs := one.attached.queue.jobs:
            await next(iter(jobs.values())).done.wait()
        await one.evict_everything()
        assert one.attached.data_fd is not None
        assert os.fstat(one.attached.data_fd).st_blocks == 0
        assert one.guards.devices.stats.marked == 1
        one.source.requests.clear()
        await in_thread(lambda: _drop(path / "f"))
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert one.source.requests
        await one.settled()


async def test_a_mount_of_what_is_complete_asks_nothing_and_survives_its_eviction(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        async with one.mounted() as path:
            assert await in_thread((path / "f").read_bytes) == CONTENT
            await one.settled()
        async with one.mounted("again") as path:
            assert one.guards.devices.stats.marked == 0
            events = one.guards.devices.stats.events
            assert await in_thread((path / "f").read_bytes) == CONTENT
            assert one.guards.devices.stats.events == events
            await one.evict_everything()
            await in_thread(lambda: _drop(path / "f"))
            assert await in_thread((path / "f").read_bytes) == CONTENT
            assert one.guards.devices.stats.events > events


async def test_64_readers_of_a_cold_image_fetch_each_span_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as one, one.mounted() as path:
        limit = trio.CapacityLimiter(64)
        found: list[bytes] = []

        async def read() -> None:
            content = await trio.to_thread.run_sync(
                (path / "f").read_bytes, limiter=limit, abandon_on_cancel=True
            )
            found.append(content)

        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(read)
        assert found == [CONTENT] * 64
        assert sum(length for _, length in one.source.requests) == len(CONTENT)


async def test_a_writable_layer_over_it(tmp_path: Path) -> None:
    async with rig(tmp_path, BUSYBOX.read_bytes()) as one:
        upper = private_upper(tmp_path / "upper")
        async with one.mounted(upper=upper) as path:
            await in_thread(lambda: (path / "f").chmod(0o755))  # which copies it up
            assert await run("bash", "-c", "exec -a echo $0 it runs", path / "f") == b"it runs\n"
            await in_thread(lambda: (path / "f").rename(path / "renamed"))
            await in_thread(lambda: (path / "new").write_bytes(b"new"))
            assert sorted(await in_thread(lambda: os.listdir(path))) == ["new", "renamed"]
        assert one.guards.devices.stats.held == 0


async def test_a_source_that_fails_and_comes_back(tmp_path: Path) -> None:
    async with rig(tmp_path) as one, one.mounted() as path:

        async def refuse(*_: object) -> bytes:
            raise UnsupportedFormat("nobody can read this")

        one.source.fault = refuse
        with pytest.raises(OSError, match="Input/output"):
            await in_thread((path / "f").read_bytes)
        one.source.fault = None
        assert await in_thread((path / "f").read_bytes) == CONTENT


async def test_what_fails_after_mounting_is_unmounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would do it otherwise, and the devices would be held until somebody did."""

    def fail(*_: object) -> None:
        raise MountError("not now")

    monkeypatch.setattr(ResidentMounter, "_begin_start", fail)
    async with rig(tmp_path) as a_rig:
        with trio.fail_after(30), pytest.raises(MountError, match="not now"):
            async with a_rig.mounted():
                pytest.fail("mounted")
        assert not kernel.mounts_at(tmp_path / "mnt")
        assert a_rig.guards.devices.stats.held == 0


async def test_a_cache_that_is_cleared_before_the_mount_costs_the_image_and_not_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Cleared] = []

    def clear_once(*arguments: Any) -> Any:
        if not cleared:
            cleared.append(clear(tmp_path / "cache"))
        return mount_guarded(*arguments)

    monkeypatch.setattr(resident, "mount_guarded", clear_once)
    async with rig(tmp_path) as a_rig, a_rig.mounted() as path:
        assert cleared
        assert await in_thread((path / "f").read_bytes) == CONTENT


async def test_a_mount_that_cannot_be_taken_over_is_still_kept_from_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MountError("not now")

    async with rig(tmp_path) as a_rig, a_rig.mounted() as path:
        subject = Subject(
            "test", a_rig.index.devices, lambda: a_rig.index, digest(b"test"), a_rig.store, [a_rig.attached]
        )
        again = ResidentMounter(
            a_rig.guards,
            subject,
            a_rig.store,
            FileTable(subject.index),
            cache_dir=tmp_path / "cache",
            choice=Choice("erofs-fanotify", "asked for"),
            existing=Existing(()),
        )
        with monkeypatch.context() as patch:
            patch.setattr(ResidentMounter, "_begin_start", fail)
            with pytest.raises(MountError, match="not now"):
                async with again.shown(path, lambda: None):
                    pytest.fail("taken over")
        assert kernel.mounts_at(path)
        assert a_rig.guards.devices.stats.marked == 1
        assert await trio.to_thread.run_sync(_read, path / "f", len(CONTENT)) == CONTENT
        (kept,) = a_rig.guards.kept
        await kept.aclose()


def _read(path: Path, length: int) -> bytes:
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return opened.read(length)


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
