"""Records of mounts: who may claim a place, whose records are believed, when a process is another one."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.errors import MountError
from veneer.mount import state
from veneer.mount.state import (
    MountRecord,
    claim,
    detach,
    directory_of,
    finish_retiring,
    mount_id,
    mount_records,
    release,
    retire,
    sweep,
    this_process,
)
from veneer.mount.upper import Upper


def record_at(mountpoint: Path) -> MountRecord:
    return MountRecord(mount_id(mountpoint), "mount", "oci:/a", mountpoint, this_process())


def test_a_place_is_claimed_once_until_it_is_released(tmp_path: Path) -> None:
    upper = Upper(tmp_path / "u", tmp_path / "w", private=True)
    name = os.fsdecode(b"m\xff nt")
    record = replace(
        record_at(tmp_path / name), lower=tmp_path / "l", upper=upper, container=("/bin/runc", "c")
    )
    claim(tmp_path, record)
    assert mount_records(tmp_path) == [record]
    with pytest.raises(MountError, match="mounted already"):
        claim(tmp_path, record)
    assert mount_records(tmp_path) == [record]
    release(tmp_path, record)
    release(tmp_path, record)
    assert mount_records(tmp_path) == []
    claim(tmp_path, record)


def test_a_place_can_be_claimed_while_what_was_there_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_at(tmp_path / "mnt")
    (claim(tmp_path, record) / "lower").mkdir()
    remove = state._remove

    def claim_and_remove(directory: Path) -> None:
        place = claim(tmp_path, record)
        assert [path.name for path in place.iterdir()] == ["state.json"], "nothing of the last one"
        remove(directory)

    monkeypatch.setattr(state, "_remove", claim_and_remove)
    release(tmp_path, record)
    assert mount_records(tmp_path) == [record]


def test_a_retired_record_frees_the_place_and_no_longer_names_it(tmp_path: Path) -> None:
    record = record_at(tmp_path / "mnt")
    claim(tmp_path, record)
    retired = retire(tmp_path, record)
    assert mount_records(tmp_path) == [retired]
    assert retired.mountpoint != record.mountpoint
    claim(tmp_path, record)
    assert {found.id for found in mount_records(tmp_path)} == {record.id, retired.id}


def test_whoever_comes_after_a_process_that_died_while_it_freed_a_place_frees_it(tmp_path: Path) -> None:
    record = record_at(tmp_path / "mnt")
    claim(tmp_path, record)
    assert finish_retiring(tmp_path, record) is record
    retired = retire(tmp_path, record)
    assert finish_retiring(tmp_path, retired) is retired
    # The record had been written, and its directory not moved yet.
    directory_of(tmp_path, retired.id).rename(directory_of(tmp_path, record.id))
    (half,) = mount_records(tmp_path)
    assert half.id == record.id
    assert finish_retiring(tmp_path, half) == retired
    assert mount_records(tmp_path) == [retired]
    claim(tmp_path, record)


def test_a_mount_point_that_others_see_goes_with_the_mount(tmp_path: Path) -> None:
    record = replace(record_at(tmp_path / "mnt"), made_mountpoint=True)
    record.mountpoint.mkdir()
    claim(tmp_path, record)
    retired = retire(tmp_path, record, seen_elsewhere=True)
    assert record.mountpoint.is_dir()
    assert mount_records(tmp_path) == [retired]
    detach(retired)
    assert not record.mountpoint.exists()
    alone = replace(record, id="alone")
    record.mountpoint.mkdir()
    claim(tmp_path, alone)
    retire(tmp_path, alone)
    assert not record.mountpoint.exists()


def test_a_process_number_given_to_another_process_is_another_process() -> None:
    process = this_process()
    assert process.alive
    assert not replace(process, start=process.start + 1).alive
    assert not replace(process, boot="another").alive
    assert not replace(process, pid=2**22 + 1).alive


@pytest.mark.root
def test_records_that_others_could_have_written_are_refused(tmp_path: Path) -> None:
    claim(tmp_path, record_at(tmp_path / "mnt"))
    for directory, change in ((tmp_path, 0o777), (tmp_path / "mounts", 0o770)):
        mode = directory.stat().st_mode
        directory.chmod(change)
        with pytest.raises(MountError, match="another user"):
            mount_records(tmp_path)
        with pytest.raises(MountError, match="another user"):
            claim(tmp_path, record_at(tmp_path / "other"))
        directory.chmod(mode)
    os.chown(tmp_path / "mounts", 65534, 65534)
    with pytest.raises(MountError, match="another user"):
        mount_records(tmp_path)


def test_directories_made_here_are_fit_for_records(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        claim(tmp_path / "deep/run", record_at(tmp_path / "mnt"))
    finally:
        os.umask(mask)
    assert len(mount_records(tmp_path / "deep/run")) == 1


def test_damaged_records_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = record_at(tmp_path / "mnt")
    claim(tmp_path, record)
    good = json.loads((directory_of(tmp_path, record.id) / "state.json").read_text())
    for number, text in enumerate(("", "{", "[]", "{}", json.dumps(good | {"process": 1}))):
        (tmp_path / f"mounts/bad{number}").mkdir()
        (tmp_path / f"mounts/bad{number}/state.json").write_text(text)
    assert mount_records(tmp_path) == [record]
    assert len(caplog.records) == 5


def test_what_died_half_way_is_swept(tmp_path: Path) -> None:
    claim(tmp_path, record_at(tmp_path / "mnt"))
    mine, dead = tmp_path / f"mounts/.x.{os.getpid()}", tmp_path / f"mounts/.x.{2**22 + 1}"
    for directory in (mine, dead):
        directory.mkdir()
    sweep(tmp_path)
    assert (mine.exists(), dead.exists()) == (True, False)
    assert len(mount_records(tmp_path)) == 1
