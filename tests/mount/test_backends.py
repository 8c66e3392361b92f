"""Which backend is used, and why; and what it keeps between mounts."""

import errno
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.erofs.images import index_of
from tests.mount.images import MemoryStore, digest, directory, file, image
from tests.mount.serving import in_thread
from veneer.erofs.writer import write_erofs
from veneer.errors import IntegrityError, MountError, UnsupportedFormat
from veneer.events import Event, Notice
from veneer.index.model import ImageIndex
from veneer.mount import metadata
from veneer.mount.backends import Subject, choose, open_mounter
from veneer.mount.metadata import MetadataImage, metadata_image, mount_kept
from veneer.mount.session import mounted
from veneer.mount.upper import private_upper
from veneer.store.maintenance import clear
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root, pytest.mark.fuse]

IDENTITY = digest(b"an index")


@pytest.fixture
def on_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A directory from which EROFS takes no images."""
    path = tmp_path / "tmpfs"
    path.mkdir()
    assert os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", "none", os.fspath(path)) == 0
    yield path
    assert os.spawnlp(os.P_WAIT, "umount", "umount", os.fspath(path)) == 0


def test_a_trial_decides_and_leaves_nothing(tmp_path: Path) -> None:
    assert choose("auto", tmp_path / "cache").backend == "erofs-fuse"
    assert choose("auto", tmp_path / "cache").reason == "a trial mount worked"
    assert choose("erofs-fuse", tmp_path / "cache").reason == "asked for"
    assert choose("fuse", tmp_path / "cache").backend == "fuse"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_trial_that_failed(on_tmpfs: Path) -> None:
    choice = choose("auto", on_tmpfs)
    assert choice.backend == "fuse"
    assert choice.reason.startswith("a trial mount of erofs-fuse failed: cannot mount EROFS")
    with pytest.raises(MountError, match="cannot mount EROFS") as caught:
        choose("erofs-fuse", on_tmpfs)
    assert caught.value.hint is not None
    assert "ext4" in caught.value.hint


def test_a_trial_that_reads_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: bytes(512))
    with pytest.raises(MountError, match="other bytes"):
        choose("erofs-fuse", tmp_path / "unseen")


def test_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert choose("auto", tmp_path).backend == "fuse"
    with pytest.raises(MountError, match="needs root"):
        choose("erofs-fuse", tmp_path)


async def test_a_slower_backend_is_told(on_tmpfs: Path) -> None:
    index, data = image({b"f": file(b"content")})
    subject = Subject("test", index.devices, lambda: index, IDENTITY, MemoryStore([data]), [0])
    events: list[Event] = []
    mountpoint = on_tmpfs / "mnt"
    mountpoint.mkdir()
    mounter = await open_mounter(
        "auto", subject, cache_dir=on_tmpfs, devices=on_tmpfs / "devices", report=events.append
    )
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "using the slower backend fuse: a trial mount of erofs-fuse failed" in notice.message
    async with mounted(mounter, mountpoint):
        assert await in_thread((mountpoint / "f").read_bytes) == b"content"


async def test_an_image_that_erofs_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedFormat("too many devices")

    monkeypatch.setattr(metadata, "write_erofs", refuse)
    index, data = image({b"f": file(b"content")})
    subject = Subject("test", index.devices, lambda: index, IDENTITY, MemoryStore([data]), [0])
    devices = tmp_path / "devices"
    with pytest.raises(UnsupportedFormat):
        await open_mounter("erofs-fuse", subject, cache_dir=tmp_path, devices=devices)
    mounter = await open_mounter("auto", subject, cache_dir=tmp_path, devices=devices)
    assert mounter.choice.backend == "fuse"
    assert "too many devices" in mounter.choice.reason


def test_a_metadata_image_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One file that needs a tail, and so copies.
    index = index_of([tar([TarItem(b"odd", pieces=((3, b"x" * 10_000),), size=1 << 20), TarItem(b"f")])])
    first = metadata_image(lambda: index, IDENTITY, 1, tmp_path)
    written = write_erofs(index)
    assert first.path.read_bytes() == written.data
    assert (first.devices, first.copies) == (written.devices, written.copies)
    assert len(first.copies) > 0

    other = metadata_image(lambda: index, digest(b"another index"), 1, tmp_path)
    assert other.path != first.path
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write_erofs", lambda _: pytest.fail("written again"))
        assert metadata_image(lambda: index, IDENTITY, 1, tmp_path) == first
    monkeypatch.setattr(metadata, "WRITER_VERSION", 1_000_000)
    assert metadata_image(lambda: index, IDENTITY, 1, tmp_path).path != first.path


def test_what_is_kept_stands_for_the_tree(tmp_path: Path) -> None:
    index, _ = image({b"f": file(b"content"), b"g": b"f"})
    first = metadata_image(lambda: index, IDENTITY, 1, tmp_path)
    assert first.inodes == write_erofs(index).inodes == 2
    assert metadata_image(lambda: pytest.fail("decoded"), IDENTITY, 1, tmp_path) == first
    asked = []

    def tree() -> ImageIndex:
        asked.append(index)
        return index

    metadata_image(tree, IDENTITY, 2, tmp_path)
    assert asked, "what was kept is of another number of devices"


@pytest.mark.parametrize("at", [0, 1024 + 4, 1024 + 0x30, 1024 + 0x3F, 1024 + 128, 1536, -1])
def test_a_kept_image_in_which_one_bit_has_changed_is_written_anew(tmp_path: Path, at: int) -> None:
    """Wherever that is: in the checksum, in the UUID, in the name of a device, in an inode, at either end."""
    index, _ = image({b"f": file(b"content"), b"d": directory()} | {b"%03d" % n: file(b"") for n in range(40)})
    path = metadata_image(lambda: index, IDENTITY, 1, tmp_path).path
    good = path.read_bytes()
    bad = bytearray(good)
    bad[at] ^= 1
    path.write_bytes(bad)
    metadata_image(lambda: index, IDENTITY, 1, tmp_path)
    assert path.read_bytes() == good
    path.write_bytes(good[:1024])
    metadata_image(lambda: index, IDENTITY, 1, tmp_path)
    assert path.read_bytes() == good


async def test_a_mount_from_a_kept_image_needs_the_tree_for_the_first_miss(tmp_path: Path) -> None:
    index, data = image({b"f": file(b"content"), b"g": file(b"more")}, root=directory(0o711, uid=3))
    asked = []

    def tree() -> ImageIndex:
        asked.append(index)
        return index

    store = MemoryStore([data])
    metadata_image(tree, IDENTITY, 1, tmp_path)
    del asked[:]
    mounter = await open_mounter(
        "erofs-fuse",
        Subject("test", index.devices, tree, IDENTITY, store, [0]),
        cache_dir=tmp_path,
        devices=tmp_path / "devices",
    )
    mountpoint, lower = tmp_path / "mnt", tmp_path / "lower"
    mountpoint.mkdir()
    lower.mkdir()
    async with mounted(mounter, mountpoint, lower=lower, upper=private_upper(tmp_path / "upper")):
        assert await in_thread(lambda: sorted(os.listdir(mountpoint))) == ["f", "g"]
        assert (await in_thread(mountpoint.stat)).st_uid == 3
        assert await in_thread((mountpoint / "f").read_bytes) == b"content", "it is in the store"
        assert not asked
        store.warm = False
        assert await in_thread((mountpoint / "g").read_bytes) == b"more"
        assert len(asked) == 1
    assert mounter.inodes == 3


async def test_a_cache_that_is_cleared_before_the_mount_costs_the_image_and_not_the_mount(
    tmp_path: Path,
) -> None:
    index, data = image({b"f": file(b"content")})
    subject = Subject("test", index.devices, lambda: index, IDENTITY, MemoryStore([data]), [0])
    cache = tmp_path / "cache"
    mounter = await open_mounter("erofs-fuse", subject, cache_dir=cache, devices=tmp_path / "devices")
    (tmp_path / "mnt").mkdir()
    clear(cache)
    assert not list(cache.glob("*/*.erofs"))
    async with mounted(mounter, tmp_path / "mnt"):
        assert await in_thread((tmp_path / "mnt/f").read_bytes) == b"content"


def test_an_image_that_is_deleted_each_time_fails_the_mount(tmp_path: Path) -> None:
    index, _ = image({b"f": file(b"content")})
    image_of = partial(metadata_image, lambda: index, IDENTITY, 1, tmp_path)
    attempts = []

    def mount(written: MetadataImage) -> None:
        written.path.unlink()
        attempts.append(written)
        raise MountError("no such file")

    with pytest.raises(MountError, match="no such file"):
        mount_kept(image_of(), image_of, mount)
    assert 1 < len(attempts) < 10


async def test_a_tree_that_cannot_be_decoded_fails_the_first_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index, data = image({b"f": file(b"content"), b"g": file(b"more")})
    metadata_image(lambda: index, IDENTITY, 1, tmp_path)

    def tree() -> ImageIndex:
        raise IntegrityError("index of test: tree section: nonsense")

    store = MemoryStore([data])
    subject = Subject("test", index.devices, tree, IDENTITY, store, [0])
    mounter = await open_mounter("erofs-fuse", subject, cache_dir=tmp_path, devices=tmp_path / "devices")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    async with mounted(mounter, mountpoint):
        assert await in_thread((mountpoint / "f").read_bytes) == b"content", "it is in the store"
        store.warm = False
        with pytest.raises(OSError) as caught:
            await in_thread((mountpoint / "g").read_bytes)
        assert caught.value.errno == errno.EIO
    assert "tree section: nonsense" in caplog.text
    assert mounter.stats.to_json()["failed_reads"] > 0
    assert not store.misses
    with pytest.raises(IntegrityError):
        await open_mounter("fuse", subject, cache_dir=tmp_path, devices=tmp_path / "devices")


@pytest.mark.parametrize(
    "damage", ["image", "short", "facts", "nonsense", "half", "older", "no facts", "no image"]
)
def test_the_kernel_sees_nothing_that_was_changed(tmp_path: Path, damage: str) -> None:
    index, _ = image({b"f": file(b"content")})
    first = metadata_image(lambda: index, IDENTITY, 1, tmp_path)
    good, facts = first.path.read_bytes(), first.path.with_suffix(".json")
    if damage == "image":
        first.path.write_bytes(good[:-1] + b"\x01")
    elif damage == "short":
        first.path.write_bytes(good[:1024])
    elif damage == "facts":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"sha256": "0" * 64}))
    elif damage == "nonsense":
        facts.write_text("[1]")
    elif damage == "half":
        facts.write_text(facts.read_text()[:50])
    elif damage == "older":
        known = json.loads(facts.read_text())
        del known["inodes"]
        facts.write_text(json.dumps(known))
    elif damage == "no facts":
        facts.unlink()
    else:
        first.path.unlink()
    assert metadata_image(lambda: index, IDENTITY, 1, tmp_path) == first
    assert first.path.read_bytes() == good


def test_the_least_recently_used_images_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = image({b"f": file(b"content")})
    size = len(write_erofs(index).data)
    monkeypatch.setattr(metadata, "KEPT", 2 * size)
    made = []
    for number in range(2):
        made.append(metadata_image(lambda: index, digest(b"%d" % number), 1, tmp_path).path)
        os.utime(made[-1], (number, number))
    assert metadata_image(lambda: index, digest(b"0"), 1, tmp_path).path == made[0], (
        "used again, so the other one is older"
    )
    made.append(metadata_image(lambda: index, digest(b"2"), 1, tmp_path).path)
    assert [path.exists() for path in made] == [True, False, True]
    assert len(list((tmp_path / "erofs").iterdir())) == 4


async def test_an_image_may_be_deleted_while_it_is_mounted(tmp_path: Path) -> None:
    index, data = image({b"d%d" % number: file(b"%d" % number) for number in range(1000)})
    store = MemoryStore([data])
    subject = Subject("test", index.devices, lambda: index, IDENTITY, store, [0])
    mounter = await open_mounter("erofs-fuse", subject, cache_dir=tmp_path, devices=tmp_path / "devices")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    async with mounted(mounter, mountpoint):
        for path in (tmp_path / "erofs").iterdir():
            path.unlink()
        assert len(await in_thread(lambda: os.listdir(mountpoint))) == 1000
        assert await trio.to_thread.run_sync((mountpoint / "d7").read_bytes) == b"7"
