"""The backend erofs-fuse over complete layers: the kernel reads them, and nobody may take them away."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from tests.daemon.layouts import busybox_layer, lazy_image, settings_in
from tests.daemon.mounting import clean_stale, ended, log_of, mount, opened, umount
from veneer.daemon import mounts
from veneer.daemon.mounts import MountStatus
from veneer.daemon.report import MountReport
from veneer.errors import MountError
from veneer.image import open_image
from veneer.mount import completion
from veneer.mount.kernel import mounts_at
from veneer.settings import Settings
from veneer.store.maintenance import clear, collect, list_devices
from veneer.store.spanstore import Priority, open_store
from veneer.store.wanted import Range
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root, pytest.mark.fuse]

ONE, TWO = (random.Random(seed).randbytes(3_000_000) for seed in (1, 2))


@pytest.fixture
def settings(workplace: Path) -> Settings:
    return settings_in(workplace, backend="erofs-fuse")


@pytest.fixture
async def image(workplace: Path, settings: Settings) -> str:
    """Of two layers."""
    layers = [busybox_layer(TarItem(b"one", content=ONE)), tar([TarItem(b"two", content=TWO)])]
    return await lazy_image(workplace / "layout", replace(settings, cache_dir=workplace / "other"), layers)


async def complete(image: str, settings: Settings, *layers: int) -> None:
    """Bring and prove some layers of an image."""
    async with open_store(settings) as store, open_image(image, settings) as opened:
        for number in layers:
            attached = store.attach(opened.devices[number], opened.sources[number])
            assert await store.fetch_rest(attached)
            assert await store.prove(attached)


async def status(settings: Settings) -> MountStatus:
    (found,) = (await trio.to_thread.run_sync(mounts.list_mounts, settings.run_dir)).mounts
    return found


async def report(settings: Settings) -> MountReport:
    found = (await status(settings)).report
    assert found is not None
    return found


@contextmanager
def inotify_limit(count: str) -> Iterator[None]:
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    before = limit.read_text()
    limit.write_text(count)
    try:
        yield
    finally:
        limit.write_text(before)


def has_fuse(pid: int) -> bool:
    def opened(path: Path) -> str:
        try:
            return os.readlink(path)
        except FileNotFoundError:  # closed since the directory was read
            return ""

    return "/dev/fuse" in {opened(path) for path in Path(f"/proc/{pid}/fd").iterdir()}


def mounted_devices(settings: Settings) -> int:
    return sum(info.mounted for info in list_devices(settings.cache_dir))


async def test_complete_layers_are_read_without_asking_anybody(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await complete(image, settings, 0, 1)
    info = await mount(image, workplace / "mnt", settings, writable=True)
    assert not has_fuse(info.pid)
    assert (workplace / "mnt/one").read_bytes() == ONE
    assert (workplace / "mnt/two").read_bytes() == TWO
    found = await report(settings)
    assert [layer.direct for layer in found.layers] == [True, True]
    assert (found.kernel["reads"], found.store["reads"], found.kernel["opens"]) == (0, 0, 0)
    monkeypatch.setenv("VENEER_RUN_DIR", str(settings.run_dir))
    assert "2 of 2 layers were complete when it was mounted" in invoke("status").stdout
    await umount(workplace / "mnt", settings.run_dir)
    await ended(info.pid)
    assert mounted_devices(settings) == 0
    assert not list(settings.cache_dir.glob("devices/*/frozen"))


async def test_nothing_takes_complete_layers_from_a_mount(
    workplace: Path, settings: Settings, image: str
) -> None:
    await complete(image, settings, 0, 1)
    await mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/one").read_bytes() == ONE
    assert collect(settings.cache_dir, 0).mounted == 2
    told = invoke("cache", "clear", "--cache-dir", str(settings.cache_dir)).stdout
    assert "left 2 mounted layers alone" in told
    assert (workplace / "mnt/two").read_bytes() == TWO, "nobody had read it before"
    await umount(workplace / "mnt", settings.run_dir)
    assert clear(settings.cache_dir).removed == 2


async def test_of_a_mixture_only_the_incomplete_layer_is_served(
    workplace: Path, settings: Settings, image: str
) -> None:
    await complete(image, settings, 1)
    info = await mount(image, workplace / "mnt", settings)
    with opened(workplace / "mnt/two") as file:
        assert os.pread(file, 5000, 0) == TWO[:5000]
    found = await report(settings)
    assert [layer.direct for layer in found.layers] == [False, True]
    assert found.kernel["reads"] == 0
    assert (workplace / "mnt/one").read_bytes() == ONE
    assert (await report(settings)).kernel["read_bytes"] >= len(ONE)
    assert mounted_devices(settings) == 1
    assert clear(settings.cache_dir).emptied == 1, "the other one is evicted as ever"
    os.kill(info.pid, signal.SIGKILL)
    await ended(info.pid)
    with opened(workplace / "mnt/two") as file:
        assert os.pread(file, 5000, 2_000_000) == TWO[2_000_000:2_005_000]
    assert clear(settings.cache_dir).mounted == 1, "its file system is there still"
    await clean_stale(settings.run_dir)
    assert clear(settings.cache_dir).mounted == 0


async def test_a_mount_stays_right_when_its_process_is_killed(
    workplace: Path, settings: Settings, image: str
) -> None:
    await complete(image, settings, 0, 1)
    info = await mount(image, workplace / "mnt", settings)
    os.kill(info.pid, signal.SIGKILL)
    await ended(info.pid)
    assert (workplace / "mnt/one").read_bytes() == ONE
    with opened(workplace / "mnt/two") as file:
        assert clear(settings.cache_dir).mounted == 2
        await clean_stale(settings.run_dir)
        assert not mounts_at(workplace / "mnt"), "the next command detaches it"
        assert clear(settings.cache_dir).mounted == 2, "it is in use still"
        assert os.pread(file, len(TWO), 0) == TWO
    assert clear(settings.cache_dir).removed == 2


async def test_a_detached_mount_stays_right_for_its_users(
    workplace: Path, settings: Settings, image: str
) -> None:
    await complete(image, settings, 0, 1)
    info = await mount(image, workplace / "mnt", settings)
    with opened(workplace / "mnt/two") as file:
        with pytest.raises(MountError, match="in use"):
            await umount(workplace / "mnt", settings.run_dir)
        await umount(workplace / "mnt", settings.run_dir, lazy=True)
        assert (await status(settings)).record.kind == "detached"
        assert clear(settings.cache_dir).mounted == 2
        assert os.pread(file, len(TWO), 0) == TWO
    await ended(info.pid)
    assert clear(settings.cache_dir).removed == 2


async def test_who_is_left_behind_at_once_reads_on(workplace: Path, settings: Settings, image: str) -> None:
    await complete(image, settings, 0, 1)
    info = await mount(image, workplace / "mnt", settings)
    with opened(workplace / "mnt/two") as file:
        os.kill(info.pid, signal.SIGTERM)
        while mounts_at(workplace / "mnt"):
            await trio.lowlevel.checkpoint()
        os.kill(info.pid, signal.SIGTERM)
        await ended(info.pid)
        assert clear(settings.cache_dir).mounted == 2
        assert os.pread(file, len(TWO), 0) == TWO
    assert clear(settings.cache_dir).removed == 2


async def test_unmounting_by_hand_ends_the_process(workplace: Path, settings: Settings, image: str) -> None:
    await complete(image, settings, 0, 1)
    for writable in (False, True):
        info = await mount(image, workplace / "mnt", settings, writable=writable)
        await trio.run_process(["umount", workplace / "mnt"])
        await ended(info.pid)
        assert not (settings.run_dir / "mounts" / info.id).exists()
    assert mounted_devices(settings) == 0


async def test_when_ends_cannot_be_watched_everything_is_served(
    workplace: Path, settings: Settings, image: str
) -> None:
    await complete(image, settings, 0, 1)
    with inotify_limit("0"):
        info = await mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/one").read_bytes() == ONE
    assert "complete devices are served like all others cause='cannot watch for the ends of mounts" in log_of(
        info
    )
    assert (await report(settings)).direct == 0
    assert clear(settings.cache_dir).mounted == 0
    await umount(workplace / "mnt", settings.run_dir)


async def test_what_has_been_read_completely_is_proven_for_the_next_mount(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "_QUIET_S", 0.01)
    async with open_store(settings) as store, open_image(image, settings) as found:
        attached = [store.attach(*pair) for pair in zip(found.devices, found.sources, strict=True)]
        for device in attached:
            await store.bring([Range(device, 0, device.size)], priority=Priority.READAHEAD)
            assert device.all_present
        assert not any(device.complete for device in attached)
        with trio.fail_after(30):
            await completion.prove_when_quiet(store, attached)
        assert all(device.complete for device in attached)
