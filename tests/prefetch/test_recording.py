"""Recording what the kernel reads: exactly the pages of the files, each time, and at no price for others."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from tests.daemon.layouts import busybox_layer, lazy_image, settings_in
from veneer.container.options import ContainerOptions
from veneer.daemon import client, lifecycle, mounts
from veneer.daemon.ask import DAEMON_SOCKET, ask
from veneer.daemon.client import RunRequest
from veneer.daemon.recording import record_image
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import MountError, UsageError
from veneer.events import Event, Notice
from veneer.image import open_image
from veneer.index.model import ImageIndex
from veneer.mount.bdi import ASKED_KB
from veneer.mount.state import mount_records
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile, Use, merge_profiles
from veneer.prefetch.recorder import PAGE
from veneer.settings import Settings
from veneer.store.spanstore import open_store
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at

pytestmark = [pytest.mark.root]

#: Between files that are read, so that their pages have nothing else in them.
GAP = bytes(3 * PAGE)
FILES = {
    b"data/whole": os.urandom(70_001),
    b"data/small": b"small\n",
    b"data/part": os.urandom(300 * PAGE),
    b"data/never": os.urandom(9 * PAGE),
    b"data/other": os.urandom(5 * PAGE + 1),
}
#: Reads two files as a whole, the first page of another, after which the kernel would read on, one far behind
#: it, and the first file again.
SCRIPT = (
    "{ cat /data/whole /data/small; dd if=/data/part bs=4096 count=1; "
    "dd if=/data/part bs=4096 skip=200 count=1; cat /data/whole; }"
)
OTHER = "cat /data/other /data/small"


@dataclass(frozen=True)
class Sample:
    """An image whose second layer has nothing but :data:`FILES` in it."""

    name: str
    layer: Digest
    size: int
    index: ImageIndex

    def pages(self, path: bytes, first: int = 0, count: int | None = None) -> set[int]:
        """The device's pages that pages of a file lie on."""
        node = node_at(self.index, path)
        assert node is not None
        length = None if count is None else count * PAGE
        (extent,) = self.index.extents(node, first * PAGE, length)
        return set(range(extent.offset // PAGE, -(-(extent.offset + extent.length) // PAGE)))

    @property
    def expected(self) -> set[int]:
        whole = self.pages(b"data/whole") | self.pages(b"data/small")
        return whole | self.pages(b"data/part", 0, 1) | self.pages(b"data/part", 200, 1)


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiled")
    items = [TarItem(b"data", "dir", 0o755)]
    for number, (name, content) in enumerate(FILES.items()):
        items += [TarItem(name, content=content), TarItem(b"data/gap%d" % number, content=GAP)]
    base = busybox_layer(TarItem(b"bin/dd", "symlink", 0o777, link=b"busybox"))

    async def make() -> None:
        await lazy_image(directory, settings_in(directory), [base, tar(items)], {"Cmd": ["sh"]})

    trio.run(make)
    return directory


@pytest.fixture
def sample(workplace: Path, layout: Path) -> Sample:
    shutil.copytree(layout, workplace / "layout")
    name = f"oci:{workplace}/layout:lazy"

    async def opened() -> Sample:
        async with open_image(name, settings_in(layout)) as image:
            return Sample(name, image.devices[1].diff_id, image.devices[1].spans.size, await image.load())

    return trio.run(opened)


def record(
    sample: Sample, settings: Settings, script: str = SCRIPT, notices: list[str] | None = None
) -> Profile:
    def report(event: Event) -> None:
        assert isinstance(event, Notice)
        assert notices is not None, event.message
        notices.append(event.message)

    options = ContainerOptions(arguments=("sh", "-c", script + " >/dev/null 2>&1"))
    result, profile = record_image(RunRequest(sample.name, options), settings, "default", report=report)
    assert result.exit_code == 0
    return profile


def pages(uses: Iterable[Use], layer: Digest) -> set[int]:
    found: set[int] = set()
    for use in uses:
        if use.layer == layer:
            assert use.offset % PAGE == 0
            span = set(range(use.offset // PAGE, -(-use.end // PAGE)))
            assert not span & found, "no page is used twice"
            found |= span
    return found


def uses(profile: Profile, layer: Digest) -> list[tuple[int, int]]:
    return [(use.offset, use.length) for use in profile.uses if use.layer == layer]


def mounting(sample: Sample, directory: Path, settings: Settings, *, writable: bool = False) -> MountInfo:
    return client.mount_image(MountRequest.create(sample.name, directory, settings, writable=writable))


def fill(sample: Sample, settings: Settings) -> None:
    """Have all layers complete in the cache, also what no file leads to. Nothing may be mounted."""

    async def complete() -> None:
        async with open_store(settings) as store, open_image(sample.name, settings) as image:
            for device, source in zip(image.devices, image.sources, strict=True):
                attached = store.attach(device, source)
                assert await store.fetch_rest(attached)
                assert await store.prove(attached)

    trio.run(complete)


def read_ahead(settings: Settings, mount: str) -> int:
    """What the kernel reads ahead in files of a mount, in KiB."""
    state = json.loads((settings.run_dir / "mounts" / mount / "resident.json").read_bytes())
    (name,) = state["superblocks"]
    return int(Path(f"/sys/class/bdi/{name}/read_ahead_kb").read_text())


def test_exactly_the_pages_of_what_is_read_are_recorded(settings: Settings, sample: Sample) -> None:
    profile = record(sample, settings)
    assert pages(profile.uses, sample.layer) == sample.expected
    assert all(use.end <= sample.size for use in profile.uses if use.layer == sample.layer)
    assert len(profile.layers) == 2, "and of the shell"
    assert profile.command[:2] == ("sh", "-c")
    assert profile.runs == 1
    first = [use.first_ms for use in profile.uses]
    assert first == sorted(first)
    assert any(use.wait_ms for use in profile.uses)
    assert mount_records(settings.run_dir) == []


def test_a_warm_cache_makes_no_difference(settings: Settings, sample: Sample) -> None:
    cold = record(sample, settings)
    warm = record(sample, settings)
    fill(sample, settings)
    complete = record(sample, settings)
    assert uses(warm, sample.layer) == uses(cold, sample.layer) == uses(complete, sample.layer)
    assert not any(use.wait_ms for use in complete.uses), "nothing had to be fetched"
    for layer in cold.layers:
        assert pages(warm.uses, layer) == pages(cold.uses, layer) == pages(complete.uses, layer)


def test_two_runs_make_one_profile(settings: Settings, sample: Sample) -> None:
    merged = merge_profiles([record(sample, settings), record(sample, settings, OTHER)])
    assert merged.runs == 2
    assert pages(merged.uses, sample.layer) == sample.expected | sample.pages(b"data/other")


def test_reads_of_other_mounts_are_warned_of(workplace: Path, settings: Settings, sample: Sample) -> None:
    mounting(sample, workplace / "mnt", settings)
    notices: list[str] = []
    record(sample, settings, notices=notices)
    assert len(notices) == 1
    assert "other mounts have layers of this image" in notices[0]
    mounts.umount(workplace / "mnt", settings.run_dir)
    mounting(sample, workplace / "mnt", settings, writable=True)
    mounts.umount(workplace / "mnt", settings.run_dir)
    record(sample, settings)  # what is kept for another start is in nobody's way


def test_a_mount_that_is_not_recorded_costs_what_it_did(
    workplace: Path, settings: Settings, sample: Sample
) -> None:
    fill(sample, settings)
    info = mounting(sample, workplace / "mnt", settings)
    assert read_ahead(settings, info.id) > 0

    def events() -> int:
        found = mounts.list_mounts(settings.run_dir).daemon
        assert found is not None
        return int(found["events"]["events"])

    before = events()
    assert (workplace / "mnt/data/whole").read_bytes() == FILES[b"data/whole"]
    assert events() == before, "a complete device asks nobody"
    with pytest.raises(MountError, match="not recorded"):
        ask(settings.run_dir, DAEMON_SOCKET, "recorded", id=info.id)
    record(sample, settings, notices=[])
    before = events()
    assert (workplace / "mnt/data/part").read_bytes() == FILES[b"data/part"]
    assert events() == before, "and not after a recording either"
    mounts.umount(workplace / "mnt", settings.run_dir)


def test_a_recorded_mount_reads_nothing_ahead(workplace: Path, settings: Settings, sample: Sample) -> None:
    request = MountRequest.create(sample.name, workplace / "mnt", settings, record=True)
    info = client.mount_image(request)
    assert read_ahead(settings, info.id) == ASKED_KB
    mounts.umount(workplace / "mnt", settings.run_dir)


@pytest.mark.fuse
@pytest.mark.parametrize("backend", ["fuse", "erofs-fuse"])
def test_other_backends_do_not_record(settings: Settings, sample: Sample, backend: str) -> None:
    with pytest.raises(UsageError, match=backend) as caught:
        record(sample, replace(settings, backend=backend))
    assert caught.value.hint is not None
    assert "erofs-fanotify" in caught.value.hint


def test_where_the_kernel_cannot_watch_files_nothing_is_recorded(
    workplace: Path, settings: Settings, sample: Sample
) -> None:
    (workplace / "memory").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", workplace / "memory"], check=True)
    try:
        with pytest.raises(MountError, match="erofs-fanotify"):
            record(sample, replace(settings, cache_dir=workplace / "memory/cache"))
        assert mount_records(settings.run_dir) == []
    finally:
        lifecycle.stop_daemon(settings.run_dir, force=True)
        subprocess.run(["umount", workplace / "memory"], check=True)


def veneer(settings: Settings, *words: str | Path) -> subprocess.Popen[str]:
    environment = {"VENEER_CACHE_DIR": str(settings.cache_dir), "VENEER_RUN_DIR": str(settings.run_dir)}
    return subprocess.Popen(
        [sys.executable, "-m", "veneer", *words],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(settings: Settings, *words: str | Path) -> str:
    with veneer(settings, *words) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out


def test_a_recording_that_a_restart_cut_in_two_is_an_error(settings: Settings, sample: Sample) -> None:
    words = ["profile", "record", "-i", sample.name, "--", "sh", "-c", "echo up; read x; cat /data/small"]
    with veneer(settings, *words) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        lifecycle.restart_daemon(settings.run_dir)
        _, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == MountError.exit_code
    assert "hint: record again" in errors
    assert not (settings.cache_dir / "profiles").exists()
    assert mount_records(settings.run_dir) == []


def test_the_commands(workplace: Path, settings: Settings, sample: Sample) -> None:
    """Record, show, export, merge, import: what a user does with profiles."""
    name, output = sample.name, workplace / "profile.json"
    command = ["--", "sh", "-c", SCRIPT + " >/dev/null 2>&1; echo said; exit 3"]
    with veneer(settings, "profile", "record", "-o", output, name, *command) as process:
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "said\n")
    assert "recorded" in errors
    assert "ended with 3" in errors
    recorded = Profile.parse(output.read_bytes())
    assert pages(recorded.uses, sample.layer) == sample.expected

    shown = json.loads(done(settings, "profile", "show", "--json", name))
    assert shown["bytes"] == recorded.size
    assert [layer["diff_id"] for layer in shown["layers"]] == list(map(str, recorded.layers))
    files = {file["path"]: file for file in shown["files"]}
    assert files.keys() == {"/bin/busybox", "/data/whole", "/data/small", "/data/part"}
    assert (files["/data/part"]["used"], files["/data/part"]["size"]) == (2 * PAGE, 300 * PAGE)
    assert files["/data/whole"]["used"] == files["/data/whole"]["size"] == 70_001
    assert files["/data/whole"]["first_ms"] < files["/data/part"]["first_ms"]
    text = done(settings, "profile", "show", name)
    assert text.split()[-5:] == ["8.0", "KiB", "1.2", "MiB", "/data/part"]
    assert text.endswith("  /data/part\n")
    assert str(sample.layer)[:19] in text
    assert "  /data/part\n" not in done(settings, "profile", "show", output)
    assert done(settings, "profile", "show", output, "--image", name) == text

    assert Profile.parse(done(settings, "profile", "export", name).encode()) == recorded
    done(settings, "profile", "record", "--merge", name, "--", "sh", "-c", OTHER + " >/dev/null")
    merged = Profile.parse(done(settings, "profile", "export", name).encode())
    assert merged.runs == 2
    assert pages(merged.uses, sample.layer) == sample.expected | sample.pages(b"data/other")

    done(settings, "profile", "merge", output, output, "--workload", "twice", "-o", workplace / "twice.json")
    done(settings, "profile", "import", name, workplace / "twice.json")
    twice = Profile.parse(done(settings, "profile", "export", name, "--workload", "twice").encode())
    assert (twice.workload, twice.runs) == ("twice", 2)
    done(settings, "cache", "clear")
    with veneer(settings, "profile", "show", name, "--workload", "missing") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 11
    assert "hint: there are: default, twice" in errors

    other = Profile("default", "", ("a",), 1, (Use(Digest.of(b"another layer"), 0, PAGE, 0, 0),))
    (workplace / "other.json").write_bytes(other.to_json())
    with veneer(settings, "profile", "import", name, workplace / "other.json") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "none of the layers" in errors
