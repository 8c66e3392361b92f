"""Work directories: what is whole is reused, what is not is made again, what is pushed goes."""

import fcntl
import os
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from veneer.convert.frames import Frame, LayerReader, SpanRecorder, compress
from veneer.convert.work import ABANDONED_AFTER_S, Job, StoredLayer, WorkDirectory
from veneer.errors import CacheError
from veneer.index.wire import encode_spans, encode_tree
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_ZSTD
from veneer.testing.tars import TarItem, tar

TAR = tar([TarItem(b"a", content=b"a" * 200_000), TarItem(b"d", "dir")])


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    return WorkDirectory(tmp_path / "convert")


def do(job: Job) -> StoredLayer:
    """Convert TAR without a pipeline."""
    reader, spans = LayerReader(Digest.of(TAR), "drop", "layer x"), SpanRecorder()
    with job.create() as blob:
        for batch in reader.batches(iter([TAR])):
            for frame in compress(batch):
                assert isinstance(frame, Frame)
                spans.add(frame, blob.append(frame.stored))
        descriptor = blob.descriptor()
        tree, _ = reader.finish()
        return job.commit(descriptor, encode_spans(descriptor, Digest.of(TAR), spans.table()), tree, {"x": 2})


async def made(work: WorkDirectory) -> StoredLayer:
    """A finished job that nobody holds."""
    job = work.job("k", OCI_LAYER_ZSTD)
    assert await job.claim() is None
    stored = do(job)
    job.release()
    return stored


async def test_a_finished_job_is_found_again(work: WorkDirectory) -> None:
    stored = await made(work)
    job = work.job("k", OCI_LAYER_ZSTD)
    again = await job.claim()
    assert again is not None
    assert again.reused
    assert (again.blob, again.dropped, again.path) == (stored.blob, {"x": 2}, stored.path)
    assert again.index.device.key == stored.index.device.key
    assert encode_tree(again.index.tree) == encode_tree(stored.index.tree)
    job.release()


@pytest.mark.parametrize("name", ["blob", "spans", "tree", "record.json"])
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
async def test_whatever_is_damaged_is_made_again(work: WorkDirectory, name: str, how: str) -> None:
    stored = await made(work)
    path = stored.path.with_name(name)
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "short" else data[:5] + bytes([data[5] ^ 4]) + data[6:])
    job = work.job("k", OCI_LAYER_ZSTD)
    assert await job.claim() is None
    assert do(job).blob == stored.blob
    job.release()


async def test_a_job_without_a_record_is_not_done(work: WorkDirectory) -> None:
    stored = await made(work)
    job = work.job("k", OCI_LAYER_ZSTD)
    assert await job.claim() is not None
    job.release()
    other = work.job("k", OCI_LAYER_ZSTD)
    assert other.lock(fcntl.LOCK_EX)
    with other.create():
        pass
    other.release()  # as after kill -9: the blob is being written, the record is not there
    assert stored.path.stat().st_size == 0
    assert await job.claim() is None
    job.release()


async def test_two_conversions_do_a_job_once(
    work: WorkDirectory, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = work.job("k", OCI_LAYER_ZSTD), work.job("k", OCI_LAYER_ZSTD)
    assert await first.claim() is None
    found: list[StoredLayer | None] = []

    async def wait() -> None:
        found.append(await second.claim())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not found
        stored = do(first)
    assert found[0] is not None
    assert found[0].reused
    # The first is pushed; the second still reads, and deletes when it has been pushed too.
    first.release(pushed=True)
    assert stored.path.exists()
    second.release(pushed=True)
    assert not stored.path.parent.exists()


async def test_a_job_that_failed_is_kept_and_a_deleted_one_can_be_made_anew(work: WorkDirectory) -> None:
    stored = await made(work)
    assert stored.path.exists()
    holder, waiter = work.job("k", OCI_LAYER_ZSTD), work.job("k", OCI_LAYER_ZSTD)
    assert await holder.claim() is not None
    assert not waiter.lock(fcntl.LOCK_EX)
    holder.release(pushed=True)
    maker = work.job("k", OCI_LAYER_ZSTD)
    assert await maker.claim() is None
    # The waiter still has the lock file that was deleted; a lock on that one is worth nothing.
    assert not waiter.lock(fcntl.LOCK_EX)
    waiter.release()
    maker.release()


async def test_old_work_is_swept_unless_it_is_in_use(work: WorkDirectory) -> None:
    stored = await made(work)
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    work.sweep()
    assert stored.path.exists()
    job = work.job("k", OCI_LAYER_ZSTD)
    assert await job.claim() is not None
    os.utime(stored.path.parent, (long_ago, long_ago))
    work.sweep()
    assert stored.path.exists()
    job.release()
    os.utime(stored.path.parent, (long_ago, long_ago))
    work.sweep()
    assert not stored.path.parent.exists()


async def test_a_place_that_cannot_be_written_is_a_cache_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "convert").write_text("a file")
    with pytest.raises(CacheError) as caught:
        await WorkDirectory(tmp_path / "convert").job("k", OCI_LAYER_ZSTD).claim()
    assert "--cache-dir" in (caught.value.hint or "")
