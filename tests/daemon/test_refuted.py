"""A sidecar that turns out to be wrong while it is mounted: who has it, and who mounts the image next."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.convert.lies import a_lie, a_stump
from tests.daemon.layouts import settings_in
from tests.daemon.test_daemon import another_worker, kill, mount, processes, to_registry, umount
from tests.waiting import eventually
from veneer.daemon import mounts
from veneer.errors import IntegrityError
from veneer.settings import Settings
from veneer.testing.images import write_image
from veneer.testing.registry import scripted_registry
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root]

RANDOM = random.Random(5)
TEXT = b" ".join(b"%d words" % RANDOM.getrandbits(30) for _ in range(160_000))


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that the daemon serves."""
    return replace(settings, backend="erofs-fanotify")


def origins(settings: Settings) -> list[str]:
    """How the indexes of all mounts were found, by where they are mounted."""
    found = sorted(mounts.list_mounts(settings.run_dir).mounts, key=lambda one: one.record.mountpoint)
    return [one.report.index_origin for one in found if one.report is not None]


def with_sidecar(
    workplace: Path, publish: Callable[[str, Settings], Awaitable[object]], use: Callable[[str], None]
) -> None:
    """Use an image of one file, for which somebody has pushed a sidecar to its registry."""
    write_image([tar([TarItem(b"text", content=TEXT)])], workplace / "layout", "v1", "gzip")

    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:v1"
            await publish(name, settings_in(workplace / "elsewhere"))
            await trio.to_thread.run_sync(use, name)

    trio.run(main)


@pytest.mark.network
def test_the_next_mount_does_without_it_and_another_worker_serves_both(
    workplace: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie, truth = workplace / "lie", workplace / "truth"

    def both(name: str) -> None:
        mount(name, lie, settings, writable=True, complete=True)
        eventually(lambda: list((settings.cache_dir / "refuted").glob("*.json")) != [])
        mount(name, truth, settings, writable=True)
        assert origins(settings) == ["referrer", "streamed"]
        assert (truth / "text").read_bytes() == TEXT
        before = processes(settings)["worker"]
        kill(settings, "worker")
        another_worker(settings, before)
        eventually(lambda: origins(settings) == ["referrer", "local"])
        assert (truth / "text").read_bytes() == TEXT
        for place in (lie, truth):
            umount(place, settings)

    with_sidecar(workplace, partial(a_lie, monkeypatch=monkeypatch), both)


@pytest.mark.network
@pytest.mark.parametrize("backend", ["erofs-fanotify", "erofs-fuse", "fuse"])
def test_one_without_a_tree_costs_one_attempt(
    workplace: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    settings = replace(settings, backend=backend)

    def twice(name: str) -> None:
        with pytest.raises(IntegrityError, match="index of") as caught:
            mount(name, workplace / "mnt", settings)
        assert "try once more" in (caught.value.hint or "")
        mount(name, workplace / "mnt", settings)
        assert origins(settings) == ["streamed"]
        assert (workplace / "mnt/text").read_bytes() == TEXT
        umount(workplace / "mnt", settings)

    with_sidecar(workplace, partial(a_stump, monkeypatch=monkeypatch), twice)
