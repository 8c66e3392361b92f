"""Changes of a device that end half-way, or meet another: what is left vouches for what is there alone."""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.store.rig import KIB, RAW, Sample, sample
from veneer.errors import CacheError
from veneer.store import devicefile, extents, presence
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.owned import IdleRule
from veneer.store.presence import EMPTY, PRESENT, SUSPECT, Form, Layout, PresenceMap

SPAN = 8 * KIB


class KilledError(BaseException):
    """In place of the death of the process."""


@pytest.fixture
def one() -> Sample:
    return sample([SPAN] * 6, codecs=(RAW,))


def opened(directory: Path, one: Sample) -> DeviceFile:
    return DeviceFile.open(directory / one.device.key.hex, Layout.of(one.device, Form.PLAIN))


def fills(one: Sample, *numbers: int) -> list[Fill]:
    pieces = [(n, one.plain[n * SPAN : (n + 1) * SPAN]) for n in numbers]
    return [Fill(n, piece, hashlib.sha256(piece).digest()) for n, piece in pieces]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail


def pwritev_that(end: Callable[[int, int], int]) -> Callable[[int, Sequence[bytes], int], int]:
    """One that writes the first 5 KiB, and then ends so."""

    def pwritev(fd: int, buffers: Sequence[bytes], offset: int) -> int:
        return end(os.pwrite(fd, b"".join(buffers)[: 5 * KIB], offset), fd)

    return pwritev


def no_space(_written: int, fd: int) -> int:
    # Only what has a place on the disk can be given back.
    os.fsync(fd)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_the_kernel_wrote_half_is_written_to_the_end(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    monkeypatch.setattr(os, "pwritev", pwritev_that(lambda written, _fd: written))
    file.write(fills(one, 1, 2, 3))
    assert file.read(SPAN, 3 * SPAN) == one.plain[SPAN : 4 * SPAN]
    file.close()


def test_what_a_full_disk_took_is_given_back_and_what_was_there_stays(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, 1))
    before = os.fstat(file.fd).st_blocks
    monkeypatch.setattr(os, "pwritev", pwritev_that(no_space))
    with pytest.raises(OSError, match="No space"):
        file.write(fills(one, 1, 2, 3))
    os.fsync(file.fd)
    assert os.fstat(file.fd).st_blocks == before
    assert file.read_span(1) == one.plain[SPAN : 2 * SPAN]
    file.close()


def test_bytes_are_not_written_beyond_their_place(tmp_path: Path, one: Sample) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, 2))
    with pytest.raises(ValueError, match="which have others"):
        file.write([Fill(1, bytes(2 * SPAN), bytes(32))])
    assert file.read_span(1) is None
    assert os.pread(file.fd, SPAN, 2 * SPAN) == one.plain[2 * SPAN : 3 * SPAN]
    file.close()


def test_more_spans_than_one_system_call_takes_are_written(tmp_path: Path) -> None:
    one = sample([16] * 3000, codecs=(RAW,))
    file = opened(tmp_path, one)
    pieces = [one.plain[16 * n : 16 * n + 16] for n in range(3000)]
    file.write([Fill(n, piece, hashlib.sha256(piece).digest()) for n, piece in enumerate(pieces)])
    assert file.read(0, len(one.plain)) == one.plain
    file.close()


def test_a_span_is_noted_only_when_its_bytes_are_there(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    monkeypatch.setattr(os, "pwritev", raising(KilledError()))
    with pytest.raises(KilledError):
        file.write(fills(one, 0))
    assert file.read_span(0) is None
    file.close()


def test_dying_before_the_mark_overstates_what_is_there_until_it_is_opened_again(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, 0))
    monkeypatch.setattr(PresenceMap, "_write_records", raising(KilledError()))
    with pytest.raises(KilledError):
        file.write(fills(one, 1))
    assert file.map.present_bytes == 2 * SPAN
    file.close()
    monkeypatch.undo()
    again = opened(tmp_path, one)
    assert again.map.present_bytes == SPAN
    again.close()


def test_dying_in_the_first_opening_after_a_boot_leaves_nothing_trusted(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, 0, 3))
    file.close()
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    with monkeypatch.context() as patch:
        patch.setattr(PresenceMap, "_write_records", raising(KilledError()))
        with pytest.raises(KilledError):
            opened(tmp_path, one)
    again = opened(tmp_path, one)
    assert list(again.states) == [SUSPECT, EMPTY, EMPTY, SUSPECT, EMPTY, EMPTY]
    again.close()


def test_dying_while_spans_are_taken_away_takes_completeness_first(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, *range(6)))
    assert file.confirm(file.map.generation[0], bytes(file.states))
    write, generation = presence._pwrite_all, file.map.generation[0]

    def write_no_record(fd: int, data: bytes, offset: int) -> None:
        if len(data) == 40:
            raise KilledError
        write(fd, data, offset)

    monkeypatch.setattr(presence, "_pwrite_all", write_no_record)
    with pytest.raises(KilledError):
        file.evict([2])
    assert file.map.generation[0] == generation
    assert not file.map.complete
    assert file.read(0, len(one.plain)) == one.plain, "nothing was punched"
    monkeypatch.undo()
    file.close()


def test_a_read_that_begins_while_a_span_is_taken_away_never_returns_the_hole(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = opened(tmp_path, one), opened(tmp_path, one)
    file.write(fills(one, *range(6)))
    found: list[bytes | None] = []
    looked, gone = threading.Event(), threading.Event()
    pread, write = os.pread, presence._pwrite_all

    def pread_when_it_is_gone(fd: int, length: int, offset: int) -> bytes:
        looked.set()
        assert gone.wait(30)
        return pread(fd, length, offset)

    reader = threading.Thread(target=lambda: found.append(file.read_span(2)))

    def write_when_somebody_reads(fd: int, data: bytes, offset: int) -> None:
        if len(data) == 40 and not reader.ident:
            reader.start()
            assert looked.wait(30)
        write(fd, data, offset)

    monkeypatch.setattr(os, "pread", pread_when_it_is_gone)
    monkeypatch.setattr(presence, "_pwrite_all", write_when_somebody_reads)
    assert other.evict([2]).spans == 1
    gone.set()
    reader.join()
    assert found == [None]
    monkeypatch.undo()
    file.close()
    other.close()


def test_a_data_file_with_the_number_of_an_earlier_one_does_not_revive_its_map(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, *range(6)))
    file.close()
    data, spare = file.directory / "data", file.directory / "spare"
    os.link(data, spare)
    data.unlink()
    rename = Path.rename

    def rename_data_only(this: Path, target: Path) -> Path:
        if this.name == "map.new":
            raise KilledError
        return rename(this, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_data_only)
        with pytest.raises(KilledError):
            opened(tmp_path, one)
    # What the next attempt makes may be given the very number that the map names.
    os.truncate(spare, 0)
    os.truncate(spare, len(one.plain))
    spare.rename(data)
    again = opened(tmp_path, one)
    assert list(again.states) == [EMPTY] * 6
    again.close()


def test_a_map_that_somebody_made_anew_while_it_was_waited_for_is_used(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(tmp_path, one)
    with (first.directory / "map").open("r+b") as damaged:
        damaged.write(b"damage")
    flock, made = fcntl.flock, list[DeviceFile]()

    def flock_late(fd: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/map") and not made:
            monkeypatch.undo()
            made.append(opened(tmp_path, one))
            made[0].write(fills(one, 0))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    second = opened(tmp_path, one)
    assert second.read_span(0) == one.plain[:SPAN]
    for file in (first, *made, second):
        file.close()


def test_a_change_keeps_other_processes_and_threads_out(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write_run = opened(tmp_path, one), extents.write_run
    order: list[str] = []

    def evict() -> None:
        file.evict([0])
        order.append("evicted")

    thread = threading.Thread(target=evict)

    def write_while_others_try(*args: Any, **options: Any) -> None:
        fd = os.open(file.directory / "map", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)
        thread.start()
        thread.join(0.2)  # it has not ended; one that is not kept out would
        write_run(*args, **options)
        order.append("written")

    monkeypatch.setattr(devicefile, "write_run", write_while_others_try)
    file.write(fills(one, 0))
    thread.join()
    assert order == ["written", "evicted"]
    assert file.read_span(0) is None
    file.close()


def test_a_span_that_was_being_written_when_it_was_verified_is_not_dropped(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pread, reads = opened(tmp_path, one), os.pread, list[int]()
    file.write(fills(one, 0, 1))

    def pread_half_at_first(fd: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        data = pread(fd, length, offset)
        return bytes(length) if len(reads) == 1 else data

    monkeypatch.setattr(os, "pread", pread_half_at_first)
    assert file.verify([0]).dropped == []
    assert reads == [0, 0]
    monkeypatch.undo()
    assert file.read_span(0) == one.plain[:SPAN]
    file.close()


def test_what_others_wrote_is_not_noted_once_somebody_else_answers_for_the_device(
    tmp_path: Path, one: Sample
) -> None:
    file, owner = opened(tmp_path, one), opened(tmp_path, one)
    generation = file.entrust()
    assert generation is not None
    owner.pin(lambda: None, IdleRule())
    assert file.take_over(generation, {0: bytes(32)}) is None
    assert file.entrust() is None
    assert owner.states[0] == EMPTY
    owner.unpin()
    file.close()
    owner.close()


def test_a_file_that_cannot_be_read_cannot_be_mounted(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    file.write(fills(one, 0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", raising(OSError(errno.EIO, "Input/output error")))
        assert file.read_span(0) is None
    with pytest.raises(CacheError, match="cannot be mounted"):
        file.pin(lambda: None, IdleRule())
    assert not (file.directory / "mounted").exists()
    file.close()


def test_a_pin_that_cannot_be_removed_is_given_up_all_the_same(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = opened(tmp_path, one)
    file.pin(lambda: None, IdleRule())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raising(OSError(errno.EROFS, "Read-only file system")))
        file.unpin()
    assert not file.pinned
    assert "stays: Read-only file system" in caplog.text
    file.close()
    again = opened(tmp_path, one)
    assert not again.pinned_elsewhere, "stale, and removed by whoever opens it"
    again.close()


def test_a_device_that_is_given_up_while_another_thread_evicts_from_it_stays_open_for_that(
    tmp_path: Path, one: Sample
) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)
    file = cache.open(one.device, Form.PLAIN)
    assert file is not None
    cache.put(file, fills(one, 0, 1))
    with cache.visit(file.directory) as visited:
        assert visited is file
        cache.release(file)
        file.close()
        assert os.readlink(f"/proc/self/fd/{file.fd}") == os.fspath(file.directory / "data")
        assert visited.evict([0]).spans == 1
        with file.kept_open() as kept:
            assert not kept, "nobody begins to use it now"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)
    again = cache.open(one.device, Form.PLAIN)
    assert again is not None
    assert list(again.states[:2]) == [EMPTY, PRESENT]
    cache.close()
