"""Data file and presence map of one device: what they vouch for, and what makes them worthless."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.rig import KIB, MIB, Sample, sample
from veneer.store import extents, presence
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.presence import EMPTY, PRESENT, SUSPECT, Form, Layout, MapMismatch

LENGTHS = [10 * KIB, 100, 64 * KIB, 3 * KIB, 200 * KIB, 1]


@pytest.fixture
def one() -> Sample:
    return sample(LENGTHS)


def opened(directory: Path, one: Sample, form: Form = Form.PLAIN) -> DeviceFile:
    return DeviceFile.open(directory / one.device.key.hex, Layout.of(one.device, form))


def piece(one: Sample, number: int) -> bytes:
    span = one.device.spans[number]
    return one.plain[span.offset : span.offset + span.length]


def fill(file: DeviceFile, one: Sample, *numbers: int) -> int:
    return file.write([Fill(n, piece(one, n), hashlib.sha256(piece(one, n)).digest()) for n in numbers])


def allocated(file: DeviceFile) -> int:
    return (file.directory / "data").stat().st_blocks * 512


def test_only_ranges_whose_spans_are_all_present_can_be_read(tmp_path: Path, one: Sample) -> None:
    file = opened(tmp_path, one)
    assert file.read(0, 1) is None
    assert fill(file, one, 0, 1, 3) == 10 * KIB + 100 + 3 * KIB
    assert file.read(0, 10 * KIB + 100) == one.plain[: 10 * KIB + 100]
    assert file.read(10 * KIB - 1, 2) == one.plain[10 * KIB - 1 : 10 * KIB + 1]
    assert file.read(10 * KIB, 101) is None
    assert file.read(5, 0) == b""
    with pytest.raises(ValueError, match="outside"):
        file.read(len(one.plain), 1)
    file.close()


def test_what_was_written_is_there_for_the_next_process_and_a_second_write_gains_nothing(
    tmp_path: Path, one: Sample
) -> None:
    file = opened(tmp_path, one)
    fill(file, one, 2, 4)
    other = opened(tmp_path, one)
    assert other.read(LENGTHS[0] + LENGTHS[1], 10) == piece(one, 2)[:10]
    fill(other, one, 0)
    assert file.read(0, 10) == one.plain[:10], "what one process writes, another reads at once"
    assert fill(file, one, 0, 2) == 0
    file.close()
    other.close()
    again = opened(tmp_path, one)
    assert list(again.map.states) == [PRESENT, EMPTY, PRESENT, EMPTY, PRESENT, EMPTY]
    assert again.map.present_bytes == 10 * KIB + 64 * KIB + 200 * KIB
    again.close()


def test_evicted_spans_are_gone_and_their_blocks_freed_while_neighbours_stay(
    tmp_path: Path, one: Sample
) -> None:
    file = opened(tmp_path, one)
    fill(file, one, *range(6))
    before = allocated(file)
    assert file.evict([4, 2]) == (2, 264 * KIB)
    assert before - allocated(file) >= 256 * KIB
    assert file.read(0, LENGTHS[0] + LENGTHS[1] + 1) is None
    for number in (0, 1, 3, 5):
        assert file.read_span(number) == piece(one, number)
    file.evict(range(6))
    assert allocated(file) == 0, "blocks that several spans share are freed with the last of them"
    file.close()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hole_punching_a_device_is_evicted_whole(
    tmp_path: Path, one: Sample, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(extents, "punch", cannot)
    file = opened(tmp_path, one)
    fill(file, one, *range(6))
    assert file.evict([1]).freed == len(one.plain)
    assert allocated(file) == 0
    assert file.read_span(0) is None
    fill(file, one, 0)
    assert file.read_span(0) == piece(one, 0)
    file.close()


Damage = Callable[[Path], None]


def _scribble(name: str, at: int, data: bytes) -> Damage:
    def damage(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            file.write(data)

    return damage


def _truncate(name: str, size: int) -> Damage:
    return lambda directory: os.truncate(directory / name, size)


def _copy_of_data(directory: Path) -> None:
    data = (directory / "data").read_bytes()
    (directory / "data").rename(directory / "data.old")
    (directory / "data").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_scribble("map", 0, b"X"), id="magic"),
        pytest.param(_scribble("map", 8, b"\7"), id="version"),
        pytest.param(_scribble("map", 12, b"\2"), id="form"),
        pytest.param(_scribble("map", 16, bytes(32)), id="key"),
        pytest.param(_scribble("map", 512 + 16 + 8, b"\1"), id="layout"),
        pytest.param(_scribble("map", -40, b"\1"), id="digest of the last record"),
        pytest.param(_scribble("map", -8, b"\1"), id="state of an absent span"),
        pytest.param(_scribble("map", -8, b"\x55"), id="impossible state"),
        pytest.param(_truncate("map", 600), id="truncated map"),
        pytest.param(_truncate("map", 100), id="truncated header"),
        pytest.param(_truncate("data", 1), id="truncated data"),
        pytest.param(_copy_of_data, id="other data file"),
        pytest.param(lambda directory: (directory / "data").unlink(), id="no data file"),
    ],
)
def test_a_map_that_does_not_match_is_discarded_with_its_data(
    tmp_path: Path, one: Sample, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    file = opened(tmp_path, one)
    # The digest test wants the last record present, the state test wants it absent.
    fill(file, one, *range(5 if "state" in os.environ["PYTEST_CURRENT_TEST"] else 6))
    file.close()
    damage(file.directory)
    again = opened(tmp_path, one)
    assert list(again.map.states) == [EMPTY] * 6
    assert allocated(again) == 0
    assert "discarding" in caplog.text
    fill(again, one, 0)
    again.close()
    last = opened(tmp_path, one)
    assert last.read_span(0) == piece(one, 0)
    last.close()


def test_maintenance_refuses_a_map_with_a_damaged_layout(tmp_path: Path, one: Sample) -> None:
    """It does not know the device, and would punch the wrong range of it."""
    file = opened(tmp_path, one)
    fill(file, one, 0)
    file.close()
    _scribble("map", 512 + 16 + 8, b"\1")(file.directory)
    with pytest.raises(MapMismatch, match="layout"):
        DeviceFile.visit(file.directory)


def test_after_a_boot_spans_are_suspect_until_verified_and_damaged_ones_are_dropped(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, one)
    fill(file, one, 0, 2, 4)
    file.close()
    _scribble("data", LENGTHS[0] + LENGTHS[1] + 1000, b"\0" * 512)(file.directory)
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot id!")
    again = opened(tmp_path, one)
    assert list(again.map.states) == [SUSPECT, EMPTY, SUSPECT, EMPTY, SUSPECT, EMPTY]
    assert again.read(0, 1) is None
    verified = again.verify([0, 2])
    assert (verified.right, verified.dropped, verified.freed) == (1, [2], 64 * KIB)
    assert again.read(0, LENGTHS[0]) == piece(one, 0)
    assert again.read_span(2) is None
    assert again.read_span(4) is None
    again.close()
    third = opened(tmp_path, one)
    assert list(third.map.states) == [PRESENT, EMPTY, EMPTY, EMPTY, SUSPECT, EMPTY], (
        "one boot, one verification"
    )
    third.close()


def test_a_read_that_an_eviction_overtakes_never_returns_the_hole(
    tmp_path: Path, one: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = opened(tmp_path, one), opened(tmp_path, one)
    fill(file, one, *range(6))
    pread, evictions = os.pread, 0

    def pread_after_eviction_and_refill(fd: int, length: int, offset: int) -> bytes:
        nonlocal evictions
        evictions += 1
        other.evict([2])
        data = pread(fd, length, offset)
        if evictions < 3:
            fill(other, one, 2)
        return data

    monkeypatch.setattr(os, "pread", pread_after_eviction_and_refill)
    assert file.read(LENGTHS[0] + LENGTHS[1], 4 * KIB) is None
    assert evictions == 3
    monkeypatch.undo()
    fill(file, one, 2)
    assert file.read_span(2) == piece(one, 2)
    file.close()
    other.close()


@pytest.mark.parametrize("short", [True, False])
def test_a_file_that_cannot_be_read_any_more_is_abandoned(
    tmp_path: Path, one: Sample, short: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = opened(tmp_path, one)
    fill(file, one, *range(6))
    if short:
        os.truncate(file.directory / "data", 5 * KIB)
    else:

        def broken(_fd: int, _length: int, _offset: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pread", broken)
    for _ in range(3):
        assert file.read(0, 10 * KIB) is None
    assert file.abandoned
    assert len(caplog.records) == 1
    file.close()


def test_stored_form_is_addressed_by_the_blob(tmp_path: Path) -> None:
    one = sample([10 * KIB, 20 * KIB], gap=100)
    file = opened(tmp_path, one, Form.STORED)
    span = one.device.spans[1]
    stored = one.blob[span.stored_offset : span.stored_offset + span.stored_length]
    file.write([Fill(1, stored, span.digest)])
    assert file.read_span(1) == stored
    assert (file.directory / "data").stat().st_size == len(one.blob)
    file.close()
    plain = opened(tmp_path, one, Form.PLAIN)
    assert plain.map.on_disk() == [], "the other form is another device"
    plain.close()


def test_an_empty_device_can_be_cached(tmp_path: Path) -> None:
    one = sample([], codecs=())
    file = opened(tmp_path, one)
    assert file.read(0, 0) == b""
    assert file.map.on_disk() == []
    file.close()


def test_last_uses_are_noted_for_other_processes(tmp_path: Path, one: Sample) -> None:
    file, other = opened(tmp_path, one), opened(tmp_path, one)
    fill(file, one, *range(6))
    written = [used for _, used, _ in other.held()]
    file.read(0, 10)
    assert [used for _, used, _ in other.held()] == written
    file.close()
    used = [used for _, used, _ in other.held()]
    assert used[0] > written[0]
    assert used[1:] == written[1:]
    other.close()


def test_a_large_device_stays_sparse(tmp_path: Path) -> None:
    one = sample([MIB] * 20)
    file = opened(tmp_path, one)
    fill(file, one, 19)
    assert allocated(file) <= MIB + 64 * KIB
    file.close()
