"""The commands around mounts, as a shell sees them: output, exit codes, what goes where."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from veneer.mount.kernel import mounts_at
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]


def veneer(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veneer", *arguments],
        env=environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "VENEER_CACHE_DIR": str(settings.cache_dir),
        "VENEER_RUN_DIR": str(settings.run_dir),
    }


def test_mount_status_and_umount(workplace: Path, settings: Settings, image: str) -> None:
    mountpoint = str(workplace / "mnt")
    done = veneer(settings, "mount", image, mountpoint, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    assert (info["mountpoint"], info["writable"], info["upper"]) == (mountpoint, True, None)
    (workplace / "mnt/new").touch()

    done = veneer(settings, "mount", image, mountpoint, "--read-only")
    assert (done.returncode, done.stdout) == (40, "")
    assert done.stderr.startswith(f"error: {mountpoint} is a mount point already")
    assert "hint: veneer umount" in done.stderr

    status = json.loads(veneer(settings, "status", "--json").stdout)
    (listed,) = status["mounts"]
    assert listed["daemon"]
    assert status["daemon"]["worker"] == info["pid"]
    assert listed["report"]["layers"][0]["size"] > 0
    shown = veneer(settings, "status").stdout
    assert mountpoint in shown
    (links,) = status["daemon"]["links"].values()
    assert all(link["most_requests"] == 16 for link in links.values())
    assert "not measured yet; 0 of 16 requests running, background without a limit" in shown

    assert veneer(settings, "umount", mountpoint).returncode == 0
    assert not mounts_at(workplace / "mnt")
    done = veneer(settings, "umount", mountpoint, "--json")
    assert done.returncode == 40
    assert json.loads(done.stderr)["message"] == f"nothing is mounted on {mountpoint}"
    assert veneer(settings, "status").stdout.startswith("nothing is mounted\n")


def test_options_that_exclude_each_other(settings: Settings, image: str) -> None:
    done = veneer(settings, "mount", image, "/nowhere", "--upper", "/tmp/upper", "--read-only")
    assert done.returncode == 2
    assert "exclude" in done.stderr


async def test_in_the_foreground(workplace: Path, settings: Settings, image: str) -> None:
    command = [sys.executable, "-m", "veneer", "mount", image, str(workplace / "mnt"), "--foreground"]
    process = await trio.lowlevel.open_process(command, env=environment(settings), stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with process.stdout:
        assert (await process.stdout.receive_some()).startswith(b"mounted ")
        assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
        process.terminate()
        assert await process.wait() == 0
    assert not (workplace / "mnt").exists()


async def test_in_the_foreground_again_after_kill_9(workplace: Path, settings: Settings, image: str) -> None:
    command = [sys.executable, "-m", "veneer", "mount", image, str(workplace / "mnt"), "--foreground"]
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = await trio.lowlevel.open_process(
            command, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        async with process.stdout:
            assert (await process.stdout.receive_some()).startswith(b"mounted ")
            assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
            process.send_signal(end)
            await process.wait()
    assert process.returncode == 0
    assert not (workplace / "mnt").exists()
    assert veneer(settings, "status").stdout.startswith("nothing is mounted\n")
