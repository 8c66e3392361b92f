"""The mounts of the daemon, in the process of the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import trio
import trio.testing

from tests.daemon.test_daemon import to_registry
from veneer.daemon.holdings import Holding, Holdings
from veneer.daemon.request import MountRequest
from veneer.daemon.residents import Residents
from veneer.daemon.trees import Trees
from veneer.errors import MountError
from veneer.events import silent
from veneer.image import Image
from veneer.image.open import load_image
from veneer.mount.base import Choice
from veneer.mount.resident import Guards, ResidentMounter
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
    async with scripted_registry(to_registry(workplace)) as registry, trio.open_nursery() as nursery:
        name, holdings = f"{registry.host}/team/app:lazy", Holdings(nursery)
        others = [await holdings.take(name, settings, silent, "default")] if open_already else []
        with trio.CancelScope() as scope:

            async def load_and_leave(*arguments: Any) -> Image:
                loaded = await load_image(*arguments)
                scope.cancel()
                return loaded

            monkeypatch.setattr("veneer.daemon.holdings.load_image", load_and_leave)
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


async def test_a_tree_that_is_taken_just_as_its_time_is_over_is_not_let_go_of(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared:
        def __init__(self, _mounter: object, _place: object = None) -> None:
            self.gone, self.over = trio.Event(), trio.Event()

        def rest(self) -> None: ...

        def go_on(self) -> None: ...

        def let_go(self) -> None:
            self.over.set()

        async def keep(self) -> None:
            await self.over.wait()
            self.gone.set()

    class Open:
        def keep(self, _holding: object) -> None: ...

        def give_back(self, _holding: object) -> None: ...

    monkeypatch.setattr("veneer.daemon.trees.SharedTree", Shared)
    holding, taken = cast("Holding", Mock()), trio.Event()

    async def taken_meanwhile(_seconds: float) -> None:
        assert trees.take(holding, lambda: pytest.fail("it is there")) is tree
        taken.set()

    async with trio.open_nursery() as nursery:
        trees = Trees(nursery, cast("Holdings", Open()), lambda _change: None)
        tree = trees.take(holding, cast("Callable[[], ResidentMounter]", lambda: None))
        with monkeypatch.context() as patch:
            patch.setattr(trio, "sleep", taken_meanwhile)
            trees.give_back(tree)
            await taken.wait()
            await trio.testing.wait_all_tasks_blocked()
        assert trees.take(holding, lambda: pytest.fail("it is kept")) is tree
        assert not cast("Any", tree.shared).over.is_set()
        nursery.cancel_scope.cancel()
