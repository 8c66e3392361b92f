"""Pre-content events as this kernel has them, and what is read of records that it may make one day."""

import errno
import os
import resource
import select
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.mount import fanotify
from veneer.mount.fanotify import Event

pytestmark = [pytest.mark.root]

#: Longer than this machine is ever busy; only a failing test waits so long.
PATIENCE_S = 30.0
SIZE = 1 << 20


class Reader:
    """Reads in a thread from a file, which is open already or is opened and closed again."""

    def __init__(self, file: Path | int, offset: int = 0, length: int = 10) -> None:
        self.outcome: bytes | int | None = None
        self._thread = threading.Thread(target=self._read, args=(file, offset, length), daemon=True)
        self._thread.start()

    def _read(self, file: Path | int, offset: int, length: int) -> None:
        fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
        try:
            self.outcome = os.pread(fd, length, offset)
        except OSError as error:
            self.outcome = error.errno
        finally:
            if fd != file:
                os.close(fd)

    @property
    def thread(self) -> int | None:
        return self._thread.native_id

    def result(self) -> bytes | int | None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the read has not been answered"
        return self.outcome


@pytest.fixture
def group() -> Iterator[int]:
    fd = fanotify.open_group()
    yield fd
    os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file of zeros, and a descriptor of it that was opened before any mark."""
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    yield path, fd
    os.close(fd)


def next_events(group: int, most: int = 64) -> list[Event]:
    ready, _, _ = select.select([group], [], [], PATIENCE_S)
    assert ready, "no event came"
    return fanotify.read_events(group, most)


def test_a_reader_waits_until_the_bytes_are_there(group: int, file: tuple[Path, int]) -> None:
    path, fd = file
    fanotify.mark(group, fd)
    reader = Reader(path, 5000, 10)
    (event,) = next_events(group)
    assert (event.offset, event.length, event.pid) == (4096, 4096, reader.thread)
    os.pwrite(event.fd, b"0123456789", 5000)  # raises no event itself
    fanotify.answer(group, event.fd)
    os.close(event.fd)
    assert reader.result() == b"0123456789"
    assert os.pread(fd, 10, 5000) == b"0123456789", "opened before the mark, asks nobody"
    assert fanotify.read_events(group) == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.ENOENT, errno.EIO),
        (errno.ETIMEDOUT, errno.EIO),
    ],
)
def test_errors_that_the_kernel_does_not_take_become_one_that_it_takes(
    group: int, file: tuple[Path, int], error: int, seen: int
) -> None:
    path, fd = file
    fanotify.mark(group, fd)
    reader = Reader(path)
    (event,) = next_events(group)
    fanotify.answer(group, event.fd, error)
    fanotify.answer(group, event.fd)  # too late, and harmless
    os.close(event.fd)
    assert reader.result() == seen


def test_a_kernel_that_takes_no_errors_gets_a_plain_denial(
    group: int, file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = file
    fanotify.mark(group, fd)
    reader, write = Reader(path), os.write

    def old(fd: int, data: bytes) -> int:
        if struct.unpack("=iI", data)[1] >> 24:
            raise OSError(errno.EINVAL, "")
        return write(fd, data)

    (event,) = next_events(group)
    monkeypatch.setattr(os, "write", old)
    fanotify.answer(group, event.fd, errno.EIO)
    monkeypatch.undo()
    os.close(event.fd)
    assert reader.result() == errno.EPERM


def test_no_mark_no_question_and_it_comes_back_for_files_opened_under_it(
    group: int, file: tuple[Path, int]
) -> None:
    path, fd = file
    fanotify.unmark(group, fd)  # nothing to do
    unasked = os.open(path, os.O_RDONLY)
    fanotify.mark(group, fd)
    fanotify.mark(group, fd)
    asking = os.open(path, os.O_RDONLY)
    fanotify.unmark(group, fd)
    assert os.pread(asking, 1, 0) == b"\0"
    fanotify.mark(group, fd)
    assert os.pread(unasked, 1, 0) == b"\0", "this is why files are marked before they are mounted"
    reader = Reader(Path(f"/proc/self/fd/{asking}"))
    (event,) = next_events(group)
    fanotify.answer(group, event.fd)
    os.close(event.fd)
    assert reader.result() == bytes(10)
    os.close(asking)
    os.close(unasked)


def test_what_a_dead_process_left_unanswered_is_failed_and_may_be_asked_again(
    group: int, file: tuple[Path, int]
) -> None:
    path, fd = file
    fanotify.mark(group, fd)
    readers = [Reader(path, 4096 * number) for number in range(3)]
    taken: list[Event] = []
    while len(taken) < 2:
        taken += next_events(group, most=1)
    assert fanotify.sweep(group, max(event.fd for event in taken) + 1) == 2
    for event in taken:
        os.close(event.fd)
    assert fanotify.sweep(group, 1000) == 0
    (event,) = next_events(group)
    fanotify.answer(group, event.fd)
    os.close(event.fd)
    assert sorted(map(str, (reader.result() for reader in readers))) == sorted(
        map(str, (errno.EIO, errno.EIO, bytes(10)))
    )


def test_without_descriptors_reads_fail_and_nobody_sees_a_hole(group: int, file: tuple[Path, int]) -> None:
    path, fd = file
    fanotify.mark(group, fd)
    opened = [os.open(path, os.O_RDONLY) for _ in range(4)]
    readers = [Reader(fd, 4096 * number) for number, fd in enumerate(opened)]
    (first,) = next_events(group, most=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(group))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    refused: list[Event] = []
    try:
        while len(refused) < 3:
            refused += next_events(group)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {event.fd for event in refused} == {-errno.EMFILE}
    fanotify.answer(group, first.fd)
    os.close(first.fd)
    results = [reader.result() for reader in readers]
    for fd in opened:
        os.close(fd)
    assert results.count(bytes(10)) == 1
    assert results.count(errno.EPERM) == 3


def test_a_group_that_reports_no_errors_of_descriptors_tells_by_failing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EMFILE, "")

    monkeypatch.setattr(os, "read", fail)
    assert fanotify.read_events(0) == [Event(-errno.EMFILE, 0, 0, 0)]


def test_where_files_cannot_be_marked(group: int) -> None:
    with open("/dev/shm", "rb", opener=lambda name, _: os.open(name, os.O_TMPFILE | os.O_RDWR)) as file:
        with pytest.raises(OSError) as caught:
            fanotify.mark(group, file.fileno())
        assert caught.value.errno == errno.EOPNOTSUPP


def test_the_limit_of_descriptors_goes_as_far_as_a_sweep_can_follow() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        limit = fanotify.raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, hard)
        assert limit == min(hard, fanotify.MAX_DESCRIPTORS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("=BBH", kind, 0, 4 + len(body)) + body


def event(fd: int, *records: bytes) -> bytes:
    body = b"".join(records)
    return struct.pack("=IBBHQii", 24 + len(body), 3, 0, 24, 1 << 20, fd, 7) + body


Answered = Callable[[bytes], list[Event]]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Answered:
    def parse(data: bytes) -> list[Event]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "read", lambda *_: data)
            return fanotify.read_events(0)

    return parse


def test_records_of_other_kinds_are_passed_over(parsed: Answered) -> None:
    span = record(6, struct.pack("=IQQ", 0, 8192, 4096))
    pidfd = record(4, bytes(4))
    data = event(5, pidfd, span) + event(6) + event(7, record(9, b""), span)
    assert parsed(data) == [Event(5, 7, 8192, 4096), Event(6, 7, 0, 0), Event(7, 7, 8192, 4096)]


def test_another_version_is_not_guessed_at(parsed: Answered) -> None:
    with pytest.raises(OSError, match="version 4"):
        parsed(struct.pack("=IBBHQii", 24, 4, 0, 24, 1 << 20, 5, 7))


@given(records=st.binary(max_size=60))
def test_no_record_makes_reading_fail_or_go_on_for_ever(records: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", lambda *_: event(5, records))
        (found,) = fanotify.read_events(0)
    assert found.fd == 5
