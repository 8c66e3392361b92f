"""Files of a layout: damaged ones, strange ones, and how they are written."""

import errno
import fcntl
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.contract.repository_suite import body, described, push, push_image, streamed
from tests.source.on_disk import REF_NAME, blob_file, edit_index, files
from veneer.errors import IntegrityError, RegistryError, Unavailable
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER, OCI_MANIFEST
from veneer.source import layout_file
from veneer.source.layout import FileBlob, OCILayout

# Damaged and strange files.


async def test_damaged_manifest(layout: OCILayout, path: Path) -> None:
    image, data = await push_image(layout, "v1")
    blob_file(path, image.digest).write_bytes(data.replace(b"2", b"3", 1))
    for reference in ("v1", str(image.digest), ""):
        with pytest.raises(IntegrityError, match="expected sha256:"):
            await layout.manifest(reference)
    with pytest.raises(IntegrityError):
        await layout.referrers(Digest.of(b"x"))
    await layout.push_manifest(data, OCI_MANIFEST)
    assert (await layout.manifest("v1")).data == data


async def test_index_with_a_false_size(layout: OCILayout, path: Path) -> None:
    image, _ = await push_image(layout)
    false = Descriptor(image.media_type, image.digest, image.size + 1, {REF_NAME: "v1"})
    edit_index(path, false.to_json())
    with pytest.raises(IntegrityError, match=r"index\.json says"):
        await layout.manifest("v1")


async def test_short_and_long_files_give_nothing(layout: OCILayout, path: Path) -> None:
    blob = await push(layout, b"0123456789")
    file = blob_file(path, blob.digest)
    for content in (b"012345678", b"0123456789+", b""):
        file.write_bytes(content)
        assert not await layout.has_blob(blob)
        with pytest.raises(IntegrityError, match="its descriptor says 10"):
            await layout.blob(blob).read(0, 5)
        with pytest.raises(IntegrityError):
            await streamed(layout.blob(blob))
    await push(layout, b"0123456789")
    assert await layout.blob(blob).read(0, 10) == b"0123456789"


async def test_file_that_shrinks_while_it_is_streamed(layout: OCILayout, path: Path) -> None:
    blob = await push(layout, bytes(3 * layout_file.CHUNK))
    async with layout.blob(blob).stream() as chunks:
        await anext(chunks)
        os.truncate(blob_file(path, blob.digest), layout_file.CHUNK + 5)
        with pytest.raises(IntegrityError, match="ends at"):
            await anext(chunks)


async def test_blobs_that_are_symbolic_links_are_read(layout: OCILayout, path: Path, tmp_path: Path) -> None:
    await push(layout, b"x")
    data = os.urandom(5000)
    (tmp_path / "pool").write_bytes(data)
    blob = described(data)
    blob_file(path, blob.digest).symlink_to(tmp_path / "pool")
    assert await layout.has_blob(blob)
    assert await layout.blob(blob).read(100, 200) == data[100:300]


async def test_files_that_are_no_files(layout: OCILayout, path: Path) -> None:
    """A FIFO must not block its reader, nor a device be read."""
    await push(layout, b"x")
    fifo, device, directory = (described(name) for name in (b"fifo", b"device", b"directory"))
    os.mkfifo(blob_file(path, fifo.digest))
    blob_file(path, device.digest).symlink_to("/dev/zero")
    blob_file(path, directory.digest).mkdir()
    for blob in (fifo, device, directory):
        assert not await layout.has_blob(blob)
        with pytest.raises(IntegrityError, match="not a regular file"):
            await layout.blob(blob).read(0, 1)
        with pytest.raises(IntegrityError, match="not a regular file"):
            await layout.manifest(str(blob.digest))


async def test_other_algorithms(layout: OCILayout, path: Path) -> None:
    data = b"long digest"
    blob = Descriptor(OCI_LAYER, Digest.of(data, "sha512"), len(data))
    await layout.push_blob(blob, body(data))
    assert await streamed(layout.blob(blob)) == data
    assert (path / "blobs" / "sha512").is_dir()


async def test_file_blob_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    blob = FileBlob(tmp_path / "file", "a file", 10)
    assert (await blob.read(2, 3), blob.name, blob.size) == (b"234", "a file", 10)


# Pushing.


async def test_failed_pushes_leave_nothing(layout: OCILayout, path: Path) -> None:
    await push(layout, b"x")
    before = files(path)

    class Stopping(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > layout_file.CHUNK:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    promised = described(bytes(5 * layout_file.CHUNK))
    with pytest.raises(RegistryError, match="was not stored: Input/output error"):
        await layout.push_blob(promised, lambda: Stopping(bytes(5 * layout_file.CHUNK)))
    for actual in (b"short", bytes(5 * layout_file.CHUNK - 1) + b"\1", bytes(5 * layout_file.CHUNK + 1)):
        with pytest.raises(IntegrityError, match="was not stored"):
            await layout.push_blob(promised, body(actual))
    assert files(path) == before


async def test_a_body_that_never_ends_is_stopped_at_the_promised_size(layout: OCILayout) -> None:
    class Endless(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.given += size or 0
            return bytes(size or 0)

    endless = Endless()
    with pytest.raises(IntegrityError, match="more bytes"):
        await layout.push_blob(described(b"0123456789"), lambda: endless)
    assert endless.given == layout_file.CHUNK
    assert endless.closed


async def test_cancelled_push_leaves_nothing(layout: OCILayout, path: Path) -> None:
    await push(layout, b"x")
    before = files(path)
    data = os.urandom(20 * layout_file.CHUNK)
    with trio.CancelScope() as scope:
        await layout.push_blob(described(data), body(data), lambda _event: scope.cancel())
    assert scope.cancelled_caught
    assert files(path) == before


async def test_what_a_killed_writer_left_is_removed(layout: OCILayout, path: Path) -> None:
    await push(layout, b"x")
    stale, busy = path / ".veneer-staged-stale", path / ".veneer-staged-busy"
    stale.write_bytes(b"half a bl")
    busy.write_bytes(b"half a bl")
    (path / ".veneer-staged-link").symlink_to("/nowhere")
    with busy.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        await push(OCILayout(path), b"y")
    assert not stale.exists()
    assert busy.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.root
async def test_full_disk(small_disk: Path) -> None:
    layout = OCILayout(small_disk / "layout", create=True)
    image, _ = await push_image(layout, "v1")
    before = files(small_disk)
    with pytest.raises(RegistryError, match="No space left") as caught:
        await push(layout, os.urandom(2 << 20))
    assert caught.value.hint == "free some space there"
    assert files(small_disk) == before
    assert await layout.resolve("v1") == image


async def test_index_is_locked_while_it_changes(
    layout: OCILayout, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = await push_image(layout, "v1")
    monkeypatch.setattr(layout_file, "_LOCK_DEADLINE_S", 0)
    with (path / ".veneer-lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="locked by another process"):
            await push_image(layout, "v2")
        assert await layout.resolve("v1") == image
    await push_image(layout, "v2")
    assert await layout.tags() == ["v1", "v2"]


async def test_waiting_for_the_lock_can_be_cancelled(layout: OCILayout, path: Path) -> None:
    await push_image(layout, "v1")
    with (path / ".veneer-lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with trio.move_on_after(0.05) as scope:
            await push_image(layout, "v2")
    assert scope.cancelled_caught
    assert await layout.tags() == ["v1"]


PUSHER = """
import sys, trio
from pathlib import Path
from tests.contract.repository_suite import push_image
from veneer.source.layout import OCILayout

async def main():
    layout = OCILayout(Path(sys.argv[1]), create=True)
    for number in range(10):
        await push_image(layout, f"{sys.argv[2]}-{number}", sys.argv[2].encode() + b"%d" % number)

trio.run(main)
"""


async def test_processes_push_into_one_layout_at_once(layout: OCILayout, path: Path) -> None:
    """None of them loses another's tag, and any of them may find the layout missing."""
    root = Path(__file__).parents[2]
    async with trio.open_nursery() as nursery:
        for name in "abc":
            command = [sys.executable, "-c", PUSHER, str(path), name]
            nursery.start_soon(partial(trio.run_process, command, cwd=root))
    assert await layout.tags() == sorted(f"{name}-{number}" for name in "abc" for number in range(10))
    for tag in await layout.tags():
        await layout.manifest(tag)


# Taking blobs from other layouts.


async def test_blobs_are_taken_by_hard_link(layout: OCILayout, path: Path, tmp_path: Path) -> None:
    other = OCILayout(tmp_path / "other", create=True)
    plain = await push(other, b"plain")
    linked = described(b"linked")
    (tmp_path / "pool").write_bytes(b"linked")
    blob_file(tmp_path / "other", linked.digest).symlink_to(tmp_path / "pool")
    assert await layout.mount_blob(plain, other)
    assert await layout.mount_blob(linked, other)
    assert blob_file(path, plain.digest).samefile(blob_file(tmp_path / "other", plain.digest))
    assert not blob_file(path, linked.digest).is_symlink()
    assert blob_file(path, linked.digest).samefile(tmp_path / "pool")


async def test_blobs_are_copied_and_checked_where_links_cannot_be_made(
    layout: OCILayout, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    other = OCILayout(tmp_path / "other", create=True)
    good, bad = await push(other, b"good"), await push(other, b"bad")
    assert await layout.mount_blob(good, other)
    assert await streamed(layout.blob(good)) == b"good"
    blob_file(tmp_path / "other", bad.digest).write_bytes(b"BAD")
    with pytest.raises(IntegrityError):
        await layout.mount_blob(bad, other)
    assert not await layout.has_blob(bad)


async def test_a_damaged_file_in_the_way_is_replaced(layout: OCILayout, path: Path, tmp_path: Path) -> None:
    other = OCILayout(tmp_path / "other", create=True)
    blob = await push(other, b"0123456789")
    await push(layout, b"x")
    blob_file(path, blob.digest).write_bytes(b"01234")
    assert await layout.mount_blob(blob, other)
    assert await streamed(layout.blob(blob)) == b"0123456789"
