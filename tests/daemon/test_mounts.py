"""Mounts in the background: from the request to what is left after the process is killed."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.invoking import invoke
from tests.convert.layouts import Layout
from tests.daemon.layouts import LARGE
from tests.daemon.mounting import clean_stale, ended, log_of, mount, opened, umount
from tests.processes import kill_at_once
from veneer.daemon import mounts
from veneer.daemon.ask import MOUNT_SOCKET, Request, ask
from veneer.daemon.failure import error_from_json, error_to_json
from veneer.daemon.mounts import MountStatus
from veneer.daemon.request import MountRequest
from veneer.errors import IntegrityError, MountError, NotFound, UsageError, VeneerError
from veneer.events import Reporter, silent
from veneer.mount.kernel import mount_table, mounts_at
from veneer.mount.state import mount_records
from veneer.settings import Settings
from veneer.testing.actions import Hold
from veneer.testing.registry import scripted_registry

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture(params=["fuse", "erofs-fuse"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Everything here holds for every backend."""
    return replace(settings, backend=str(request.param))


async def list_mounts(run_dir: Path) -> list[MountStatus]:
    return (await trio.to_thread.run_sync(mounts.list_mounts, run_dir)).mounts


def left(directory: Path) -> list[Path]:
    """What a finished mount may not leave."""
    return [
        path
        for name in ("run/mounts", "cache/uppers")
        for path in (directory / name).glob("*")
        if path.name not in (".lock", ".claim")
    ]


def mounted_below(directory: Path) -> list[Path]:
    return [entry.mountpoint for entry in mount_table() if directory in entry.mountpoint.parents]


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "VENEER_CACHE_DIR": str(settings.cache_dir),
        "VENEER_RUN_DIR": str(settings.run_dir),
        "VENEER_BACKEND": settings.backend,
    }


async def test_a_mount_lives_on_its_own_and_ends_on_request(
    workplace: Path, settings: Settings, image: str
) -> None:
    info = await mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    assert os.getsid(info.pid) != os.getsid(0), "not of this session"
    for fd in (0, 1):
        assert os.readlink(f"/proc/{info.pid}/fd/{fd}") == "/dev/null"
    assert stat.S_IMODE((Path(info.log).parent / "control.sock").stat().st_mode) == 0o600
    assert "mounted image=" in log_of(info)

    (found,) = await list_mounts(settings.run_dir)
    assert (found.record.image, found.record.mountpoint) == (image, workplace / "mnt")
    assert found.report is not None
    assert found.report.digest == info.digest
    assert not found.report.writable
    (layer,) = found.report.layers
    assert 0 < layer.cached < layer.size, "only what was read"
    assert found.report.kernel["reads"] >= 1
    assert found.report.store["bytes_fetched"] < layer.size

    await umount(workplace / "mnt", settings.run_dir)
    assert not (workplace / "mnt").exists(), "made for the mount, gone with it"
    assert not left(workplace)
    assert await list_mounts(settings.run_dir) == []


async def test_a_second_mount_fetches_nothing(workplace: Path, settings: Settings, image: str) -> None:
    for turn in range(2):
        await mount(image, workplace / "mnt", settings)
        assert (workplace / "mnt/large").read_bytes() == LARGE
        (found,) = await list_mounts(settings.run_dir)
        assert found.report is not None
        assert (found.report.store["requests"] == 0) == (turn == 1)
        await umount(workplace / "mnt", settings.run_dir)


async def test_what_is_written_is_kept_only_where_the_user_says(
    workplace: Path, settings: Settings, image: str
) -> None:
    for upper in (None, workplace / "kept"):
        await mount(image, workplace / "mnt", settings, writable=True, upper=upper)
        (workplace / "mnt/etc/new").write_text("new")
        await umount(workplace / "mnt", settings.run_dir)
        assert not left(workplace)
    assert (workplace / "kept/etc/new").read_text() == "new"
    await mount(image, workplace / "mnt", settings, upper=workplace / "kept")
    assert (workplace / "mnt/etc/new").read_text() == "new"
    await umount(workplace / "mnt", settings.run_dir)


@pytest.mark.parametrize("writable", [False, True])
async def test_after_kill_9_the_next_command_cleans_up(
    workplace: Path, settings: Settings, image: str, writable: bool
) -> None:
    info = await mount(image, workplace / "mnt", settings, writable=writable)
    os.kill(info.pid, signal.SIGKILL)
    await ended(info.pid)
    with pytest.raises(OSError) as caught, opened(workplace / "mnt/large") as large:
        os.pread(large, 10, 3 << 20)
    assert caught.value.errno == (errno.ENOTCONN if settings.backend == "fuse" else errno.EIO)
    stale = await clean_stale(settings.run_dir)
    assert [record.id for record in stale] == [info.id]
    assert not mounts_at(workplace / "mnt")
    assert not left(workplace)
    await mount(image, workplace / "mnt", settings)
    await umount(workplace / "mnt", settings.run_dir)


async def test_a_read_under_way_at_kill_9_is_an_error(workplace: Path, settings: Settings, image: str) -> None:
    """Not zeros, neither then nor later; what was read before stays right where the kernel has it."""
    (workplace / "repositories/team").mkdir(parents=True)
    (workplace / "layout").rename(workplace / "repositories/team/app")
    outcomes: list[bytes | int | None] = []

    def read(offset: int) -> None:
        try:
            with opened(workplace / "mnt/large") as large:
                outcomes.append(os.pread(large, 5000, offset))
        except OSError as error:
            outcomes.append(error.errno)

    async with scripted_registry(workplace / "repositories") as registry:
        info = await mount(f"{registry.host}/team/app:lazy", workplace / "mnt", settings)
        await trio.to_thread.run_sync(read, 0)
        assert outcomes.pop() == LARGE[:5000]
        held = Hold()
        registry.faults.add(held, path="/blobs/", count=None)  # whoever asks first
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read, 4 << 20)
            await held.arrived.wait()
            os.kill(info.pid, signal.SIGKILL)
        await ended(info.pid)
        for offset in (4 << 20, 0):
            await trio.to_thread.run_sync(read, offset)
    failures = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
    assert set(outcomes[:2]) <= failures
    assert outcomes[2] in ((LARGE[:5000],) if settings.backend == "erofs-fuse" else failures)
    await clean_stale(settings.run_dir)


@pytest.mark.parametrize("settings", ["erofs-fuse"], indirect=True)
async def test_kill_9_in_the_middle_of_mounting(workplace: Path, settings: Settings, image: str) -> None:
    request = json.dumps(MountRequest.create(image, workplace / "mnt", settings).to_json())
    program = (
        "import json, sys, time, trio; from veneer.daemon.request import MountRequest; "
        "from veneer.daemon.service import serve_mount; from veneer.mount import backends; "
        "backends.mount_erofs = lambda *_: (print('now', flush=True), time.sleep(1000)); "
        "trio.run(serve_mount, MountRequest.from_json(json.loads(sys.argv[1])), print)"
    )
    process = await trio.lowlevel.open_process([sys.executable, "-c", program, request], stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with process.stdout:
        try:
            assert (await process.stdout.receive_some()).startswith(b"now")
        finally:
            process.kill()
            await process.wait()
    assert [path.name for path in mounted_below(workplace)] == ["devices"]
    await clean_stale(settings.run_dir)
    assert not mounted_below(workplace)
    assert not left(workplace)


async def test_unmounting_what_a_killed_process_left(workplace: Path, settings: Settings, image: str) -> None:
    info = await mount(image, workplace / "mnt", settings)
    os.kill(info.pid, signal.SIGKILL)
    await ended(info.pid)
    assert (await umount(workplace / "mnt", settings.run_dir)).id == info.id
    assert not mounts_at(workplace / "mnt")


async def test_unmounting_what_is_killed_meanwhile(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked found it alive: before its namespace is asked for, or before it is told to end."""
    for step in ("_unmount_own_copy", "stop"):
        info = await mount(image, workplace / "mnt", settings)
        go_on = getattr(mounts, step)

        def kill_first(*arguments: object, pid: int = info.pid, go_on: Any = go_on, **more: object) -> Any:
            kill_at_once([pid])
            return go_on(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(mounts, step, kill_first)
            assert (await umount(workplace / "mnt", settings.run_dir)).id == info.id
        assert not mounts_at(workplace / "mnt")
        assert not left(workplace)


async def test_a_busy_mount_stays_and_a_lazy_unmount_serves_its_users(
    workplace: Path, settings: Settings, image: str
) -> None:
    info = await mount(image, workplace / "mnt", settings)
    with opened(workplace / "mnt/large") as large:
        with pytest.raises(MountError, match=rf"in use by .*\({os.getpid()}\)"):
            await umount(workplace / "mnt", settings.run_dir)
        assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
        await umount(workplace / "mnt", settings.run_dir, lazy=True)
        assert not mounts_at(workplace / "mnt")
        again = await mount(image, workplace / "mnt", settings, writable=True)
        assert os.pread(large, 5000, 3 << 20) == LARGE[3 << 20 :][:5000], "cold, after the mount has gone"
        assert [found.record.kind for found in await list_mounts(settings.run_dir)] == ["detached", "mount"]
    await ended(info.pid)
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    assert (await umount(workplace / "mnt", settings.run_dir)).id == again.id
    assert not left(workplace)


async def test_a_process_of_another_version_is_listed_and_unmounted(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade, mounts go on with the processes that they have."""
    info = await mount(image, workplace / "mnt", settings)
    current = Request.answer

    def answer(self: Request, timeout_s: float | None = None, report: Reporter = silent) -> dict[str, object]:
        """That of a version whose layers had no sizes."""
        said = current(self, timeout_s, report)
        for facts in (said, said.get("report")):
            for layer in facts.get("layers", ()) if isinstance(facts, dict) else ():
                del layer["size"]
        return said

    monkeypatch.setattr(Request, "answer", answer)
    (found,) = await list_mounts(settings.run_dir)
    assert found.report is None
    shown = await trio.to_thread.run_sync(lambda: invoke("status", env=environment(settings)))
    assert "which does not answer as this version of veneer does" in shown.stdout
    await umount(workplace / "mnt", settings.run_dir)
    await ended(info.pid)
    assert not left(workplace)


async def test_sigterm_unmounts(workplace: Path, settings: Settings, image: str) -> None:
    info = await mount(image, workplace / "mnt", settings, writable=True)
    os.kill(info.pid, signal.SIGTERM)
    await ended(info.pid)
    assert not mounted_below(workplace)
    assert not left(workplace)


async def test_sigterm_twice_does_not_wait_for_users(workplace: Path, settings: Settings, image: str) -> None:
    info = await mount(image, workplace / "mnt", settings)
    with opened(workplace / "mnt/large") as large:
        os.kill(info.pid, signal.SIGTERM)
        while mounts_at(workplace / "mnt"):
            await trio.lowlevel.checkpoint()
        os.kill(info.pid, signal.SIGTERM)
        await ended(info.pid)
        with pytest.raises(OSError) as caught:
            os.pread(large, 10, 3 << 20)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    assert not left(workplace)


async def test_unmounting_by_hand_ends_the_process(workplace: Path, settings: Settings, image: str) -> None:
    for writable in (False, True):
        info = await mount(image, workplace / "mnt", settings, writable=writable)
        await trio.run_process(["umount", workplace / "mnt"])
        await ended(info.pid)
        assert not mounted_below(workplace)
        assert not left(workplace)


async def test_failures_reach_whoever_asked(workplace: Path, settings: Settings, image: str) -> None:
    layout = workplace / "layout"
    (workplace / "full").mkdir()
    (workplace / "full/file").touch()
    Layout(layout).flip(Layout(layout).manifest("plain")["layers"][0]["digest"], 1000)
    cases: list[tuple[str, Path, type[VeneerError], str]] = [
        (f"oci:{layout}:nothing", workplace / "mnt", NotFound, "nothing"),
        (f"oci:{layout}:plain", workplace / "mnt", IntegrityError, "expected sha256"),
        (image, workplace / "full", MountError, "not empty"),
        (image, workplace / "no/parent", MountError, "cannot make"),
        (image, workplace / "full/file", MountError, "full/file"),
    ]
    for text, mountpoint, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            await mount(text, mountpoint, settings)
        assert type(caught.value) is kind
        assert not left(workplace)
        assert not (workplace / "mnt").exists()


async def test_a_mount_point_is_used_once(workplace: Path, settings: Settings, image: str) -> None:
    await mount(image, workplace / "mnt", settings)
    with pytest.raises(MountError, match="mount point already") as caught:
        await mount(image, workplace / "mnt", settings)
    assert caught.value.hint == f"veneer umount {workplace}/mnt"
    with pytest.raises(MountError, match="nothing is mounted"):
        await umount(workplace / "elsewhere", settings.run_dir)
    assert (workplace / "mnt/etc/hello").exists()
    await umount(workplace / "mnt", settings.run_dir)


async def test_mounts_at_the_same_place_and_time(workplace: Path, settings: Settings, image: str) -> None:
    outcomes: list[object] = []

    async def attempt() -> None:
        try:
            outcomes.append(await mount(image, workplace / "mnt", settings))
        except MountError as error:
            outcomes.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(attempt)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["MountError", "MountError", "MountInfo"]
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    await umount(workplace / "mnt", settings.run_dir)


async def test_giving_up_before_the_mount_is_ready_leaves_nothing(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Whoever asks goes away while the process waits for a registry that does not answer."""
    (workplace / "repositories/team").mkdir(parents=True)
    (workplace / "layout").rename(workplace / "repositories/team/app")
    async with scripted_registry(workplace / "repositories") as registry:
        held = Hold()
        registry.faults.add(held, path="/manifests/")
        command = [
            sys.executable,
            "-m",
            "veneer",
            "mount",
            f"{registry.host}/team/app:lazy",
            f"{workplace}/mnt",
        ]
        process = await trio.lowlevel.open_process(command, env=environment(settings))
        await held.arrived.wait()
        (record,) = mount_records(settings.run_dir)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 128 + signal.SIGINT
        await ended(record.process.pid)
    assert not left(workplace)
    assert not (workplace / "mnt").exists()


async def test_without_the_registry_cached_reads_go_on_and_others_fail_in_time(
    workplace: Path, settings: Settings, image: str
) -> None:
    (workplace / "repositories/team").mkdir(parents=True)
    (workplace / "layout").rename(workplace / "repositories/team/app")
    impatient = replace(settings, read_deadline_s=2)

    def read(offset: int) -> bytes:
        with opened(workplace / "mnt/large") as large:
            return os.pread(large, 256, offset)

    def attempt(offset: int) -> bytes | None:
        try:
            return read(offset)
        except OSError:
            return None

    async with scripted_registry(workplace / "repositories") as registry:
        await mount(f"{registry.host}/team/app:lazy", workplace / "mnt", impatient)
        assert await trio.to_thread.run_sync(read, 0) == LARGE[:256]
        async with registry.down():
            assert await trio.to_thread.run_sync(read, 0) == LARGE[:256]
            with pytest.raises(OSError) as caught:
                await trio.to_thread.run_sync(read, 4_900_000)
            assert caught.value.errno == errno.EIO
        with trio.fail_after(60):
            # A pause between tries of the store may last longer than the deadline of one read.
            while (got := await trio.to_thread.run_sync(attempt, 4_900_000)) is None:
                pass
        assert got == LARGE[4_900_000:][:256]
        await umount(workplace / "mnt", settings.run_dir)


async def test_all_of_an_image_is_fetched_when_that_was_asked_for(
    workplace: Path, settings: Settings, image: str
) -> None:
    await mount(image, workplace / "mnt", settings, complete=True)
    with trio.fail_after(60):
        while True:
            (found,) = await list_mounts(settings.run_dir)
            if found.report is not None and found.report.complete == len(found.report.layers):
                break
            await trio.sleep(0.05)
    shutil.rmtree(workplace / "layout")
    assert (workplace / "mnt/large").read_bytes() == LARGE, "without the registry"
    await umount(workplace / "mnt", settings.run_dir)


async def test_damaged_data_is_an_error_that_the_log_explains(
    workplace: Path, settings: Settings, image: str
) -> None:
    info = await mount(image, workplace / "mnt", settings)
    (found,) = await list_mounts(settings.run_dir)
    assert found.report is not None
    blob = workplace / "layout/blobs/sha256" / found.report.layers[0].digest.removeprefix("sha256:")
    good = blob.read_bytes()
    blob.write_bytes(bytes(len(good)))
    with pytest.raises(OSError) as caught:
        (workplace / "mnt/etc/hello").read_bytes()
    assert caught.value.errno == errno.EIO
    assert "path='/etc/hello'" in log_of(info)
    blob.write_bytes(good)
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    await umount(workplace / "mnt", settings.run_dir)


async def test_the_control_socket_refuses_nonsense(workplace: Path, settings: Settings, image: str) -> None:
    info = await mount(image, workplace / "mnt", settings)
    directory = Path(info.log).parent
    with pytest.raises(UsageError, match="expected one of status, stop"):
        ask(directory, MOUNT_SOCKET, "dance")
    shutil.copy(directory / "state.json", workplace / "state.json")
    await umount(workplace / "mnt", settings.run_dir)
    with pytest.raises(MountError, match="nobody listens"):
        ask(workplace, MOUNT_SOCKET, "status")


def test_requests_and_errors_survive_the_journey(settings: Settings, workplace: Path) -> None:
    request = MountRequest.create("oci:rel/ative:tag", Path("mnt"), settings, upper=Path("up"))
    assert request.image == f"oci:{Path.cwd()}/rel/ative:tag"
    assert request.mountpoint == Path.cwd() / "mnt"
    assert request.writable
    assert MountRequest.from_json(request.to_json()) == request
    error = error_from_json(error_to_json(NotFound("no such image", hint="look")))
    assert (type(error), error.message, error.hint) == (NotFound, "no such image", "look")
