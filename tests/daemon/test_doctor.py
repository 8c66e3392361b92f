"""What is found on this machine, and what would be found on worse ones."""

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.daemon import doctor
from veneer.daemon.doctor import Check, examine
from veneer.mount import access
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in examine(settings)}


def test_this_machine_can_mount(settings: Settings) -> None:
    checks = found(settings)
    assert {check.status for check in checks.values()} <= {"ok", "info", "warn"}
    for name in (
        "kernel",
        "/dev/fuse",
        "libfuse",
        "fusermount3",
        "cache directory",
        "overlayfs",
        "runc",
        "backend erofs-fanotify",
    ):
        assert checks[name].status == "ok", checks[name]
    assert not settings.cache_dir.exists(), "nothing is changed"


def test_what_is_missing_is_said_with_a_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(access, "FUSE_DEVICE", tmp_path / "fuse")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "file").touch()
    checks = found(replace(settings, cache_dir=tmp_path / "file/cache"))
    for name in ("/dev/fuse", "cache directory"):
        assert (checks[name].status, bool(checks[name].hint)) == ("fail", True), checks[name]
    assert checks["fusermount3"].status == "warn"
    assert checks["fusermount3"].hint


def test_a_backend_that_does_not_work_is_said_with_a_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = found(replace(settings, cache_dir=Path("/dev/shm/cache")))
    backend = checks["backend erofs-fanotify"]
    assert backend.status == "info"
    assert "cannot watch files in /dev/shm" in backend.detail
    assert "ext4, xfs or btrfs" in (backend.hint or "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found(settings)["backend erofs-fanotify"].detail == "needs root"


def test_limits_are_told_when_they_are_low(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not {"descriptors", "fanotify"} & found(settings).keys()
    monkeypatch.setattr(doctor, "_FANOTIFY_LIMITS", tmp_path)
    (tmp_path / "max_user_groups").write_text("2\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    checks = found(settings)
    assert "500 readers" in checks["descriptors"].detail
    assert checks["fanotify"].detail.startswith("only 2 groups")
