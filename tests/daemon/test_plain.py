"""Images without an index, mounted: by the daemon, by a process, twice at once, and by a daemon that dies."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import trio

from tests.convert.layouts import Layout
from tests.daemon.layouts import BUSYBOX, LARGE, busybox_layer
from tests.daemon.test_daemon import (
    another_worker,
    daemon_status,
    environment,
    kill,
    mount,
    nothing_mounted,
    processes,
    read,
    umount,
)
from tests.registry.servers import docker_registry
from tests.waiting import eventually
from veneer.container.options import ContainerOptions
from veneer.daemon import mounts
from veneer.daemon.client import RunRequest, run_image
from veneer.daemon.lifecycle import start_daemon
from veneer.daemon.report import MountReport
from veneer.daemon.timed import timing_of
from veneer.errors import IntegrityError
from veneer.oci.descriptor import Descriptor
from veneer.registry.client import RegistryRepository
from veneer.registry.keychain import Keychain
from veneer.settings import Settings
from veneer.source.layout import OCILayout
from veneer.testing.actions import FlipBit, Hold
from veneer.testing.images import write_image
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem, tar
from veneer.transport import Transport

pytestmark = [pytest.mark.root, pytest.mark.network]

P = ParamSpec("P")
T = TypeVar("T")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, backend="erofs-fanotify")


@pytest.fixture(scope="session")
def plain_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that a registry can serve: ``app``, tagged gzip and zstd."""
    directory = tmp_path_factory.mktemp("plain")
    layers = [
        busybox_layer(TarItem(b"etc/passwd", content=b"root:x:0:0::/root:/bin/sh\n")),
        tar([TarItem(b"etc/hello", content=b"hello\n"), TarItem(b"large", content=LARGE)]),
    ]
    for compression in ("gzip", "zstd"):
        write_image(layers, directory / "app", compression, compression, {"Cmd": ["cat", "/etc/hello"]})
    return directory


@pytest.fixture
def repositories(workplace: Path, plain_layout: Path) -> Path:
    shutil.copytree(plain_layout, workplace / "repositories")
    return workplace / "repositories"


def report(settings: Settings, mountpoint: Path) -> MountReport:
    found = [one for one in mounts.list_mounts(settings.run_dir).mounts if one.record.mountpoint == mountpoint]
    assert found[0].report is not None
    return found[0].report


def layer_requests(registry: ScriptedRegistry, repositories: Path, tag: str = "gzip") -> int:
    digests = tuple(layer["digest"] for layer in Layout(repositories / "app").manifest(tag)["layers"])
    return sum(record.path.endswith(digests) for record in registry.asked("GET", "/blobs/"))


async def in_thread(function: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    return await trio.to_thread.run_sync(partial(function, *args, **more))


@pytest.mark.parametrize(
    ("backend", "tag"),
    [("erofs-fanotify", "gzip"), ("erofs-fanotify", "zstd"), ("erofs-fuse", "gzip"), ("fuse", "zstd")],
)
def test_the_second_mount_fetches_nothing(
    workplace: Path, settings: Settings, repositories: Path, backend: str, tag: str
) -> None:
    settings = replace(settings, backend=backend)
    point = workplace / "mnt"

    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            image = f"{registry.host}/app:{tag}"
            for origin, requests in (("streamed", 2), ("local", 0)):
                del registry.requests[:]
                info = await in_thread(mount, image, point, settings)
                assert info.index_origin == origin
                assert layer_requests(registry, repositories, tag) == requests
                assert await in_thread((point / "large").read_bytes) == LARGE
                told = await in_thread(report, settings, point)
                assert told.index_origin == origin
                record = await in_thread(timing_of, info.id, settings.run_dir)
                stored = sum(device.stored_size for device in record.devices)
                assert record.bytes_fetched == (stored if origin == "streamed" else 0)
                assert all(one.priority == "stream" and one.ready is not None for one in record.ranges)
                assert told.complete == 2
                assert told.store["requests"] == 0
                assert layer_requests(registry, repositories, tag) == requests
                if backend == "erofs-fanotify":
                    # The kernel asked nobody.
                    assert told.kernel["events"] == 0
                await in_thread(mounts.umount, point, settings.run_dir)

    trio.run(main)


def test_a_container_runs_from_a_registry_of_the_distribution(
    workplace: Path, settings: Settings, repositories: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        (workplace / "docker").mkdir()
        async with docker_registry(workplace / "docker") as host, Transport(settings) as transport:
            layout = OCILayout(repositories / "app")
            target = RegistryRepository(
                host, "app", transport=transport, keychain=Keychain(settings), settings=settings
            )
            raw = await layout.manifest("gzip")
            parsed = Layout(repositories / "app").manifest("gzip")
            for entry in (*parsed["layers"], parsed["config"]):
                data = Layout(repositories / "app").file(entry["digest"]).read_bytes()
                await target.push_blob(Descriptor.from_json(entry), partial(BytesIO, data))
            await target.push_manifest(raw.data, raw.descriptor.media_type, "gzip")
            for _ in range(2):
                result = await in_thread(
                    run_image, RunRequest(f"{host}/app:gzip", ContainerOptions()), settings
                )
                assert result.exit_code == 0

    trio.run(main)
    assert capfd.readouterr().out == "hello\nhello\n"


def test_two_mounts_at_once_share_one_download(workplace: Path, settings: Settings, repositories: Path) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            await in_thread(start_daemon, settings.run_dir, idle_exit_s=60)
            async with trio.open_nursery() as nursery:
                for name in ("one", "two"):
                    nursery.start_soon(
                        in_thread, mount, f"{registry.host}/app:gzip", workplace / name, settings
                    )
            assert layer_requests(registry, repositories) == 2

    trio.run(main)
    for name in ("one", "two"):
        assert (workplace / name / "large").read_bytes() == LARGE
        umount(workplace / name, settings)


def test_wrong_bytes_are_never_mounted(workplace: Path, settings: Settings, repositories: Path) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            digest = Layout(repositories / "app").manifest("gzip")["layers"][1]["digest"]
            registry.faults.add(FlipBit(3_000_000), path=digest, count=None)
            with pytest.raises(IntegrityError, match=digest):
                await in_thread(mount, f"{registry.host}/app:gzip", workplace / "mnt", settings)

    trio.run(main)
    assert not (workplace / "mnt").exists()
    nothing_mounted(settings)


def arriving(settings: Settings) -> list[Path]:
    return list((settings.cache_dir / "devices").glob(".arriving-*"))


def test_what_a_worker_was_killed_over_is_made_by_the_next_one_and_nothing_wrong_remains(
    workplace: Path, settings: Settings, repositories: Path
) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            image, held = f"{registry.host}/app:gzip", Hold()
            await in_thread(mount, image.replace("gzip", "zstd"), workplace / "other", settings)
            registry.faults.add(held, path=Layout(repositories / "app").manifest("gzip")["layers"][1]["digest"])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_thread, mount, image, workplace / "mnt", settings)
                await held.arrived.wait()
                before = (await in_thread(processes, settings))["worker"]
                await in_thread(kill, settings, "worker")
                await in_thread(another_worker, settings, before)
                held.release.set()
            # What was mounted before is served by the new worker, which has swept as well.
            assert await in_thread(read, workplace / "other/large", 0, 100) == LARGE[:100]
            assert await in_thread((workplace / "mnt/large").read_bytes) == LARGE
            assert arriving(settings) == []

    trio.run(main)
    for name in ("mnt", "other"):
        umount(workplace / name, settings)


def test_whoever_gives_up_stops_the_download(workplace: Path, settings: Settings, repositories: Path) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            held = Hold()
            registry.faults.add(held, path=Layout(repositories / "app").manifest("gzip")["layers"][1]["digest"])
            command = [sys.executable, "-m", "veneer", "mount", f"{registry.host}/app:gzip"]
            process = await trio.lowlevel.open_process(
                [*command, f"{workplace}/mnt"], env=environment(settings)
            )
            await held.arrived.wait()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 128 + signal.SIGINT
            await in_thread(nothing_mounted, settings)
            await in_thread(eventually, lambda: not arriving(settings))

    trio.run(main)
    assert not (workplace / "mnt").exists()


def test_a_mount_outlives_its_worker_without_the_registry(
    workplace: Path, settings: Settings, repositories: Path
) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            await in_thread(mount, f"{registry.host}/app:gzip", workplace / "mnt", settings)

    trio.run(main)
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    assert daemon_status(settings)["mounts"] == 1
    assert report(settings, workplace / "mnt").complete == 2
    umount(workplace / "mnt", settings)


@pytest.mark.parametrize("command", ["mount", "run"])
def test_what_is_downloaded_is_said_before_it_has_come(
    workplace: Path, settings: Settings, repositories: Path, command: str
) -> None:
    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            await in_thread(start_daemon, settings.run_dir, idle_exit_s=60)
            held = Hold()
            registry.faults.add(held, path=Layout(repositories / "app").manifest("gzip")["layers"][1]["digest"])
            words = [command, f"{registry.host}/app:gzip"]
            if command == "mount":
                words.append(f"{workplace}/mnt")
            # The console script, since `run` goes a short way.
            script = Path(sys.executable).with_name("veneer")
            process = await trio.lowlevel.open_process(
                [script, *words], env=environment(settings), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            assert process.stderr is not None
            said = b""
            with trio.fail_after(30):
                await held.arrived.wait()
                while b"\n" not in said:
                    said += await process.stderr.receive_some()
            size = sum(layer["size"] for layer in Layout(repositories / "app").manifest("gzip")["layers"])
            assert b"has no index: 2 of its 2 layers are downloaded whole" in said
            assert f"{size / (1 << 20):.1f} MiB".encode() in said
            held.release.set()
            assert await process.wait() == 0
        if command == "mount":
            await in_thread(umount, workplace / "mnt", settings)

    trio.run(main)


@pytest.mark.parametrize(
    ("backend", "tag"), [("erofs-fanotify", "gzip"), ("erofs-fanotify", "zstd"), ("fuse", "gzip")]
)
def test_a_quota_that_is_too_small_for_all_layers_costs_time_and_nothing_else(
    workplace: Path, settings: Settings, repositories: Path, backend: str, tag: str
) -> None:
    # What comes last leaves no room for what came first, before anything is mounted.
    settings = replace(settings, backend=backend, cache_quota=len(LARGE) + (1 << 20))

    async def main() -> None:
        async with scripted_registry(repositories) as registry:
            await in_thread(mount, f"{registry.host}/app:{tag}", workplace / "mnt", settings)
            told = await in_thread(report, settings, workplace / "mnt")
            assert told.complete < 2
            assert await in_thread((workplace / "mnt/bin/busybox").read_bytes) == BUSYBOX.read_bytes()
            assert await in_thread((workplace / "mnt/large").read_bytes) == LARGE
            await in_thread(mounts.umount, workplace / "mnt", settings.run_dir)

    trio.run(main)
