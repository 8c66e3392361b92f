"""The mounts of the daemon, in the process of the test."""

from pathlib import Path
from typing import Any, cast

import pytest
import trio

from tests.daemon.test_daemon import to_registry
from veneer.daemon import holdings as holdings_module
from veneer.daemon.holdings import Holdings
from veneer.daemon.request import MountRequest
from veneer.daemon.residents import Residents
from veneer.errors import MountError
from veneer.events import silent
from veneer.image import Image
from veneer.mount.base import Choice
from veneer.mount.resident import Guards
from veneer.mount.state import mount_records
from veneer.mount.watch import MountTableWatch
from veneer.settings import Settings
from veneer.testing.registry import scripted_registry

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


@pytest.mark.parametrize("open_already", [False, True])
async def test_who_leaves_just_as_the_image_has_been_opened_is_no_user_of_it(
    workplace: Path,
    settings: Settings,
    image: str,
    open_already: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = holdings_module.load_image
    async with scripted_registry(to_registry(workplace)) as registry, trio.open_nursery() as nursery:
        name, holdings = f"{registry.host}/team/app:lazy", Holdings(nursery)
        others = [await holdings.take(name, settings, silent, "default")] if open_already else []
        with trio.CancelScope() as scope:

            async def load_and_leave(*arguments: Any) -> Image:
                loaded = await load(*arguments)
                scope.cancel()
                return loaded

            monkeypatch.setattr(holdings_module, "load_image", load_and_leave)
            await holdings.take(name, settings, silent, "another")
        assert scope.cancelled_caught
        monkeypatch.undo()
        holding, _ = await holdings.take(name, settings, silent)
        assert await holding.store.read(holding.attached[0], 0, 512)
        for user in (holding, *(other for other, _ in others)):
            holdings.give_back(user)
        with trio.fail_after(20):
            await holding.closed.wait()
        nursery.cancel_scope.cancel()
