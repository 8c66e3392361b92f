"""Trees that containers share, kept for the next one: what is spared, and that nothing is in anybody's way."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.daemon.layouts import LARGE, busybox_layer, lazy_image, settings_in
from tests.daemon.test_daemon import STEP, another_worker, environment, kill, processes, read, umount
from tests.waiting import delete, eventually
from veneer.container.options import ContainerOptions
from veneer.daemon import client, lifecycle, mounts
from veneer.daemon.client import RunRequest, RunResult
from veneer.daemon.request import MountRequest
from veneer.errors import Unavailable
from veneer.mount.kernel import mounts_at
from veneer.mount.state import mount_records
from veneer.settings import Settings
from veneer.testing.registry import scripted_registry
from veneer.testing.tars import TarItem

pytestmark = [pytest.mark.root]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that the daemon serves."""
    return replace(settings, backend="erofs-fanotify")


def mount(image: str, mountpoint: Path, settings: Settings, record: bool = False) -> None:
    request = MountRequest.create(image, mountpoint, settings, writable=True, record=record)
    client.mount_image(request)


def run(image: str, settings: Settings, *words: str) -> RunResult:
    result = client.run_image(RunRequest(image, ContainerOptions(arguments=words)), settings)
    assert result.exit_code == 0
    return result


def daemon(settings: Settings) -> dict[str, Any]:
    found = mounts.list_mounts(settings.run_dir).daemon
    assert found is not None
    return found


def trees(settings: Settings) -> list[dict[str, Any]]:
    return list(daemon(settings)["trees"])


def events(settings: Settings) -> dict[str, int]:
    return dict(daemon(settings)["events"])


def kill_worker(settings: Settings) -> None:
    """Kill it, and wait for another one."""
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)


def file_system_of(mountpoint: Path, settings: Settings) -> int:
    """What the tree of a mount is on."""
    (lower,) = (one.lower for one in mount_records(settings.run_dir) if one.mountpoint == mountpoint)
    assert lower is not None
    return lower.stat().st_dev


def data_files(settings: Settings) -> list[Path]:
    return list((settings.cache_dir / "devices").glob("*/data"))


def pins(settings: Settings) -> list[Path]:
    return list((settings.cache_dir / "devices").glob("*/mounted"))


def test_the_second_start_asks_the_kernel_and_the_registry_for_nothing(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        (workplace / "repositories/team").mkdir(parents=True)
        (workplace / "layout").rename(workplace / "repositories/team/app")
        async with scripted_registry(workplace / "repositories") as registry:
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(run, name, settings)
            (tree,) = await trio.to_thread.run_sync(trees, settings)
            assert (tree["users"], tree["places"]) == (0, 1)
            assert tree["idle_s"] is not None
            before, asked = await trio.to_thread.run_sync(events, settings), len(registry.requests)
            result = await trio.to_thread.run_sync(run, name, settings)
            after = await trio.to_thread.run_sync(events, settings)
            assert (after["events"], after["held"]) == (before["events"], 1), "all of it was in memory"
            assert [record.path for record in registry.requests[asked:]] == ["/v2/team/app/manifests/lazy"]
            assert result.requests == 1
            (tree,) = await trio.to_thread.run_sync(trees, settings)
            assert tree["places"] == 2
            digest = name.replace(":lazy", f"@{result.mount.digest}")
            asked = len(registry.requests)
            await trio.to_thread.run_sync(run, digest, settings)
            assert len(registry.requests) == asked, "a digest needs no question"

    trio.run(main)


def test_places_share_one_file_system_and_nothing_else(workplace: Path, settings: Settings, image: str) -> None:
    one, two = workplace / "one", workplace / "two"
    mount(image, one, settings)
    mount(image, two, settings)
    assert file_system_of(one, settings) == file_system_of(two, settings)
    (one / "etc/hello").write_bytes(b"other")
    (one / "etc/passwd").unlink()
    assert (two / "etc/hello").read_bytes() == b"hello\n"
    assert (two / "etc/passwd").exists()
    umount(one, settings)
    assert [record.mountpoint for record in mount_records(settings.run_dir)] == [two]
    assert (two / "large").read_bytes() == LARGE
    umount(two, settings)
    mount(image, one, settings)
    assert (one / "etc/hello").read_bytes() == b"hello\n"
    umount(one, settings)


def test_a_place_that_is_detached_while_others_have_the_tree(
    workplace: Path, settings: Settings, image: str
) -> None:
    one, two = workplace / "one", workplace / "two"
    mount(image, one, settings)
    mount(image, two, settings)
    with (one / "large").open("rb") as user:
        umount(one, settings, lazy=True)
        kinds = [found.record.kind for found in mounts.list_mounts(settings.run_dir).mounts]
        assert sorted(kinds) == ["detached", "mount"]
        umount(two, settings)
        lifecycle.let_go(settings.run_dir)
        assert os.pread(user.fileno(), 4096, 2 * STEP) == LARGE[2 * STEP :][:4096]
        (found,) = mounts.list_mounts(settings.run_dir).mounts
        assert found.record.kind == "detached"
    eventually(lambda: mount_records(settings.run_dir) == [])
    assert not list((settings.cache_dir / "uppers").glob("*"))


def test_a_worker_killed_with_a_kept_tree_leaves_no_mark(
    workplace: Path, settings: Settings, image: str
) -> None:
    run(image, settings, "cat", "/etc/hello")
    assert len(pins(settings)) == 1
    kill_worker(settings)
    for data in data_files(settings):
        read(data, 0)  # an error if the kernel still asks about it, and nobody knows it
    assert trees(settings) == []
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)


def test_a_worker_killed_with_a_shared_tree(workplace: Path, settings: Settings, image: str) -> None:
    one, two, three = (workplace / name for name in ("one", "two", "three"))
    mount(image, one, settings)
    mount(image, two, settings)
    kill_worker(settings)
    assert read(one / "large", 0) == LARGE[:4096]
    assert read(two / "large", 2 * STEP) == LARGE[2 * STEP :][:4096]
    umount(one, settings)
    assert [record.mountpoint for record in mount_records(settings.run_dir)] == [two]
    mount(image, three, settings)
    assert file_system_of(three, settings) != file_system_of(two, settings), "it gets no more places"
    assert (two / "large").read_bytes() == LARGE
    umount(two, settings)
    umount(three, settings)
    lifecycle.let_go(settings.run_dir)
    eventually(lambda: events(settings)["held"] == 0)
    assert pins(settings) == []


@pytest.mark.parametrize("how", ["restart", "stop"])
def test_the_end_of_a_worker_lets_go_of_kept_trees(
    workplace: Path, settings: Settings, image: str, how: str
) -> None:
    run(image, settings, "true")
    if how == "restart":
        lifecycle.restart_daemon(settings.run_dir)
    else:
        assert lifecycle.stop_daemon(settings.run_dir)
    assert pins(settings) == []
    run(image, settings, "true")


def test_looking_after_the_cache_ends_what_is_kept(workplace: Path, settings: Settings, image: str) -> None:
    for command in ("gc", "check", "clear"):
        run(image, settings, "true")
        assert len(trees(settings)) == 1
        subprocess.run(
            [sys.executable, "-m", "veneer", "cache", command], env=environment(settings), check=True
        )
        assert trees(settings) == []
        assert pins(settings) == []
    assert data_files(settings) == []
    run(image, settings, "cat", "/etc/hello")


@pytest.mark.parametrize("pull", ["always", "missing"])
def test_a_cache_that_is_deleted_is_not_filled_any_more(
    workplace: Path, settings: Settings, image: str, pull: str
) -> None:
    settings = replace(settings, pull=pull)
    for pattern in ("cache", "cache/devices", "cache/devices/[!.]*"):
        run(image, settings, "cat", "/etc/hello")
        for deleted in list(workplace.glob(pattern)):
            delete(deleted)
        run(image, settings, "cat", "/etc/hello")
        assert data_files(settings), "a tree over deleted files would go on filling those"
    (settings.cache_dir / "devices").rename(workplace / "aside")
    run(image, settings, "cat", "/etc/hello")
    assert data_files(settings)


def test_another_quota_ends_what_is_kept(workplace: Path, settings: Settings, image: str) -> None:
    run(image, settings, "true")
    mount(image, workplace / "mnt", replace(settings, cache_quota=1 << 29))
    (tree,) = trees(settings)
    assert tree["places"] == 1
    umount(workplace / "mnt", settings)


def test_what_is_kept_gives_way_to_what_is_read(workplace: Path, settings: Settings) -> None:
    """Devices that were read lately are not evicted from under a mount: it has to go first."""
    names: list[str] = []

    async def make() -> None:
        for number in range(2):
            (workplace / f"image{number}").mkdir()
            layer = busybox_layer(TarItem(b"large", content=bytes([number]) + LARGE))
            names.append(await lazy_image(workplace / f"image{number}", settings_in(workplace), [layer]))

    trio.run(make)
    small = replace(settings, cache_quota=9_000_000)
    mount(names[0], workplace / "mnt", small)
    assert (workplace / "mnt/large").read_bytes() == bytes([0]) + LARGE
    umount(workplace / "mnt", small)
    assert len(trees(small)) == 1
    mount(names[1], workplace / "mnt", small)
    assert (workplace / "mnt/large").read_bytes() == bytes([1]) + LARGE
    (tree,) = trees(small)
    assert tree["users"] == 1
    eventually(lambda: len(pins(small)) == 1)  # when the other file system has gone
    umount(workplace / "mnt", small)


def test_a_tag_that_has_moved(workplace: Path, settings: Settings) -> None:
    (workplace / "image").mkdir()

    async def publish(text: bytes) -> str:
        layer = busybox_layer(TarItem(b"etc/hello", content=text))
        return await lazy_image(workplace / "image", settings_in(workplace), [layer])

    for text in (b"first\n", b"second\n"):
        name = trio.run(publish, text)
        mount(name, workplace / "mnt", settings)
        assert (workplace / "mnt/etc/hello").read_bytes() == text
        umount(workplace / "mnt", settings)
    assert len(trees(settings)) == 2


def test_with_pull_missing_a_tag_is_what_anybody_has_seen_it_name_last(
    workplace: Path, settings: Settings
) -> None:
    (workplace / "image").mkdir()
    content = replace(settings, pull="missing")

    async def publish(text: bytes) -> str:
        layer = busybox_layer(TarItem(b"etc/hello", content=text))
        return await lazy_image(workplace / "image", settings_in(workplace), [layer])

    def read_hello(name: str, settings: Settings) -> bytes:
        mount(name, workplace / "mnt", settings)
        try:
            return (workplace / "mnt/etc/hello").read_bytes()
        finally:
            umount(workplace / "mnt", settings)

    name = trio.run(publish, b"first\n")
    assert [read_hello(name, content) for _ in range(2)] == [b"first\n"] * 2
    trio.run(publish, b"second\n")
    assert read_hello(name, content) == b"first\n", "nobody has asked since"
    assert read_hello(name, settings) == b"second\n"
    assert [read_hello(name, content) for _ in range(2)] == [b"second\n"] * 2


def test_each_start_of_an_image_has_the_user_that_was_asked_for(
    workplace: Path, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    (workplace / "image").mkdir()
    accounts = b"root:x:0:0:root:/root:/bin/sh\nbob:x:1234:100:Bob:/home:/bin/sh\n"
    layer = busybox_layer(TarItem(b"etc/passwd", content=accounts))
    name = trio.run(lazy_image, workplace / "image", settings_in(workplace), [layer])
    for user in ("", "bob", "77", "", "bob"):
        options = ContainerOptions(arguments=("id", "-u"), user=user)
        assert client.run_image(RunRequest(name, options), settings).exit_code == 0
    assert capfd.readouterr().out.split() == ["0", "1234", "77", "0", "1234"]


def test_a_place_that_was_never_written_down_is_undone(workplace: Path, settings: Settings, image: str) -> None:
    """As of a worker that dies while it makes one: whoever asked for it has had no answer."""
    one, two = workplace / "one", workplace / "two"
    mount(image, one, settings)
    mount(image, two, settings)
    (record,) = (record for record in mount_records(settings.run_dir) if record.mountpoint == one)
    (settings.run_dir / "mounts" / record.id / "resident.json").unlink()
    kill_worker(settings)
    assert [record.mountpoint for record in mount_records(settings.run_dir)] == [two]
    assert not mounts_at(one)
    assert record.lower is not None
    assert not mounts_at(record.lower)
    assert (two / "large").read_bytes() == LARGE
    umount(two, settings)


def test_what_is_recorded_has_a_tree_of_its_own(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    mount(image, workplace / "recorded", settings, record=True)
    assert file_system_of(workplace / "recorded", settings) != file_system_of(workplace / "mnt", settings)
    umount(workplace / "recorded", settings)
    umount(workplace / "mnt", settings)
    assert not mounts_at(workplace / "mnt")


def test_with_pull_missing_a_tag_that_is_known_is_not_asked_for(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        (workplace / "repositories/team").mkdir(parents=True)
        (workplace / "layout").rename(workplace / "repositories/team/app")
        content = replace(settings, pull="missing")
        async with scripted_registry(workplace / "repositories") as registry:
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(run, name, content)
            asked = [record.path for record in registry.requests]
            assert "/v2/team/app/manifests/lazy" in asked, "it was missing"
        # There is no registry any more.
        assert (await trio.to_thread.run_sync(run, name, content)).requests == 0
        lifecycle.let_go(settings.run_dir)
        assert (await trio.to_thread.run_sync(run, name, content)).requests == 0
        with pytest.raises(Unavailable):
            await trio.to_thread.run_sync(run, name, replace(settings, read_deadline_s=0.5))

    trio.run(main)
