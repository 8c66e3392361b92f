"""Places of mounts: what detaches a mount and what cleans up after it may come in any order."""

from pathlib import Path

import pytest

from tests.daemon.layouts import settings_in
from veneer.daemon.place import Place
from veneer.daemon.request import MountRequest
from veneer.errors import MountError
from veneer.mount.state import directory_of, mount_records


def request_in(directory: Path) -> MountRequest:
    return MountRequest.create("oci:/a", directory / "mnt", settings_in(directory))


def test_a_mount_that_ended_while_it_was_being_detached_leaves_the_next_one_alone(tmp_path: Path) -> None:
    gone = Place.claimed(request_in(tmp_path))
    gone.release()
    gone.retire()
    assert mount_records(tmp_path / "run") == []
    there = Place.claimed(request_in(tmp_path))
    gone.retire()
    assert mount_records(tmp_path / "run") == [there.record]
    there.retire()
    there.retire()
    assert [record.kind for record in mount_records(tmp_path / "run")] == ["detached"]
    another = Place.claimed(request_in(tmp_path))
    there.release()
    assert mount_records(tmp_path / "run") == [another.record]
    another.release()
    assert list((tmp_path / "run/mounts").glob("[!.]*")) == []


def test_a_place_that_cannot_be_freed_is_an_error_of_that_mount(tmp_path: Path) -> None:
    place = Place.claimed(request_in(tmp_path))
    directory = directory_of(tmp_path / "run", place.record.id)
    directory.rename(tmp_path / "elsewhere")
    with pytest.raises(MountError, match="cannot free the place"):
        place.retire()
