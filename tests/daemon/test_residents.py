"""The mounts of the daemon, in the process of the test."""

from pathlib import Path
from typing import cast

import pytest
import trio

from veneer.daemon.holdings import Holdings
from veneer.daemon.request import MountRequest
from veneer.daemon.residents import Residents
from veneer.errors import MountError
from veneer.mount.base import Choice
from veneer.mount.resident import Guards
from veneer.mount.state import mount_records
from veneer.mount.watch import MountTableWatch
from veneer.settings import Settings

pytestmark = [pytest.mark.root]


async def test_a_bug_in_one_mount_is_its_error_and_ends_nothing_else(
    workplace: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Holdings, "take", fail)
    async with trio.open_nursery() as nursery:
        residents = Residents(
            settings.run_dir, nursery, cast("Guards", None), MountTableWatch(), workplace / "log"
        )
        request = MountRequest.create("oci:/nowhere:x", workplace / "mnt", settings)
        with pytest.raises(MountError, match="internal error: RuntimeError"):
            await residents.mount(request, Choice("erofs-fanotify", "asked for"))
        assert residents.count == 0
        nursery.cancel_scope.cancel()
    assert mount_records(settings.run_dir) == []
    assert not (workplace / "mnt").exists()
