"""The resident daemon: what its mounts live through, and what its end does to them."""

import errno
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.convert.layouts import INDEX_TYPE, Layout
from tests.daemon.layouts import LARGE, lazy_image, settings_in
from tests.processes import kill_at_once, stop_at_once
from tests.waiting import delete, eventually
from veneer.container.options import ContainerOptions
from veneer.convert.convert import convert
from veneer.daemon import client, lifecycle, mounts
from veneer.daemon.ask import DAEMON_SOCKET, ask
from veneer.daemon.client import RunRequest
from veneer.daemon.lifecycle import let_go, stop_daemon
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import IntegrityError, MountError, NotFound, UsageError
from veneer.events import Event, Notice
from veneer.mount.kernel import mounts_at
from veneer.mount.state import directory_of, mount_records
from veneer.settings import Settings
from veneer.store.maintenance import list_devices
from veneer.testing.actions import Hold
from veneer.testing.images import write_image
from veneer.testing.registry import scripted_registry
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root]

#: Reads in blocks that are further apart than anything is read ahead.
STEP = 1 << 20


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that the daemon serves."""
    return replace(settings, backend="erofs-fanotify")


def mount(image: str, mountpoint: Path, settings: Settings, **more: object) -> MountInfo:
    return client.mount_image(MountRequest.create(image, mountpoint, settings, **more))  # type: ignore[arg-type]


def umount(mountpoint: Path, settings: Settings, *, lazy: bool = False) -> None:
    mounts.umount(mountpoint, settings.run_dir, lazy=lazy)


def processes(settings: Settings) -> dict[str, int]:
    """The daemon's processes by role."""
    found = json.loads((settings.run_dir / "daemon.json").read_bytes())
    return {role: found[role] for role in ("supervisor", "standby", "worker")}


def kill(settings: Settings, *roles: str) -> None:
    """Kill processes of the daemon at once, and wait until they are gone."""
    found = processes(settings)
    kill_at_once([found[role] for role in roles])


def another_worker(settings: Settings, before: int) -> None:
    """Wait until another worker serves."""
    eventually(lambda: ask(settings.run_dir, DAEMON_SOCKET, "ping")["worker"] != before)


def nothing_mounted(settings: Settings) -> None:
    """Wait until the last mount is gone."""
    eventually(lambda: mount_records(settings.run_dir) == [])


def log_of(settings: Settings) -> str:
    return (settings.run_dir / "daemon.log").read_text()


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False
    return True


def daemon_status(settings: Settings) -> dict[str, object]:
    found = mounts.list_mounts(settings.run_dir).daemon
    assert found is not None
    return found


def read(path: Path, offset: int, length: int = 4096) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def complete(settings: Settings) -> bool:
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    return found.report.complete == len(found.report.layers)


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "VENEER_CACHE_DIR": str(settings.cache_dir),
        "VENEER_RUN_DIR": str(settings.run_dir),
        "VENEER_BACKEND": settings.backend,
    }


def to_registry(workplace: Path) -> Path:
    """Move the layout to where a registry serves it as ``team/app``."""
    (workplace / "repositories/team").mkdir(parents=True)
    (workplace / "layout").rename(workplace / "repositories/team/app")
    return workplace / "repositories"


def test_one_daemon_serves_all_mounts(workplace: Path, settings: Settings, image: str) -> None:
    first = mount(image, workplace / "one", settings)
    second = mount(image, workplace / "two", settings, writable=True)
    assert (first.backend, first.pid) == ("erofs-fanotify", second.pid)
    assert (workplace / "one/etc/hello").read_bytes() == b"hello\n"
    (workplace / "two/etc/hello").write_bytes(b"other")
    assert (workplace / "one/etc/hello").read_bytes() == b"hello\n"
    assert (workplace / "two/large").read_bytes() == LARGE
    found = mounts.list_mounts(settings.run_dir)
    assert [status.record.mountpoint for status in found.mounts] == [workplace / "one", workplace / "two"]
    assert all(status.report is not None for status in found.mounts)
    assert found.daemon is not None
    assert found.daemon["mounts"] == 2
    umount(workplace / "one", settings)
    assert (workplace / "two/bin/busybox").exists()
    umount(workplace / "two", settings)
    assert not (workplace / "one").exists(), "made for the mount, gone with it"
    assert not list((settings.run_dir / "mounts").glob("[!.]*"))
    assert not list((settings.cache_dir / "uppers").glob("*"))
    let_go(settings.run_dir)
    assert not list((settings.cache_dir / "devices").glob("*/mounted"))


@pytest.mark.parametrize(
    "roles",
    [
        ["worker"],
        ["supervisor"],
        ["standby"],
        ["worker", "supervisor"],
        ["worker", "standby"],
        ["supervisor", "standby"],
    ],
    ids="+".join,
)
def test_killing_parts_of_it_disturbs_no_reader(
    workplace: Path, settings: Settings, image: str, roles: list[str]
) -> None:
    mount(image, workplace / "mnt", settings)
    assert read(workplace / "mnt/large", 0) == LARGE[:4096]
    kill(settings, *roles)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    umount(workplace / "mnt", settings)
    mount(image, workplace / "mnt", settings)
    umount(workplace / "mnt", settings)


def test_a_read_under_way_when_the_worker_is_killed_gets_its_bytes(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", settings)
            held = Hold()
            registry.faults.add(held, path="/blobs/")
            async with trio.open_nursery() as nursery:
                got: list[bytes] = []

                async def reader() -> None:
                    got.append(await trio.to_thread.run_sync(read, workplace / "mnt/large", 3 * STEP))

                nursery.start_soon(reader)
                await held.arrived.wait()
                await trio.to_thread.run_sync(kill, settings, "worker")
                held.release.set()
            assert got == [LARGE[3 * STEP :][:4096]]
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)

    trio.run(main)


def test_a_container_waits_for_its_bundle(workplace: Path, settings: Settings, image: str) -> None:
    """Looking up its user in the image may take longer than mounting the image."""

    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            # Once more, so that index and metadata image are here and only the user's entry is to be fetched.
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", settings)
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)
            held = Hold()
            registry.faults.add(held, path="/blobs/")
            command = [sys.executable, "-m", "veneer", "run", name]
            async with trio.open_nursery() as nursery:
                done: list[subprocess.CompletedProcess[bytes]] = []

                async def run() -> None:
                    done.append(
                        await trio.run_process(
                            command, env=environment(settings), capture_stdout=True, check=False
                        )
                    )

                def lower_is_mounted() -> bool:
                    found = mount_records(settings.run_dir)
                    return bool(found and found[0].lower and mounts_at(found[0].mountpoint))

                nursery.start_soon(run)
                await held.arrived.wait()
                await trio.to_thread.run_sync(eventually, lower_is_mounted)
                held.release.set()
            assert (done[0].returncode, done[0].stdout) == (0, b"hello\n")

    trio.run(main)


def test_another_worker_needs_no_registry(workplace: Path, settings: Settings, image: str) -> None:
    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:lazy"
            impatient = replace(settings, read_deadline_s=2)
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", impatient)
            assert await trio.to_thread.run_sync(read, workplace / "mnt/large", 0) == LARGE[:4096]
            before = processes(settings)["worker"]
            async with registry.down():
                await trio.to_thread.run_sync(kill, settings, "worker")
                await trio.to_thread.run_sync(another_worker, settings, before)
                # From the device, not from the kernel's cache of the file.
                await trio.to_thread.run_sync(Path("/proc/sys/vm/drop_caches").write_text, "1")
                assert await trio.to_thread.run_sync(read, workplace / "mnt/large", 0) == LARGE[:4096]
                with pytest.raises(OSError) as caught:
                    await trio.to_thread.run_sync(read, workplace / "mnt/large", 4 * STEP)
                assert caught.value.errno == errno.EIO
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)

    trio.run(main)
    assert "path='/large'" in log_of(settings)


def test_what_cannot_be_served_again_fails_until_it_can(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Its devices have holes, which the kernel would read as zeros if it did not have to ask."""
    places = [workplace / "one", workplace / "two"]
    mount(image, places[0], settings)
    mount(image, places[1], settings, writable=True)
    assert (places[0] / "etc/hello").read_bytes() == b"hello\n"
    layout, blobs = workplace / "layout", settings.cache_dir / "blobs"
    for kept in (layout, blobs):
        kept.rename(kept.with_name("away-" + kept.name))
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    eventually(lambda: log_of(settings).count("cannot serve again") >= 2)
    for place in places:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            read(place / "large", 2 * STEP)
    for kept in (layout, blobs):
        kept.with_name("away-" + kept.name).rename(kept)
    eventually(lambda: log_of(settings).count("serving again") == 2)
    for place in places:
        assert (place / "large").read_bytes() == LARGE
        umount(place, settings)
    let_go(settings.run_dir)
    # The tree of the second place is let go of behind whoever unmounted it.
    eventually(lambda: not list(settings.cache_dir.glob("devices/*/mounted")))


def test_devices_of_what_cannot_be_served_again_are_kept_from_being_read_when_others_are_unmounted(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Both mounts have the same devices, but only one of them is served again, and ends."""
    places = [workplace / "one", workplace / "two"]
    lost = mount(image, places[0], settings)
    mount(image, places[1], settings)
    assert (places[0] / "etc/hello").read_bytes() == b"hello\n"
    state = settings.run_dir / "mounts" / lost.id / "resident.json"
    right = state.read_text()
    state.write_text(re.sub("@sha256:[0-9a-f]{64}", f"@sha256:{64 * '0'}", right))
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    eventually(lambda: "cannot serve again" in log_of(settings))
    assert (places[1] / "etc/hello").read_bytes() == b"hello\n"
    umount(places[1], settings)
    for at in (2 * STEP, 4 * STEP):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            read(places[0] / "large", at)
    state.write_text(right)
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    assert (places[0] / "large").read_bytes() == LARGE
    umount(places[0], settings)
    let_go(settings.run_dir)
    assert not any(info.mounted for info in list_devices(settings.cache_dir))


def test_devices_lose_their_marks_when_the_last_mount_that_is_not_served_has_gone(
    workplace: Path, settings: Settings, image: str
) -> None:
    places = [workplace / "one", workplace / "two"]
    lost = mount(image, places[0], settings)
    mount(image, places[1], settings)
    (settings.run_dir / "mounts" / lost.id / "resident.json").write_text("{}")
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    umount(places[1], settings)
    devices = list(settings.cache_dir.glob("devices/*/data"))
    assert not any(map(readable, devices))
    with (places[0] / "large").open("rb") as user:
        umount(places[0], settings, lazy=True)
        eventually(lambda: log_of(settings).count("cannot serve again") >= 2)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(user.fileno(), 4096, 4 * STEP)
    nothing_mounted(settings)
    before = processes(settings)["worker"]
    eventually(lambda: all(readable(data) for data in devices))
    assert processes(settings)["worker"] == before


def test_a_mount_that_cannot_be_served_again_can_be_unmounted(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Also when nobody knows any more what it is of; and it is not in the way of the daemon's end."""
    places = [workplace / "one", workplace / "two", workplace / "three"]
    states = []
    for place in places:
        made = mount(image, place, settings, writable=place == places[1])
        states.append(settings.run_dir / "mounts" / made.id / "resident.json")
    for state in states:
        state.write_text("{}")
    before = processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    eventually(lambda: log_of(settings).count("cannot serve again") >= len(places))
    for place in places:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            read(place / "large", 2 * STEP)
    umount(places[0], settings)
    umount(places[1], settings)
    eventually(lambda: not any(state.parent.exists() for state in states[:2]))
    assert stop_daemon(settings.run_dir, force=True)
    assert not mounts_at(places[2])


def test_a_restart_disturbs_neither_readers_nor_containers(
    workplace: Path, settings: Settings, image: str
) -> None:
    script = "echo up; read x; cat /large"
    command = [sys.executable, "-m", "veneer", "run", "-i", image, "--", "sh", "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(settings)
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        before = processes(settings)
        lifecycle.restart_daemon(settings.run_dir)
        assert processes(settings)["worker"] != before["worker"]
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert hashlib.sha256(process.stdout.read()).digest() == hashlib.sha256(LARGE).digest()
        assert process.wait() == 0
    assert mount_records(settings.run_dir) == []


def test_the_end_of_who_runs_a_container_is_noticed_by_another_worker(
    workplace: Path, settings: Settings, image: str
) -> None:
    command = [sys.executable, "-m", "veneer", "run", image, "--", "sh", "-c", "echo up; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(settings)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        before = processes(settings)["worker"]
        kill(settings, "worker")
        another_worker(settings, before)
        process.kill()
        nothing_mounted(settings)


def quick_run(image: str, settings: Settings, script: str, *options: str) -> list[str]:
    """A command line that goes the short way, which takes a daemon."""
    lifecycle.start_daemon(settings.run_dir)
    return [sys.executable, "-m", "veneer", "run", *options, image, "--", "sh", "-c", script]


def test_with_a_daemon_a_container_starts_without_a_command_line_of_its_own(
    workplace: Path, settings: Settings, image: str
) -> None:
    script = "cat; echo $A; trap 'echo got; exit 9' TERM; echo ready; sleep 1000 & wait"
    report = workplace / "report.json"
    command = quick_run(image, settings, script, "-i", "-e", "A=b", "--report", str(report))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(settings), **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"in\n")
        process.stdin.close()
        assert [process.stdout.readline() for _ in range(3)] == [b"in\n", b"b\n", b"ready\n"]
        assert "argparse" not in Path(f"/proc/{process.pid}/maps").read_text()
        (shown,) = mounts.list_mounts(settings.run_dir).mounts
        assert (shown.record.kind, shown.record.process.pid) == ("run", process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"got\n"
        assert process.wait() == 9
        assert process.stderr.read() == b""
    assert mounts.list_mounts(settings.run_dir).mounts == [], "gone for whoever asks"
    told = json.loads(report.read_text())
    assert told["exit_code"] == 9
    assert 0 < told["mount"]["seconds"] <= told["mounted_s"] <= told["total_s"]
    assert told["requests"] == told["report"]["store"]["requests"] > 0
    long = subprocess.run(
        [*command[:4], "--timing", *command[4:-1], "true"],
        env=environment(settings),
        capture_output=True,
        check=True,
    )
    assert b"ended after" in long.stderr
    assert json.loads(report.read_text()).keys() == told.keys()
    assert not list((settings.cache_dir / "uppers").iterdir())
    lifecycle.stop_daemon(settings.run_dir)


def test_a_container_that_goes_on_after_kill_9_of_its_command_is_ended(
    workplace: Path, settings: Settings, image: str
) -> None:
    with subprocess.Popen(
        quick_run(image, settings, "echo up; sleep 1000"), stdout=subprocess.PIPE, env=environment(settings)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        (record,) = mount_records(settings.run_dir)
        process.kill()
    nothing_mounted(settings)
    assert not Path(f"/run/runc/{record.id}").exists()
    lifecycle.stop_daemon(settings.run_dir)


def test_a_root_that_somebody_else_looks_at_goes_with_the_last_look(
    workplace: Path, settings: Settings, image: str
) -> None:
    command = quick_run(image, settings, "echo up; read x", "-i")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(settings)
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        (record,) = mount_records(settings.run_dir)
        with (record.mountpoint / "etc/hello").open("rb", buffering=0) as looking:
            process.stdin.write(b"go\n")
            process.stdin.close()
            assert process.wait() == 0
            eventually(lambda: [left.kind for left in mount_records(settings.run_dir)] == ["detached"])
            assert not mounts_at(record.mountpoint)
            assert looking.read() == b"hello\n"
    nothing_mounted(settings)
    assert "bug" not in log_of(settings)
    lifecycle.stop_daemon(settings.run_dir)


def test_what_is_wrong_is_said_the_same_on_the_short_way(
    workplace: Path, settings: Settings, image: str
) -> None:
    missing = image.replace(":lazy", ":nothing")
    said = []
    for start in (False, True):
        command = (
            quick_run(missing, settings, "true") if start else [sys.executable, "-m", "veneer", "run", missing]
        )
        done = subprocess.run(command, check=False, env=environment(settings), capture_output=True)
        said.append((done.returncode, done.stdout, done.stderr))
    assert said[0] == said[1]
    assert said[0][0] == NotFound.exit_code
    lifecycle.stop_daemon(settings.run_dir)


def test_a_cache_that_is_deleted_under_a_mount_costs_that_mount_alone(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings)
    assert read(workplace / "mnt/large", 0) == LARGE[:4096]
    worker = processes(settings)["worker"]
    delete(settings.cache_dir)
    umount(workplace / "mnt", settings)
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)
    assert processes(settings)["worker"] == worker


def test_stopping_waits_for_the_supervisor_that_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment after one has died, the worker answers, and the dead one is named."""

    def named(pid: int) -> None:
        (tmp_path / "daemon.json").write_text(json.dumps({"supervisor": pid, "started": 1.0}))

    def take_over(_seconds: float) -> None:
        if (tmp_path / "daemon.json").read_bytes() == of_the_dead:
            named(living.pid)

    monkeypatch.setattr(lifecycle, "ask", lambda *_question: {"worker": 1})
    ends = f"trap 'rm {tmp_path}/daemon.json; exit 7' TERM; echo; while sleep 0.1; do :; done"
    with (
        subprocess.Popen(["sleep", "0"]) as dead,
        subprocess.Popen(["sh", "-c", ends], stdout=subprocess.PIPE) as living,
    ):
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        assert living.stdout is not None
        assert living.stdout.readline() == b"\n", "it knows what to do with the request to end"
        named(dead.pid)
        of_the_dead = (tmp_path / "daemon.json").read_bytes()
        monkeypatch.setattr(time, "sleep", take_over)
        try:
            assert lifecycle.stop_daemon(tmp_path)
            assert living.wait(60) == 7
        finally:
            living.kill()
        dead.wait()
        monkeypatch.setattr(lifecycle, "STOP_TIMEOUT_S", 0.0)
        monkeypatch.setattr(time, "sleep", lambda _seconds: None)
        named(dead.pid)
        with pytest.raises(MountError, match="no other has taken over"):
            lifecycle.stop_daemon(tmp_path)


def test_a_mount_whose_daemon_died_as_a_whole_is_given_up(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Until somebody guards them again, holes read as zeros: nobody may take these for data later."""
    mount(image, workplace / "mnt", settings, writable=True)
    # Nothing is read before: a miss brings more along, and a complete device needs no guard.
    with (workplace / "mnt/large").open("rb") as user:
        kill(settings, "worker", "supervisor", "standby")
        (found,) = mounts.list_mounts(settings.run_dir).mounts
        assert found.record.kind == "detached"
        assert not mounts_at(workplace / "mnt")
        assert os.pread(user.fileno(), 4096, 3 * STEP) == LARGE[3 * STEP :][:4096], "it is guarded again"
    assert "had no guard" in log_of(settings)
    nothing_mounted(settings)
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)


def test_a_mount_whose_daemon_died_as_a_whole_is_given_up_also_when_it_cannot_be_served(
    workplace: Path, settings: Settings, image: str
) -> None:
    made = mount(image, workplace / "mnt", settings)
    state = settings.run_dir / "mounts" / made.id / "resident.json"
    state.write_text(re.sub("@sha256:[0-9a-f]{64}", f"@sha256:{64 * '0'}", state.read_text()))
    with (workplace / "mnt/large").open("rb") as user:
        kill(settings, "worker", "supervisor", "standby")
        (found,) = mounts.list_mounts(settings.run_dir).mounts
        assert found.record.kind == "detached"
        assert not mounts_at(workplace / "mnt")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(user.fileno(), 4096, 3 * STEP)
    assert "had no guard" in log_of(settings)
    nothing_mounted(settings)


def test_one_place_can_be_detached_again_while_its_last_mount_is_still_in_use(
    workplace: Path, settings: Settings, image: str
) -> None:
    with ExitStack() as users:
        files = []
        for writable in (False, True, False):
            mount(image, workplace / "mnt", settings, writable=writable)
            files.append(users.enter_context((workplace / "mnt/large").open("rb")))
            umount(workplace / "mnt", settings, lazy=True)
        assert [found.record.kind for found in mounts.list_mounts(settings.run_dir).mounts] == ["detached"] * 3
        for file in files:
            assert os.pread(file.fileno(), 4096, 3 * STEP) == LARGE[3 * STEP :][:4096]
    nothing_mounted(settings)


def test_a_daemon_that_guards_its_mounts_again_leaves_those_of_another_one_alone(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Both have the same cache directory, and the first has a mount that it cannot serve."""
    other = replace(settings, run_dir=workplace / "other")
    (workplace / "second").mkdir()
    name = trio.run(
        lazy_image, workplace / "second", settings_in(workplace), [(TarItem(b"x", content=LARGE[::-1]),)]
    )
    mount(image, workplace / "mnt", settings)
    made = mount(name, workplace / "lost", other)
    try:
        (other.run_dir / "mounts" / made.id / "resident.json").write_text("{}")
        (other.run_dir / "caches.json").write_text(json.dumps([str(settings.cache_dir)]))
        with (workplace / "lost/x").open("rb"):
            kill(other, "worker", "supervisor", "standby")
            mounts.list_mounts(other.run_dir)
            assert "had no guard" in log_of(other)
            assert read(workplace / "mnt/large", 3 * STEP) == LARGE[3 * STEP :][:4096]
    finally:
        stop_daemon(other.run_dir, force=True)
    umount(workplace / "mnt", settings)


def test_a_complete_image_needs_no_daemon(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "mnt", settings)
    for path in (workplace / "mnt").rglob("*"):
        if path.is_file():
            path.read_bytes()
    eventually(lambda: complete(settings))
    kill(settings, "worker", "supervisor", "standby")
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert (workplace / "mnt/large").read_bytes() == LARGE
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.record.kind == "mount", "nothing was without a guard that needs one"
    umount(workplace / "mnt", settings)


def test_an_image_is_completed_in_the_background_when_that_was_asked_for(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings, complete=True)
    eventually(lambda: complete(settings))
    kill(settings, "worker", "supervisor", "standby")
    assert (workplace / "mnt/large").read_bytes() == LARGE, "what nobody had read needs nobody either"
    umount(workplace / "mnt", settings)


def test_what_is_unmounted_while_no_worker_looks_leaves_nothing_behind(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings)
    assert read(workplace / "mnt/large", 0) == LARGE[:4096]
    before = processes(settings)["worker"]
    stopped = os.pidfd_open(before)
    signal.pidfd_send_signal(stopped, signal.SIGSTOP)
    subprocess.run(["umount", workplace / "mnt"], check=True)
    signal.pidfd_send_signal(stopped, signal.SIGKILL)
    select.select([stopped], [], [])
    os.close(stopped)
    another_worker(settings, before)
    assert mount_records(settings.run_dir) == []
    (data,) = (settings.cache_dir / "devices").glob("*/data")
    read(data, 0)  # an error if the kernel still asks about it, and nobody knows it
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)


def test_a_detached_mount_is_served_until_it_is_left(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "mnt", settings)
    with (workplace / "mnt/large").open("rb") as user:
        with pytest.raises(MountError, match="in use by"):
            umount(workplace / "mnt", settings)
        umount(workplace / "mnt", settings, lazy=True)
        assert os.pread(user.fileno(), 4096, STEP) == LARGE[STEP:][:4096]
        before = processes(settings)["worker"]
        kill(settings, "worker")
        another_worker(settings, before)
        assert os.pread(user.fileno(), 4096, 4 * STEP) == LARGE[4 * STEP :][:4096]
        mount(image, workplace / "mnt", settings)
        kinds = [found.record.kind for found in mounts.list_mounts(settings.run_dir).mounts]
        assert sorted(kinds) == ["detached", "mount"]
    eventually(lambda: len(mount_records(settings.run_dir)) == 1)
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None, "the end of the one before is not the end of this one"
    umount(workplace / "mnt", settings)
    assert mount_records(settings.run_dir) == []


def test_a_worker_killed_while_it_freed_a_place_has_that_done_by_the_next_one(
    workplace: Path, settings: Settings, image: str
) -> None:
    made = mount(image, workplace / "mnt", settings)
    with (workplace / "mnt/large").open("rb") as user:
        umount(workplace / "mnt", settings, lazy=True)
        (record,) = mount_records(settings.run_dir)
        before = processes(settings)["worker"]
        supervisor = processes(settings)["supervisor"]
        stop_at_once([supervisor])
        kill(settings, "worker")
        # So far it had come: its record was written, and the directory not moved.
        directory_of(settings.run_dir, record.id).rename(directory_of(settings.run_dir, made.id))
        os.kill(supervisor, signal.SIGCONT)
        another_worker(settings, before)
        mount(image, workplace / "mnt", settings)
        assert os.pread(user.fileno(), 4096, 4 * STEP) == LARGE[4 * STEP :][:4096]
    umount(workplace / "mnt", settings)
    nothing_mounted(settings)


def test_a_place_can_be_used_again_as_soon_as_it_has_been_unmounted_by_hand(
    workplace: Path, settings: Settings, image: str
) -> None:
    for _ in range(5):
        mount(image, workplace / "mnt", settings, writable=True)
        subprocess.run(["umount", workplace / "mnt"], check=True)
    nothing_mounted(settings)


def test_stopping_waits_for_users_and_asks_before_it_detaches(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(image, workplace / "mnt", settings)
    with pytest.raises(MountError, match="serves 1 mounts"):
        lifecycle.stop_daemon(settings.run_dir)
    monkeypatch.setattr(lifecycle, "STOP_TIMEOUT_S", 0.1)
    with (workplace / "mnt/large").open("rb") as user:
        with pytest.raises(MountError, match="in use still"):
            lifecycle.stop_daemon(settings.run_dir, force=True)
        assert not mounts_at(workplace / "mnt")
        assert os.pread(user.fileno(), 4096, 2 * STEP) == LARGE[2 * STEP :][:4096]
        supervisor = os.pidfd_open(processes(settings)["supervisor"])
    select.select([supervisor], [], [])
    os.close(supervisor)
    assert not lifecycle.stop_daemon(settings.run_dir), "it has ended"


def test_a_supervisor_that_is_killed_while_it_stops_has_no_successor_in_the_end(
    workplace: Path, settings: Settings
) -> None:
    assert lifecycle.start_daemon(settings.run_dir)
    eventually(lambda: processes(settings)["standby"] is not None)
    supervisor, standby = processes(settings)["supervisor"], processes(settings)["standby"]
    # It has to stand still before the request comes, or it takes that first.
    stop_at_once([supervisor])
    stopping = threading.Thread(target=lifecycle.stop_daemon, args=(settings.run_dir,))
    stopping.start()
    # It never learns of the request that it has got.
    eventually(lambda: "SIGTERM" in pending_signals(supervisor))
    os.kill(supervisor, signal.SIGKILL)
    stopping.join()
    assert not lifecycle.stop_daemon(settings.run_dir)
    eventually(lambda: not Path(f"/proc/{standby}").exists())


def pending_signals(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("ShdPnd:")).split()[1], 16)
    return [signal.Signals(number).name for number in range(1, 32) if mask >> (number - 1) & 1]


def test_without_mounts_it_ends_by_itself(workplace: Path, settings: Settings) -> None:
    settings.run_dir.mkdir(mode=0o700)
    assert lifecycle.start_daemon(settings.run_dir, idle_exit_s=0.1)
    try:
        supervisor = os.pidfd_open(processes(settings)["supervisor"])
    except (OSError, KeyError):
        return
    select.select([supervisor], [], [])
    os.close(supervisor)


def test_only_one_is_started(workplace: Path, settings: Settings) -> None:
    assert lifecycle.start_daemon(settings.run_dir)
    assert not lifecycle.start_daemon(settings.run_dir)
    assert daemon_status(settings)["worker"] == processes(settings)["worker"]
    assert lifecycle.stop_daemon(settings.run_dir)
    assert not lifecycle.stop_daemon(settings.run_dir)


def test_images_share_what_one_of_them_brought(workplace: Path, settings: Settings) -> None:
    """A layer is read through the connections of the first image that has it, also when that is unmounted."""
    base = tar([TarItem(b"base", content=os.urandom(3 * STEP))])
    parts: list[tuple[str, bytes]] = []

    async def make() -> None:
        for number in range(2):
            own = tar([TarItem(b"own", content=bytes([number]) * 5000)])
            directory = workplace / f"image{number}"
            directory.mkdir()
            parts.append((await lazy_image(directory, settings_in(workplace), [base, own]), own))

    trio.run(make)
    for number, (name, _) in enumerate(parts):
        mount(name, workplace / f"mnt{number}", settings)
    whole = base[512 : 512 + 3 * STEP]
    assert read(workplace / "mnt0/base", 0) == whole[:4096]
    umount(workplace / "mnt0", settings)
    assert (workplace / "mnt1/base").read_bytes() == whole
    assert (workplace / "mnt1/own").read_bytes() == bytes([1]) * 5000
    umount(workplace / "mnt1", settings)
    stores = daemon_status(settings)["stores"]
    assert isinstance(stores, dict)
    assert len(stores) == 1


def test_giving_up_before_the_mount_is_ready_leaves_nothing(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            held = Hold()
            registry.faults.add(held, path="/manifests/")
            command = [sys.executable, "-m", "veneer", "mount", f"{registry.host}/team/app:lazy"]
            process = await trio.lowlevel.open_process(
                [*command, f"{workplace}/mnt"], env=environment(settings)
            )
            await held.arrived.wait()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 128 + signal.SIGINT
            await trio.to_thread.run_sync(nothing_mounted, settings)

    trio.run(main)
    assert not (workplace / "mnt").exists()


def test_failures_reach_whoever_asked(workplace: Path, settings: Settings, image: str) -> None:
    layout = workplace / "layout"
    (workplace / "full").mkdir()
    (workplace / "full/file").touch()
    Layout(layout).flip(Layout(layout).manifest("plain")["layers"][0]["digest"], 1000)
    for text, mountpoint, kind, words in (
        (f"oci:{layout}:nothing", workplace / "mnt", NotFound, "nothing"),
        (f"oci:{layout}:plain", workplace / "mnt", IntegrityError, "expected sha256"),
        (image, workplace / "full", MountError, "not empty"),
    ):
        with pytest.raises(kind, match=words):
            mount(text, mountpoint, settings)
    with pytest.raises(UsageError, match="not in /etc/passwd"):
        client.run_image(RunRequest(image, ContainerOptions(user="mallory")), settings)
    with pytest.raises(UsageError, match="unknown request"):
        ask(settings.run_dir, DAEMON_SOCKET, "dance")
    assert mount_records(settings.run_dir) == []
    assert not (workplace / "mnt").exists()


def test_wrong_bytes_are_an_error_that_the_log_explains(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "mnt", settings)
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    blob = workplace / "layout/blobs/sha256" / found.report.layers[0].digest.removeprefix("sha256:")
    good = blob.read_bytes()
    blob.write_bytes(bytes(len(good)))
    with pytest.raises(OSError) as caught:
        read(workplace / "mnt/large", 2 * STEP)
    assert caught.value.errno == errno.EIO
    line = next(line for line in log_of(settings).splitlines() if "read failed" in line)
    assert "path='/large'" in line
    assert "IntegrityError" in line
    blob.write_bytes(good)
    assert read(workplace / "mnt/large", 2 * STEP) == LARGE[2 * STEP :][:4096]
    umount(workplace / "mnt", settings)


def test_where_the_kernel_cannot_watch_files_another_backend_is_used(
    workplace: Path, settings: Settings, image: str
) -> None:
    (workplace / "memory").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", workplace / "memory"], check=True)
    notices: list[str] = []

    def report(event: Event) -> None:
        assert isinstance(event, Notice)
        notices.append(event.message)

    try:
        here = replace(settings, cache_dir=workplace / "memory/cache")
        with pytest.raises(MountError, match="cannot"):
            mount(image, workplace / "mnt", here)
        request = MountRequest.create(image, workplace / "mnt", replace(here, backend="auto"))
        info = client.mount_image(request, report=report)
        assert info.backend == "fuse"
        assert any("slower backend" in notice for notice in notices)
        umount(workplace / "mnt", settings)
    finally:
        lifecycle.stop_daemon(settings.run_dir, force=True)
        subprocess.run(["umount", workplace / "memory"], check=True)


def test_a_cache_that_was_deleted_between_mounts_is_made_anew(
    workplace: Path, settings: Settings, image: str
) -> None:
    for quota in (1 << 30, 1 << 29):
        mount(image, workplace / "mnt", replace(settings, cache_quota=quota))
        assert (workplace / "mnt/large").read_bytes() == LARGE
        umount(workplace / "mnt", settings)
        delete(settings.cache_dir)
    worker = daemon_status(settings)["worker"]
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    assert (settings.cache_dir / "devices/.ledger").exists(), "the quota is kept again"
    assert daemon_status(settings)["worker"] == worker
    umount(workplace / "mnt", settings)


def test_other_commands_leave_mounted_devices_alone(workplace: Path, settings: Settings, image: str) -> None:
    """Whatever another process does with the cache, the kernel finds all bytes that it was told are there."""

    def veneer(*words: str) -> bytes:
        command = [sys.executable, "-m", "veneer", *words]
        return subprocess.run(command, env=environment(settings), stdout=subprocess.PIPE, check=True).stdout

    mount(image, workplace / "mnt", settings)
    assert read(workplace / "mnt/large", 0) == LARGE[:4096]
    assert read(workplace / "mnt/large", 3 * STEP) == LARGE[3 * STEP :][:4096]
    assert veneer("cat", image, "/large") == LARGE
    veneer("verify", image)
    veneer("cache", "gc", "--cache-quota", "0")
    veneer("cache", "check")
    veneer("cache", "clear")
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)
    veneer("cache", "clear")
    assert not list((settings.cache_dir / "devices").glob("[!.]*"))


def test_a_hundred_images_at_once(workplace: Path, settings: Settings) -> None:
    """All right, and each for a bounded price in descriptors and memory."""
    count = 100
    base = tar([TarItem(b"base", content=LARGE[: 2 * STEP])])
    own = [TarItem(b"own", content=LARGE[number * 1000 :][:50_000]) for number in range(count)]
    plain = Layout(workplace / "plain")
    for number, item in enumerate(own):
        write_image([base, tar([item])], plain.path, str(number), "none")
    tags = plain.tags()
    entries = [{key: tags[str(n)][key] for key in ("mediaType", "digest", "size")} for n in range(count)]
    every = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
    plain.tag("all", plain.store(INDEX_TYPE, json.dumps(every).encode()))
    layout = f"oci:{workplace}/layout"
    converted = trio.run(convert, plain.ref("all"), f"{layout}:all", settings_in(workplace))
    names = [f"{layout}@{image.manifest}" for image in converted.images]
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(mount, names[0], workplace / "mnt0", settings)
        first.result()
        before = daemon_status(settings)
        made = [pool.submit(mount, names[i], workplace / f"mnt{i}", settings) for i in range(1, count)]
        for future in made:
            future.result()

        def check(number: int) -> None:
            assert (workplace / f"mnt{number}/own").read_bytes() == own[number].content
            at = (number * 20_000) % STEP
            assert read(workplace / f"mnt{number}/base", at) == LARGE[at:][:4096]

        list(pool.map(check, range(count)))
        after = daemon_status(settings)
        assert after["mounts"] == count
        # One of its own data file, presence map and lock, and those of its layout.
        assert number_of(after, "descriptors") - number_of(before, "descriptors") <= 8 * count
        assert number_of(after, "memory") - number_of(before, "memory") <= count << 20
        list(pool.map(lambda i: umount(workplace / f"mnt{i}", settings), range(1, count)))
    end = daemon_status(settings)
    assert number_of(end, "descriptors") <= number_of(before, "descriptors") + 4
    umount(workplace / "mnt0", settings)


def number_of(status: dict[str, object], name: str) -> int:
    return int(str(status[name]))
