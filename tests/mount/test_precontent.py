"""Devices that fill as the kernel reads them: right bytes, few requests, errors that end, and no event left."""

import errno
import os
import select
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from tests.mount.guarding import SPAN, FakeDevice, FakeStore, Guarded, guarding, in_thread, run
from tests.mount.images import Entry, file, image
from veneer.errors import CacheError, IntegrityError, MountError, Unavailable, UnsupportedFormat
from veneer.mount import fanotify
from veneer.mount.filetable import FileTable
from veneer.store.presence import Form

pytestmark = [pytest.mark.root]

#: Data that are not aligned to blocks in the file, so that their chunks have to be copied to a tail.
UNALIGNED = file(b"A" * 7001 + b"B" * 5000, sparse=(300_000, ((3, 7001), (100_001, 5000))))
CONTENT = os.urandom(3 << 20)
PAGE = 4096


def pread(path: Path, length: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


async def test_a_file_is_read_as_it_is_and_the_second_time_asks_nobody(tmp_path: Path) -> None:
    tree: dict[bytes, Entry | bytes] = {b"f": file(CONTENT), b"odd": file(b"odd" * 1000), b"u": UNALIGNED}
    async with guarding(tmp_path, *image(tree)) as guarded:
        path, gone = await guarded.mount()
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert await run("cat", path / "odd") == b"odd" * 1000
        expected = b"\0" * 3 + b"A" * 7001 + bytes(92_997) + b"B" * 5000 + bytes(194_999)
        assert await in_thread((path / "u").read_bytes) == expected
        stats = guarded.devices.stats
        assert stats.pending == 0
        assert stats.waited > 0
        assert stats.denied == stats.refused == stats.unknown == stats.adopted == 0
        before = stats.events
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert stats.events == before
        links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        held = [link for link in links if link.exists() and link.samefile(guarded.device.path)]
        assert len(held) == 1, "the store's own: those of events have been closed"
        await guarded.unmount(path, gone)
        assert not guarded.device.pinned
        assert (stats.held, stats.marked) == (0, 0)


async def test_a_file_read_in_order_takes_an_event_for_64_kib_or_more(tmp_path: Path) -> None:
    content = os.urandom(8 << 20)
    async with guarding(tmp_path, *image({b"f": file(content)})) as guarded:
        path, _ = await guarded.mount()
        assert await in_thread((path / "f").read_bytes) == content
        assert guarded.devices.stats.events <= len(content) // (64 << 10) + 1


async def test_small_files_are_fetched_whole_and_other_files_are_left_alone(tmp_path: Path) -> None:
    index, data = image(
        {b"before": file(os.urandom(SPAN)), b"small": file(os.urandom(3 * SPAN)), b"b": file(CONTENT)}
    )
    async with guarding(tmp_path, index, data) as guarded:
        path, _ = await guarded.mount()
        assert await in_thread(lambda: pread(path / "small", 10, 2 * SPAN)) == data[3 * SPAN : 3 * SPAN + 10]
        assert guarded.store.fetched == [1, 2, 3]


async def test_the_first_miss_does_not_wait_until_the_tree_is_known(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    known = threading.Event()

    def slow() -> object:
        known.wait()
        return index

    async with guarding(tmp_path, index, data) as guarded:
        files = FileTable(slow)  # type: ignore[arg-type] # gives an index, late
        await guarded.devices.hold(guarded.store.real, guarded.device.real, files, "test")
        try:
            found = await in_thread(lambda: pread(guarded.device.path, 10, 5000))
        finally:
            known.set()
        assert found == CONTENT[5000:5010]
        assert guarded.store.fills[0][2] == (PAGE, PAGE + 2 * SPAN)


async def test_a_failed_read_is_an_error_and_neither_zeros_nor_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        for failure in (Unavailable("registry.test: refused"), CacheError("disk full")):
            guarded.store.failure = failure
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    await in_thread(lambda: pread(path / "f", 100, 1 << 20))
                assert caught.value.errno == errno.EIO
        assert guarded.devices.stats.denied >= 4
        guarded.store.failure = None
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert guarded.devices.stats.pending == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "image=test path='/f' offset=1048576" in line
    assert f"device={guarded.device.device.key.hex[:12]} spans=0..0 error=Unavailable" in line
    assert "registry.test: refused" in line


@pytest.mark.parametrize("fault", ["bug", "lie"])
async def test_a_bug_is_an_error_for_the_reader_and_ends_nothing(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        if fault == "bug":
            guarded.store.crash = RuntimeError("this is wrong")
        else:
            guarded.store.lie = True
        with pytest.raises(OSError, match="Input/output"):
            await in_thread((path / "f").read_bytes)
        guarded.store.crash, guarded.store.lie = None, False
        assert await in_thread((path / "f").read_bytes) == CONTENT
    assert {"bug": "because of a bug", "lie": "is not there"}[fault] in caplog.text


async def test_reads_that_the_kernel_has_failed_are_told_and_need_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, refused = fanotify.read_events, [fanotify.Event(-errno.EMFILE, 0, 0, 0)]

    def read_events(group: int, most: int = 64) -> list[fanotify.Event]:
        events = real(group, most)
        return [*[refused.pop() for _ in range(len(refused)) if events], *events]

    monkeypatch.setattr(fanotify, "read_events", read_events)
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        assert await in_thread((path / "f").read_bytes) == CONTENT
        stats = guarded.devices.stats
        assert (stats.refused, stats.denied, stats.pending) == (1, 0, 0)
    assert "the kernel failed reads because of: Too many open files" in caplog.text


async def test_a_bug_while_it_is_decided_is_an_error_and_not_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> bool:
        raise ZeroDivisionError

    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        with monkeypatch.context() as patch:
            patch.setattr(FakeStore, "holds", bug)
            with pytest.raises(OSError, match="Input/output"):
                await in_thread(lambda: pread(path / "f", 10, 0))
        assert await in_thread((path / "f").read_bytes) == CONTENT


async def test_a_device_is_held_though_as_many_readers_wait_as_may(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    found: list[bytes] = []
    async with (
        trio.open_nursery() as nursery,
        guarding(tmp_path, index, data, most_pending=1) as guarded,
    ):
        path, _ = await guarded.mount()
        marked = tmp_path / "marked"
        marked.touch()
        os.truncate(marked, len(data))
        guarded.devices.guard(marked)
        device = FakeDevice(index.devices[0], data, marked)

        async def read() -> None:
            found.append(await in_thread(lambda: pread(path / "f", 10, 0)))

        guarded.store.blocked = trio.Event()
        nursery.start_soon(read)
        await guarded.store.filling.wait()
        with trio.fail_after(30):
            await guarded.devices.hold(guarded.store.real, device.real, None, "test")
        assert (guarded.devices.stats.adopted, found) == (1, [])
        guarded.store.blocked.set()
        guarded.devices.opened(device.real)
        await guarded.devices.release(device.real)
        while not found:
            await trio.testing.wait_all_tasks_blocked(0.001)
    assert found == [CONTENT[:10]]
    assert device.data_fd is not None
    os.close(device.data_fd)


async def test_who_reads_while_a_device_is_being_held_waits_for_the_end_of_that(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    found: list[bytes] = []
    async with trio.open_nursery() as nursery, guarding(tmp_path, index, data) as guarded:
        guarded.devices.guard(guarded.device.path)
        pin, go_on = guarded.store.pin, threading.Event()

        def slow_pin(attached: FakeDevice, before_punch: object) -> None:
            assert go_on.wait(30)
            pin(attached, before_punch)

        async def read() -> None:
            found.append(await in_thread(lambda: pread(guarded.device.path, 10, 0)))

        guarded.store.pin = slow_pin  # type: ignore[method-assign]
        nursery.start_soon(guarded.devices.hold, guarded.store.real, guarded.device.real, None, "test")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(read)
        await first_event(guarded)
        assert found == []
        go_on.set()
        while not found:
            await trio.testing.wait_all_tasks_blocked(0.001)
    assert found == [data[:10]]


async def test_64_readers_of_one_cold_file(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        limit = trio.CapacityLimiter(64)
        found: list[bytes] = []

        async def read() -> None:
            found.append(
                await trio.to_thread.run_sync((path / "f").read_bytes, limiter=limit, abandon_on_cancel=True)
            )

        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(read)
        assert found == [CONTENT] * 64
        assert sorted(guarded.store.fetched) == list(range(len(CONTENT) // SPAN))


async def test_more_readers_than_may_wait_get_their_turn(tmp_path: Path) -> None:
    index, data = image({b"f": file(os.urandom(64 * SPAN))})
    async with guarding(tmp_path, index, data, most_pending=8) as guarded:
        path, _ = await guarded.mount()
        guarded.store.blocked = trio.Event()
        limit = trio.CapacityLimiter(40)
        found: dict[int, bytes] = {}

        async def read(number: int) -> None:
            offset = number * SPAN
            found[number] = await trio.to_thread.run_sync(
                pread, path / "f", 10, offset, limiter=limit, abandon_on_cancel=True
            )

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(read, number)
            while len(guarded.store.fills) < 8:
                await guarded.store.filling.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert guarded.devices.stats.pending == 8
            guarded.store.blocked.set()
        assert found == {number: data[number * SPAN : number * SPAN + 10] for number in range(40)}
        assert guarded.devices.stats.most_pending == 8
        assert guarded.devices.stats.pending == 0


async def test_the_end_of_serving_fails_who_waits(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    errors: list[int | None] = []
    async with trio.open_nursery() as readers, guarding(tmp_path, index, data, group=group) as guarded:
        await guarded.mount()
        guarded.store.blocked = trio.Event()

        async def read() -> None:
            with pytest.raises(OSError) as caught:
                await in_thread(lambda: os.pread(device, 10, 0))
            errors.append(caught.value.errno)

        device = os.open(guarded.device.path, os.O_RDONLY)
        readers.start_soon(read)
        await guarded.store.filling.wait()
    os.close(device)
    assert errors == [errno.EIO]
    assert guarded.devices.stats.pending == 0
    os.close(group)


async def first_event(guarded: Guarded) -> None:
    """Wait until the kernel has asked."""
    while not guarded.devices.stats.events:
        await trio.testing.wait_all_tasks_blocked(0.001)


async def test_who_is_drained_answers_what_was_taken_and_leaves_the_rest(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    found: list[bytes] = []

    async def read(offset: int) -> None:
        found.append(await in_thread(lambda: pread(tmp_path / "device", 10, offset)))

    async with trio.open_nursery() as readers:
        async with guarding(tmp_path, index, data, group=group) as guarded:
            await guarded.mount()
            guarded.store.blocked = trio.Event()
            readers.start_soon(read, 0)
            await guarded.store.filling.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guarded.devices.drain)
                await trio.testing.wait_all_tasks_blocked()
                readers.start_soon(read, 2 << 20)
                await in_thread(lambda: select.select([group], [], []))
                guarded.store.blocked.set()
            assert guarded.devices.stats.events == 1
        (event,) = fanotify.read_events(group)
        fanotify.answer(group, event.fd)
        os.close(event.fd)
    assert sorted(found) == sorted([CONTENT[:10], bytes(10)])
    os.close(group)


# Completeness


async def read_complete(guarded: Guarded, path: Path) -> None:
    """Read everything, and wait until no read asks any more."""
    assert await in_thread((path / "f").read_bytes) == CONTENT
    while guarded.devices.stats.marked:
        await trio.testing.wait_all_tasks_blocked()


async def test_a_complete_device_is_unmarked_and_needs_nobody(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    async with guarding(tmp_path, index, data) as guarded:
        path, _ = await guarded.mount()
        await read_complete(guarded, path)
        assert guarded.store.proofs == 1
        before = guarded.devices.stats.events
        shown = os.open(path, os.O_RDONLY)
    # Neither the loop nor the group is there now, only the file system.
    with pytest.raises(OSError):
        fanotify.read_events(guarded.group)
    file_there = Path(f"/proc/self/fd/{shown}/f")
    await in_thread(lambda: _drop(file_there))
    assert await in_thread(file_there.read_bytes) == CONTENT
    assert guarded.devices.stats.events == before
    os.close(shown)


async def test_a_device_that_was_complete_when_it_was_mounted_comes_back_after_an_eviction(
    tmp_path: Path,
) -> None:
    """It would read as zeros if the file had been open without a mark."""
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, gone = await guarded.mount()
        await read_complete(guarded, path)
        await guarded.unmount(path, gone)
        path, _ = await guarded.mount("second")
        stats = guarded.devices.stats
        assert (stats.marked, stats.unmarked_complete) == (0, 2)
        assert guarded.store.proofs == 1
        third, gone = await guarded.mount("third")
        await guarded.store.evict(guarded.device)
        assert stats.marked == 1
        guarded.store.fetched.clear()
        assert await in_thread((third / "f").read_bytes) == CONTENT
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert sorted(guarded.store.fetched) == list(range(len(CONTENT) // SPAN))
        await guarded.unmount(third, gone)
        assert guarded.device.pinned


async def test_no_mark_goes_while_somebody_is_about_to_mount(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        stats = guarded.devices.stats
        await guarded.mount("second", settle=False)
        assert await in_thread((path / "f").read_bytes) == CONTENT
        await trio.testing.wait_all_tasks_blocked()
        assert (guarded.device.all_present, stats.marked, guarded.store.proofs) == (True, 1, 0)
        guarded.devices.opened(guarded.device.real)
        await trio.testing.wait_all_tasks_blocked()
        assert (stats.marked, stats.unmarked_complete) == (0, 1)


async def test_a_proof_that_ends_while_somebody_is_about_to_mount_leaves_the_mark(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        devices, real, prove = guarded.devices, guarded.device.real, guarded.store.prove
        begun, go_on, ended = trio.Event(), trio.Event(), trio.Event()

        async def slow_prove(attached: FakeDevice) -> bool:
            begun.set()
            await go_on.wait()
            result = await prove(attached)
            ended.set()
            return result

        guarded.store.prove = slow_prove  # type: ignore[method-assign]
        path, _ = await guarded.mount()
        assert await in_thread((path / "f").read_bytes) == CONTENT
        await begun.wait()
        await devices.hold(guarded.store.real, real, None, "test")
        go_on.set()
        await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert (guarded.device.complete, devices.stats.marked) == (True, 1)
        devices.opened(real)
        assert devices.stats.marked == 0
        await devices.release(real)


async def test_what_was_evicted_while_it_was_proven_stays_marked(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        was_read, evicted, prove = trio.Event(), trio.Event(), guarded.store.prove

        async def late(attached: object) -> bool:
            result = await prove(attached)  # type: ignore[arg-type] # the same one
            await was_read.wait()
            await guarded.store.evict(guarded.device)
            evicted.set()
            return result

        guarded.store.prove = late  # type: ignore[method-assign]
        assert await in_thread((path / "f").read_bytes) == CONTENT
        was_read.set()
        await evicted.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert guarded.device.there == set()
        assert guarded.devices.stats.marked == 1
        guarded.store.prove = prove  # type: ignore[method-assign]
        guarded.device.forget_cached_pages()
        await in_thread(lambda: _drop(path / "f"))
        assert await in_thread((path / "f").read_bytes) == CONTENT


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def test_a_device_that_is_not_what_it_should_be_stays_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        guarded.store.proof = IntegrityError("contents of layer 12: sha256 differs")
        path, _ = await guarded.mount()
        for _ in range(2):
            assert await in_thread((path / "f").read_bytes) == CONTENT
            await in_thread(lambda: _drop(path / "f"))
        assert guarded.devices.stats.marked == 1
        assert guarded.store.proofs == 1, "it is not tried again with every event"
    assert "sha256 differs" in caplog.text


async def test_a_device_completed_in_the_background(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, _ = await guarded.mount()
        await guarded.store.fill(guarded.device, 0, guarded.device.size)
        guarded.devices.consider(guarded.device.real)
        await trio.testing.wait_all_tasks_blocked()
        assert guarded.devices.stats.marked == 0
        assert await in_thread((path / "f").read_bytes) == CONTENT
        assert guarded.devices.stats.events == 0


# Restarts and other processes


async def test_a_restarted_process_takes_the_mounts_over(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    async with guarding(tmp_path, index, data, group=group) as guarded:
        path, _ = await guarded.mount()
        shown = os.open(path, os.O_RDONLY)
        assert await in_thread(lambda: pread(path / "f", 10, 0)) == CONTENT[:10]
        there = guarded.device.there
    # The mark is still there, so the store's descriptor of the next process asks.
    found: list[bytes] = []

    async def read(offset: int) -> None:
        found.append(await in_thread(lambda: pread(Path(f"/proc/self/fd/{shown}/f"), 10, offset)))

    async with trio.open_nursery() as nursery, guarding(tmp_path, index, data, group=group) as guarded:
        guarded.device.there = there
        nursery.start_soon(read, 2 << 20)
        await first_event(guarded)
        stats = guarded.devices.stats
        assert (stats.unknown, stats.pending) == (0, 1), "it waits until its device is held"
        files = FileTable(lambda: index)
        await guarded.devices.hold(guarded.store.real, guarded.device.real, files, "test")
        guarded.devices.restored()
        assert stats.adopted == 1
        await read(1 << 20)
        assert guarded.device.data_fd is not None
        assert os.pread(guarded.device.data_fd, 10, 0) == CONTENT[:10], "does not ask"
        nursery.start_soon(guarded.devices.release, guarded.device.real)
    assert sorted(found) == sorted([CONTENT[1 << 20 : (1 << 20) + 10], CONTENT[2 << 20 : (2 << 20) + 10]])
    os.close(shown)
    os.close(group)


async def test_a_reader_whose_event_died_with_its_process_gets_its_bytes_from_the_next(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    async with guarding(tmp_path, index, data, group=group) as guarded:
        path, _ = await guarded.mount()
        shown = os.open(path, os.O_RDONLY)
    found: list[bytes] = []

    async def read() -> None:
        found.append(await in_thread(lambda: pread(Path(f"/proc/self/fd/{shown}/f"), 10, 1 << 20)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.lowlevel.wait_readable(group)
        (event,) = fanotify.read_events(group)
        os.close(event.fd)  # as if this process had died now
        assert fanotify.sweep(group, event.fd + 1) == 1
        async with guarding(tmp_path, index, data, group=group) as guarded:
            files = FileTable(lambda: index)
            await guarded.devices.hold(guarded.store.real, guarded.device.real, files, "test")
            guarded.devices.restored()
            while not found:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert guarded.devices.stats.denied == 0
    assert found == [CONTENT[1 << 20 : (1 << 20) + 10]]
    os.close(shown)
    os.close(group)


async def test_files_that_nobody_holds_any_more_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    async with guarding(tmp_path, index, data, group=group) as guarded:
        await guarded.mount()
    other = tmp_path / "device"
    async with (
        trio.open_nursery() as nursery,
        guarding(tmp_path / "cache", index, data, group=group) as guarded,
    ):

        async def read() -> None:
            with pytest.raises(OSError, match="Input/output"):
                await in_thread(lambda: pread(other, 10, 0))

        nursery.start_soon(read)
        await first_event(guarded)
        assert guarded.devices.stats.unknown == 0
        guarded.devices.restored()
        assert guarded.devices.stats.unknown == 1
        await read()
    assert f"{os.fspath(other)!r}, which is not held" in caplog.text
    os.close(group)


async def test_the_end_of_serving_fails_who_waits_for_a_device_to_be_held(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    group = fanotify.open_group()
    async with guarding(tmp_path, index, data, group=group) as guarded:
        await guarded.mount()
    errors: list[str] = []

    async def read() -> None:
        with pytest.raises(OSError, match="Input/output") as caught:
            await in_thread(lambda: pread(tmp_path / "device", 10, 0))
        errors.append(str(caught.value))

    async with trio.open_nursery() as nursery:
        async with guarding(tmp_path / "cache", index, data, group=group) as guarded:
            nursery.start_soon(read)
            await first_event(guarded)
            assert errors == []
        assert guarded.devices.stats.pending == 0
    assert len(errors) == 1
    os.close(group)


async def test_what_a_mount_may_read_that_nobody_serves_stays_marked_when_others_let_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would read zeros where there is nothing."""
    left: list[object] = []
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        in_cache = tmp_path / "in cache"
        in_cache.mkdir()
        (in_cache / "data").hardlink_to(guarded.device.path)
        monkeypatch.setattr(FakeStore, "leave", lambda _, attached: left.append(attached), raising=False)
        monkeypatch.setattr(FakeDevice, "file", SimpleNamespace(directory=in_cache), raising=False)
        guarded.devices.expect(1)
        path, gone = await guarded.mount()
        await guarded.unmount(path, gone)
        assert left == [guarded.device]
        with pytest.raises(OSError, match="Input/output"):
            await in_thread(lambda: pread(guarded.device.path, 10, 0))
        guarded.devices.expect(0)
        assert await in_thread(lambda: pread(guarded.device.path, 10, 0)) == bytes(10), "nobody mounts it"


async def test_what_is_held_stays_marked_when_all_mounts_are_served(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        guarded.devices.expect(1, [guarded.device.path])
        path, _ = await guarded.mount()
        guarded.devices.expect(0)
        assert await in_thread((path / "f").read_bytes) == CONTENT


async def test_other_processes_may_open_the_data_file(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        await guarded.mount()
        assert await run("cat", guarded.device.path) == CONTENT
        program = "import mmap, sys; f = open(sys.argv[1]); print(mmap.mmap(f.fileno(), 0, prot=1)[700_000])"
        command = [sys.executable, "-c", program, os.fspath(guarded.device.path)]
        assert int(await run(*command)) == CONTENT[700_000]


# Holding


async def test_what_cannot_be_held(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    files = FileTable(lambda: index)
    async with guarding(tmp_path, index, data) as guarded:
        device, devices = guarded.device, guarded.devices

        async def hold() -> None:
            await devices.hold(guarded.store.real, device.real, files, "test")

        device.form = Form.STORED
        with pytest.raises(UnsupportedFormat, match="encrypted") as refused:
            await hold()
        assert refused.value.hint == "use --backend erofs-fuse"
        device.form = Form.PLAIN
        fd, device.data_fd = device.data_fd, None
        with pytest.raises(MountError, match="no file"):
            await hold()
        device.data_fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        with pytest.raises(MountError, match="not supported"):
            await hold()
        os.close(device.data_fd)
        assert not device.pinned
        device.data_fd = fd
        await hold()
        assert (devices.stats.held, devices.stats.marked, device.pinned) == (1, 1, True)
        await devices.release(device.real)
        assert (devices.stats.held, devices.stats.marked, device.pinned) == (0, 0, False)
        with pytest.raises(ValueError, match="not held"):
            await devices.release(device.real)


async def test_a_mount_that_failed_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    async with guarding(tmp_path, index, data) as guarded:
        path, _ = await guarded.mount()
        await read_complete(guarded, path)
        stats = guarded.devices.stats
        holding = guarded.devices.holding
        files = FileTable(lambda: index)
        async with holding(guarded.store.real, [guarded.device.real], files, "other"):
            assert (stats.marked, guarded.device.complete) == (1, True)
        assert (stats.held, stats.marked, guarded.device.pinned) == (1, 0, True)


async def test_holders_that_come_and_go_at_once_share_one_mark(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    files = FileTable(lambda: index)
    async with guarding(tmp_path, index, data) as guarded:

        async def use() -> None:
            for _ in range(5):
                await guarded.devices.hold(guarded.store.real, guarded.device.real, files, "test")
                assert guarded.devices.stats.marked == 1
                assert guarded.device.pinned
                await trio.lowlevel.checkpoint()
                await guarded.devices.release(guarded.device.real)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(use)
        stats = guarded.devices.stats
        assert (stats.held, stats.marked, guarded.device.pinned) == (0, 0, False)


async def test_holding_again_waits_until_a_release_is_done(tmp_path: Path) -> None:
    """Or the mark would go that the next mount relies on."""
    index, data = image({b"f": file(CONTENT)})
    files = FileTable(lambda: index)
    async with guarding(tmp_path, index, data) as guarded:
        devices, real, unpin = guarded.devices, guarded.device.real, guarded.store.unpin
        begun, go_on = trio.Event(), threading.Event()

        def slow_unpin(attached: object) -> None:
            trio.from_thread.run_sync(begun.set)
            assert go_on.wait(30)
            unpin(attached)  # type: ignore[arg-type] # the same one

        guarded.store.unpin = slow_unpin  # type: ignore[method-assign]
        await devices.hold(guarded.store.real, real, files, "test")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(devices.release, real)
            await begun.wait()
            nursery.start_soon(devices.hold, guarded.store.real, real, files, "test")
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert (devices.stats.held, devices.stats.marked, guarded.device.pinned) == (1, 1, True)
        assert await run("cat", guarded.device.path) == CONTENT


async def test_releasing_fails_readers_of_the_file_and_waits_for_them(tmp_path: Path) -> None:
    index, data = image({b"f": file(CONTENT)})
    async with trio.open_nursery() as nursery, guarding(tmp_path, index, data) as guarded:
        path, gone = await guarded.mount()
        guarded.store.blocked = trio.Event()

        async def read() -> None:
            with pytest.raises(OSError, match="Input/output"):
                await in_thread(lambda: pread(guarded.device.path, 10, 0))

        nursery.start_soon(read)
        await guarded.store.filling.wait()
        await guarded.unmount(path, gone)
        assert guarded.devices.stats.pending == 0


async def test_the_end_of_a_mount_that_was_detached_while_in_use(tmp_path: Path) -> None:
    async with guarding(tmp_path, *image({b"f": file(CONTENT)})) as guarded:
        path, gone = await guarded.mount()
        user = await in_thread(lambda: os.open(path / "f", os.O_RDONLY))
        _, other_gone = await guarded.mount("other")
        await run("umount", "-l", path)
        assert await in_thread(lambda: os.pread(user, 10, 1 << 20)) == CONTENT[1 << 20 : (1 << 20) + 10]
        assert not gone.is_set()
        os.close(user)
        await gone.wait()
        assert not other_gone.is_set()
