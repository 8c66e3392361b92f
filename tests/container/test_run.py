"""Containers on lazily mounted images, run by a real runtime."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.processes import children
from tests.waiting import eventually
from veneer.container.bundle import write_image_bundle
from veneer.container.options import ContainerOptions, Volume
from veneer.container.run import FORWARDED, ContainerRun
from veneer.container.runtime import delete_container, find_runtime
from veneer.daemon.client import RunRequest, RunResult, mount_image, run_image
from veneer.daemon.mounts import list_mounts, umount
from veneer.daemon.request import MountRequest
from veneer.errors import MountError, UsageError
from veneer.mount.kernel import mount_table
from veneer.mount.state import mount_records
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture(params=["fuse", "erofs-fuse", "erofs-fanotify"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Everything here holds for every backend."""
    return replace(settings, backend=str(request.param))


async def run(image: str, settings: Settings, *arguments: str, **options: object) -> RunResult:
    chosen = ContainerOptions(arguments=arguments, **options)  # type: ignore[arg-type]
    return await trio.to_thread.run_sync(run_image, RunRequest(image, chosen), settings)


def left(directory: Path) -> list[Path]:
    mounts = [entry.mountpoint for entry in mount_table() if directory in entry.mountpoint.parents]
    files = [path for name in ("run/mounts", "cache/uppers") for path in (directory / name).glob("*")]
    return mounts + [path for path in files if path.name not in (".lock", ".claim")]


def exists(container: str) -> bool:
    # Not by a list, which fails when a container of anybody ends while it is made.
    return (
        subprocess.run([find_runtime(), "state", container], capture_output=True, check=False).returncode == 0
    )


def command_line(image: str, arguments: Sequence[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "veneer", "run", *options, image, "--", *arguments]


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "VENEER_CACHE_DIR": str(settings.cache_dir),
        "VENEER_RUN_DIR": str(settings.run_dir),
        "VENEER_BACKEND": settings.backend,
    }


@asynccontextmanager
async def running(
    settings: Settings, image: str, script: str, *options: str
) -> AsyncIterator[tuple[trio.Process, trio.abc.ReceiveStream]]:
    """``veneer run`` of a shell script in a process of its own, and what it prints; waits for its end."""
    process = await trio.lowlevel.open_process(
        command_line(image, ["sh", "-c", script], *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(settings),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        try:
            yield process, process.stdout
            with trio.fail_after(60):
                await process.wait()
            # Whoever asks sees it gone; files may be there for a moment longer.
            await trio.to_thread.run_sync(list_mounts, settings.run_dir)
        finally:
            if process.poll() is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def test_the_image_says_what_runs(
    workplace: Path, settings: Settings, image: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = await run(image, settings)
    assert result.exit_code == 0
    assert capfd.readouterr().out == "hello\n"
    assert result.bytes_fetched < (workplace / "layout").stat().st_size + 3_000_000, "not the large file"
    assert not left(workplace)


async def test_what_the_command_sees(
    workplace: Path, settings: Settings, image: str, capfd: pytest.CaptureFixture[str]
) -> None:
    script = 'id; pwd; echo "$A $B $HOME"; hostname; echo $$; cat /proc/net/dev | grep -c :'
    result = await run(
        image, settings, "sh", "-c", script, environment={"B": "b"}, user="bob", hostname="box", network="none"
    )
    assert result.exit_code == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "uid=1007(bob) gid=1008(bob) groups=10(wheel)",
        "/home",
        "image b /home/bob",
        "box",
        "1",
        "1",
    ]


async def test_exit_codes(
    workplace: Path, settings: Settings, image: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (await run(image, settings, "sh", "-c", "exit 7")).exit_code == 7
    assert (await run(image, settings, "no-such-program")).exit_code != 0
    assert "no-such-program" in capfd.readouterr().err
    assert not left(workplace)


async def test_volumes_and_a_root_that_cannot_be_written(
    workplace: Path, settings: Settings, image: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (workplace / "data").mkdir()
    (workplace / "config").write_text("configured\n")
    script = "cat /etc/deep/config && echo out > /data/out && ! echo x > /etc/deep/config && ! touch /etc/new"
    volumes = (Volume(workplace / "data", "/data"), Volume(workplace / "config", "/etc/deep/config", True))
    result = await run(image, settings, "sh", "-c", script, volumes=volumes, read_only=True)
    captured = capfd.readouterr()
    assert result.exit_code == 0, captured.err
    assert captured.out == "configured\n"
    assert (workplace / "data/out").read_text() == "out\n"
    assert (workplace / "config").read_text() == "configured\n"


async def test_what_is_written_is_gone_afterwards(workplace: Path, settings: Settings, image: str) -> None:
    for _ in range(2):
        script = (
            "test ! -e /etc/new && echo new > /etc/new && mv /etc/hello /etc/moved && rm /etc/group && "
            "test ! -e /etc/hello && test ! -e /etc/group && test $(cat /etc/new /etc/moved | wc -l) = 2 && "
            "cp /bin/busybox /tmp/busybox && /tmp/busybox true"
        )
        assert (await run(image, settings, "sh", "-c", script)).exit_code == 0
    assert not left(workplace)


async def test_a_second_run_fetches_nothing(settings: Settings, image: str) -> None:
    assert (await run(image, settings)).requests > 0
    assert (await run(image, settings)).requests == 0


async def test_standard_input_and_timing(workplace: Path, settings: Settings, image: str) -> None:
    report = workplace / "report.json"
    options = ("-i", "--timing", "--report", str(report))
    done = await trio.run_process(
        command_line(image, ["sh", "-c", "cat; exit 3"], *options),
        stdin=b"typed",
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=environment(settings),
    )
    assert (done.returncode, done.stdout) == (3, b"typed")
    assert b"first output after" in done.stderr
    told = json.loads(report.read_bytes())
    assert told["exit_code"] == 3
    assert 0 < told["mounted_s"] < told["first_output_s"] < told["total_s"]
    assert told["requests"] == told["report"]["store"]["requests"] > 0
    done = await trio.run_process(
        command_line(image, ["cat"]), stdin=b"typed", capture_stdout=True, env=environment(settings)
    )
    assert done.stdout == b"", "without -i there is no input"


async def test_signals_reach_the_command(workplace: Path, settings: Settings, image: str) -> None:
    script = "trap 'echo got; exit 9' TERM; echo ready; sleep 1000 & wait"
    async with running(settings, image, script) as (process, output):
        assert await output.receive_some() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert await output.receive_some() == b"got\n"
    assert process.returncode == 9
    assert not left(workplace)


async def test_a_command_that_ignores_signals_is_killed_when_asked_often(
    workplace: Path, settings: Settings, image: str
) -> None:
    script = "trap 'echo no' INT; echo ready; while true; do sleep 1000 & wait; done"
    async with running(settings, image, script) as (process, output):
        assert await output.receive_some() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert await output.receive_some() == b"no\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 128 + signal.SIGKILL
    assert not left(workplace)


#: Ends when asked to by SIGTERM, and prints a dot at the start and for each SIGUSR1.
COUNTING = """#!{python} -IS
import os, signal
taken = signal.SIGUSR1, signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, taken)
os.write(1, b".")
while signal.sigwait(taken) == signal.SIGUSR1:
    os.write(1, b".")
os._exit(7)
"""


def program_of(runtime: Path, *, watched: bool) -> str:
    """A program that runs a bundle as a command line does, with a runtime of ours."""
    return (
        "import sys; from veneer.container.run import ContainerRun; "
        f"run = ContainerRun({str(runtime)!r}, interactive=False, terminal=False, watch_output={watched}); "
        "sys.exit(run.run('name', '/bundle').exit_code)"
    )


@pytest.mark.parametrize("watched", [False, True])
def test_no_signal_waits_for_the_next_one(tmp_path: Path, watched: bool) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(COUNTING.format(python=sys.executable))
    runtime.chmod(0o755)
    program = program_of(runtime, watched=watched)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        try:
            # Each is sent while the handler of the one before ends, which is when one can be lost.
            for _ in range(5000):
                assert select.select([process.stdout], [], [], 20)[0], "a signal was lost"
                assert process.stdout.read(1) == b"."
                process.send_signal(signal.SIGUSR1)
            assert process.stdout.read(1) == b"."
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 7
        finally:
            process.kill()


def test_no_signal_waits_while_nobody_takes_the_output(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(
        COUNTING.format(python=sys.executable)
        .replace("os.write(1", "os.write(2")
        .replace("taken =", "os.set_blocking(1, False)\nos.write(1, bytes(300_000))\ntaken =", 1)
    )
    runtime.chmod(0o755)
    program = program_of(runtime, watched=True)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        try:
            for _ in range(5000):
                assert select.select([process.stderr], [], [], 20)[0], "a signal was lost"
                assert process.stderr.read(1) == b"."
                process.send_signal(signal.SIGUSR1)
            assert process.stderr.read(1) == b"."
            process.send_signal(signal.SIGTERM)
            # What a pipe took of it before there was no more room.
            assert len(process.stdout.read()) >= 64 << 10
            assert process.wait(20) == 7
        finally:
            process.kill()


def test_a_signal_while_the_runtime_is_spawned_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text('#!/bin/sh\ntest "$1" = delete || exec sleep 1000\n')
    runtime.chmod(0o755)
    spawn = os.posix_spawn

    def interrupted(*arguments: object, **options: object) -> int:
        pid = spawn(*arguments, **options)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "posix_spawn", interrupted)
    run = ContainerRun(str(runtime), interactive=False, terminal=False, watch_output=False)
    assert run.run("name", "/bundle").exit_code == 128 + signal.SIGTERM


def test_a_signal_reaches_a_command_whose_output_cannot_be_written_any_more(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(COUNTING.format(python=sys.executable).replace("os.write(1", "os.write(2"))
    runtime.chmod(0o755)
    said = runtime.read_text().replace("taken =", "os.write(1, b'lost')\ntaken =", 1)
    runtime.write_text(said)
    program = program_of(runtime, watched=True)
    with (
        open("/dev/full", "wb") as full,
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, bufsize=0
        ) as process,
    ):
        assert process.stderr is not None
        try:
            for _ in range(5000):
                assert select.select([process.stderr], [], [], 20)[0], "a signal was lost"
                assert process.stderr.read(1) == b"."
                process.send_signal(signal.SIGUSR1)
            assert process.stderr.read(1) == b"."
            process.send_signal(signal.SIGTERM)
            assert b"No space left on device" in process.stderr.read()
        finally:
            process.kill()


def test_a_runtime_that_hangs_or_is_gone_does_not_keep_the_rest_from_being_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text("#!/bin/sh\nexec sleep 1000\n")
    runtime.chmod(0o755)
    monkeypatch.setattr("veneer.container.runtime.DELETE_TIMEOUT_S", 0.1)
    delete_container(str(runtime), "name")
    assert "timed out" in caplog.text
    runtime.unlink()
    delete_container(str(runtime), "name")
    assert "No such file" in caplog.text


def test_signals_are_ours_again_when_the_container_has_ended() -> None:
    before = [signal.getsignal(number) for number in FORWARDED]
    run = ContainerRun("/bin/true", interactive=False, terminal=False, watch_output=False)
    assert run.run("name", "/bundle").exit_code == 0
    assert [signal.getsignal(number) for number in FORWARDED] == before


def test_all_of_the_output_comes_where_its_first_byte_is_timed(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text("#!/bin/sh\nhead -c 300000 /dev/zero\n")
    runtime.chmod(0o755)
    program = (
        "import sys\nfrom veneer.container.run import ContainerRun\n"
        "run = ContainerRun(sys.argv[1], interactive=False, terminal=False, watch_output=True)\n"
        "assert run.run('name', '/bundle').first_output is not None"
    )
    done = subprocess.run([sys.executable, "-c", program, runtime], stdout=subprocess.PIPE, check=True)
    assert done.stdout == bytes(300_000)


async def test_after_kill_9_of_the_command_the_container_ends(
    workplace: Path, settings: Settings, image: str
) -> None:
    async with running(settings, image, "echo ready; sleep 1000") as (process, output):
        assert await output.receive_some() == b"ready\n"
        (record,) = mount_records(settings.run_dir)
        assert exists(record.id)
        process.kill()
    # By whoever serves the mount, and the container goes before the record of it.
    await trio.to_thread.run_sync(eventually, lambda: not left(workplace))
    assert not exists(record.id)


async def test_a_runtime_that_dies_takes_the_container_with_it(
    workplace: Path, settings: Settings, image: str
) -> None:
    async with running(settings, image, "echo ready; sleep 1000") as (process, output):
        assert await output.receive_some() == b"ready\n"
        (record,) = mount_records(settings.run_dir)
        runtime = children(process.pid)
        assert len(runtime) == 1
        os.kill(runtime[0], signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGKILL
    assert not exists(record.id)
    assert not left(workplace)


async def test_unmounting_the_root_of_a_container_is_refused(
    workplace: Path, settings: Settings, image: str
) -> None:
    async with running(settings, image, "trap exit TERM; echo ready; sleep 1000 & wait") as (process, output):
        assert await output.receive_some() == b"ready\n"
        (record,) = mount_records(settings.run_dir)
        with pytest.raises(MountError, match="running container"):
            umount(record.mountpoint, settings.run_dir)
        process.terminate()
    assert not left(workplace)


async def test_a_terminal(settings: Settings, image: str) -> None:
    ours, theirs = pty.openpty()
    process = await trio.lowlevel.open_process(
        command_line(image, ["sh", "-c", "tty; test -t 0 && echo $TERM"], "-t"),
        stdin=theirs,
        stdout=theirs,
        env=environment(settings),
        start_new_session=True,
    )
    os.close(theirs)
    output = b""
    try:
        while chunk := await trio.to_thread.run_sync(os.read, ours, 1024):
            output += chunk
    except OSError:
        pass  # how a terminal says that its other end has been closed
    finally:
        os.close(ours)
    assert await process.wait() == 0, output
    assert output == b"/dev/pts/0\r\nxterm\r\n"


async def test_what_cannot_run_leaves_nothing(workplace: Path, settings: Settings, image: str) -> None:
    with pytest.raises(UsageError, match="not in /etc/passwd"):
        await run(image, settings, user="mallory")
    with pytest.raises(UsageError, match="not found"):
        run_image(RunRequest(image, ContainerOptions(), runtime="no-such-runtime"), settings)
    with pytest.raises(UsageError, match="not a terminal"):
        await run(image, settings, terminal=True)
    assert not left(workplace)


async def test_a_bundle_runs_with_a_mount_in_it(workplace: Path, settings: Settings, image: str) -> None:
    bundle = workplace / "bundle"
    await write_image_bundle(image, bundle, ContainerOptions(), settings)
    with pytest.raises(UsageError, match="already"):
        await write_image_bundle(image, bundle, ContainerOptions(), settings)
    mount_image(MountRequest.create(image, bundle / "rootfs", settings, writable=True))
    command = [str(find_runtime()), "run", "--bundle", str(bundle), f"veneer-test-{os.getpid()}"]
    done = await trio.run_process(command, capture_stdout=True, stdin=subprocess.DEVNULL)
    assert done.stdout == b"hello\n"
    umount(bundle / "rootfs", settings.run_dir)
    assert (bundle / "rootfs").is_dir(), "it was there before"
