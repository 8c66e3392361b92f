"""What is found on this machine, and what would be found on worse ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from veneer.daemon.doctor import Check, examine
from veneer.mount import access
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in examine(settings)}


def test_this_machine_can_mount(settings: Settings) -> None:
    checks = found(settings)
    assert {check.status for check in checks.values()} <= {"ok", "info", "warn"}
    for name in ("kernel", "/dev/fuse", "libfuse", "fusermount3", "cache directory", "overlayfs", "runc"):
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
