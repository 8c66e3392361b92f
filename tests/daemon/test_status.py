"""``veneer status`` by its two ways, which must not differ."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.invoking import invoke
from tests.daemon.test_daemon import environment, mount, number_of, processes, umount
from tests.processes import children
from tests.waiting import eventually
from veneer.daemon import mounts
from veneer.daemon.ask import DAEMON_SOCKET, ask
from veneer.daemon.lifecycle import stop_daemon
from veneer.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.fuse]

#: The command where the long way cannot be gone.
SHORT_ONLY = "import sys; sys.modules['veneer.cli.main'] = None; from veneer.cli.quick import main; main()"
#: What differs from one moment to the next.
PASSING = re.compile(r"for \d+ s|[\d.]+ MiB of memory|\d+ of \d+ descriptors")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, backend="erofs-fanotify")


def short(settings: Settings, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SHORT_ONLY, "status", *words]
    return subprocess.run(command, env=plain(settings), capture_output=True, text=True, check=False)


def plain(settings: Settings) -> dict[str, str]:
    """An environment that says where, and nothing else."""
    return {name: value for name, value in environment(settings).items() if name != "VENEER_BACKEND"}


def without_passing(value: object) -> object:
    if isinstance(value, list):
        return [without_passing(one) for one in value]
    if isinstance(value, dict):
        passing = ("uptime_s", "memory", "descriptors")
        return {name: without_passing(one) for name, one in value.items() if name not in passing}
    return value


def shown_by_both(
    settings: Settings, compared: Callable[[str], object], *words: str
) -> "subprocess.CompletedProcess[str]":
    """What the short way says, which is what the long way says.

    Both are asked again while that changes: what a read has brought along may be on its way still.
    """
    for _ in range(10):
        found, said = short(settings, *words), invoke("status", *words, env=environment(settings))
        if compared(found.stdout) == compared(said.stdout):
            break
    assert compared(found.stdout) == compared(said.stdout)
    assert (found.returncode, found.stderr) == (0, "")
    return found


def test_both_ways_say_the_same(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "one", settings, writable=True)
    mount(image, workplace / "\N{SNOWMAN} two", settings)
    assert (workplace / "one/etc/hello").read_bytes() == b"hello\n"
    umount(workplace / "\N{SNOWMAN} two", settings)
    mount(image, workplace / "\N{SNOWMAN} two", settings)
    found = shown_by_both(settings, lambda text: PASSING.sub("", text))
    assert str(workplace / "\N{SNOWMAN} two") in found.stdout
    assert f"log: {settings.run_dir}/daemon.log" in found.stdout
    found = shown_by_both(settings, lambda text: json.dumps(without_passing(json.loads(text))), "--json")
    assert found.stdout.startswith('{\n  "daemon": {\n')
    # As where a service manager takes what it says.
    (settings.run_dir / "daemon.log").unlink()
    assert "log: on the standard error" in shown_by_both(settings, lambda text: PASSING.sub("", text)).stdout
    for name in ("one", "\N{SNOWMAN} two"):
        umount(workplace / name, settings)
    assert short(settings).stdout.startswith("nothing is mounted\n\ndaemon: process ")


def test_what_has_a_process_of_its_own_goes_the_long_way(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "one", settings)
    mount(image, workplace / "two", replace(settings, backend="fuse"))
    assert short(settings).returncode == 1
    command = [sys.executable, "-m", "veneer", "status"]
    done = subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=True)
    assert f"{workplace}/one, served by the daemon" in done.stdout
    assert f"{workplace}/two, served by process" in done.stdout
    umount(workplace / "two", settings)
    assert short(settings).returncode == 0
    umount(workplace / "one", settings)


def test_what_is_not_about_this_daemon_or_is_wrong_goes_the_long_way(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "one", settings)

    def answer(*words: str, **environ: str) -> object:
        environ = environment(settings) | environ
        return ask(settings.run_dir, DAEMON_SOCKET, "show", words=words, environ=environ)["type"]

    assert answer() == answer("--json") == answer("-q") == "shown"
    for words in (["--help"], ["-v"], ["--nonsense"], ["word"], ["--timeout", "-1"]):
        assert answer(*words) == "elsewhere", words
    assert answer(VENEER_RUN_DIR="/elsewhere") == answer(VENEER_CACHE_QUOTA="much") == "elsewhere"
    umount(workplace / "one", settings)


def test_that_nothing_is_mounted_is_told_without_a_daemon(
    workplace: Path, settings: Settings, image: str
) -> None:
    nothing = "nothing is mounted\n"

    def both() -> tuple[str, str]:
        return short(settings).stdout, invoke("status", env=plain(settings)).stdout

    assert both() == (nothing, nothing), "nothing ever was"
    mount(image, workplace / "one", settings)
    mount(image, workplace / "two", replace(settings, backend="fuse"))
    umount(workplace / "one", settings)
    umount(workplace / "two", settings)
    assert stop_daemon(settings.run_dir)
    assert (settings.run_dir / "mounts").exists()
    assert both() == (nothing, nothing)
    # There may be more to tell, to clean up or to complain about.
    assert short(settings, "--json").returncode == 1
    assert short(settings, "--nonsense").returncode == 1
    for name in ("daemon.sock", "mounts/0123456789abcdef", f"mounts/.0123456789abcdef.{os.getpid()}"):
        (settings.run_dir / name).mkdir()
        assert short(settings).returncode == 1, name
        (settings.run_dir / name).rmdir()
    for directory in (settings.run_dir, settings.run_dir / "mounts"):
        before = directory.stat().st_mode
        directory.chmod(0o777)
        assert short(settings).returncode == 1
        directory.chmod(before)
    wrong = {**plain(settings), "VENEER_CACHE_QUOTA": "much"}
    done = subprocess.run([sys.executable, "-m", "veneer", "status"], env=wrong, check=False)
    assert done.returncode == 2
    assert both() == (nothing, nothing)


def test_a_reader_that_has_seen_enough(workplace: Path, settings: Settings, image: str) -> None:
    mount(image, workplace / "one", settings)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SHORT_ONLY, "status"]
    done = subprocess.run(
        command, env=environment(settings), stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    umount(workplace / "one", settings)


def test_the_memory_of_the_process_that_writes_metadata_images_counts(
    workplace: Path, settings: Settings, image: str
) -> None:
    mount(image, workplace / "one", settings)
    worker = processes(settings)["worker"]
    eventually(lambda: len(children(worker)) == 1)
    (scribe,) = children(worker)

    def resident(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    told = mounts.list_mounts(settings.run_dir).daemon
    assert told is not None
    assert number_of(told, "memory") >= resident(worker) + resident(scribe) // 2
    umount(workplace / "one", settings)
