"""What one worker leaves to the next, and what it is worth: after a reboot, and when it is damaged."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from veneer.daemon.restorable import Restorable, is_there, note_cache, noted_caches
from veneer.errors import MountError
from veneer.mount.state import this_process


def a_place(tmp_path: Path, boot: str) -> Any:
    return SimpleNamespace(tree=tmp_path, record=SimpleNamespace(process=SimpleNamespace(boot=boot)))


def test_a_file_system_of_that_name_is_another_one_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", {"/sys/fs/erofs": ["erofs-1", "features"]}.__getitem__)
    existing, other, none = (
        Restorable(names, None, None)  # type: ignore[arg-type] # nobody asks for its index
        for names in (("erofs-1", "erofs-3"), ("erofs-2",), ())
    )
    now = a_place(tmp_path, this_process().boot)
    assert is_there(now, existing)
    assert not is_there(now, other)
    assert not is_there(now, none)
    assert not is_there(now, None)
    assert not is_there(a_place(tmp_path, "another boot"), existing)


def test_all_cache_directories_are_remembered_once(tmp_path: Path) -> None:
    assert noted_caches(tmp_path) == []
    one, two = tmp_path / "one", tmp_path / "two \N{SNOWMAN}"
    for cache_dir in (one, two, one, two):
        note_cache(tmp_path, cache_dir)
    assert noted_caches(tmp_path) == [one, two]


@pytest.mark.parametrize("damage", [b"", b"{", b"5", b"\xff"], ids=repr)
def test_a_damaged_note_of_cache_directories_is_written_anew(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    note_cache(tmp_path, tmp_path / "lost")
    (tmp_path / "caches.json").write_bytes(damage)
    assert noted_caches(tmp_path) == []
    assert "caches.json" in caplog.text
    note_cache(tmp_path, tmp_path / "one")
    assert noted_caches(tmp_path) == [tmp_path / "one"]


def test_a_run_directory_that_takes_no_note_is_an_error(tmp_path: Path) -> None:
    os.mkdir(tmp_path / ".caches.json")
    with pytest.raises(MountError, match="cannot write below"):
        note_cache(tmp_path, tmp_path / "one")
