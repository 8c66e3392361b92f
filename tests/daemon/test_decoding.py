"""The daemon's process that decodes: used by all mounts, seen in the status, and gone with the worker."""

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.invoking import invoke
from tests.daemon.layouts import lazy_image, settings_in
from tests.daemon.test_daemon import another_worker, environment, kill, mount, processes, umount
from tests.waiting import eventually
from veneer.daemon import mounts
from veneer.settings import Settings
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, backend="erofs-fanotify")


#: Enough for a process of its own.
LARGE = random.Random(2).randbytes(40 << 20)


@pytest.fixture(scope="module")
def large_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    trio.run(lazy_image, directory, settings_in(directory), [tar([TarItem(b"large", content=LARGE)])])
    return directory


@pytest.fixture
def image(large_layout: Path) -> str:
    return f"oci:{large_layout}:lazy"


def told(settings: Settings) -> dict[str, Any]:
    found = mounts.list_mounts(settings.run_dir).daemon
    assert found is not None
    return found


def fetched(image: str, point: Path, settings: Settings) -> int:
    """Have all of an image fetched to a cache of its own, and read it; spans that the process has decoded."""
    mount(image, point, replace(settings, cache_dir=point.with_name(f"cache-{point.name}")), complete=True)
    eventually(lambda: is_complete(point, settings))
    assert (point / "large").read_bytes() == LARGE
    count = decoded(settings)
    umount(point, settings)
    return count


def decoded(settings: Settings) -> int:
    """Spans of what is mounted now that the process has decoded."""
    return sum(int(store["entrusted"]) for store in told(settings)["stores"].values())


def is_complete(point: Path, settings: Settings) -> bool:
    reports = (
        one.report for one in mounts.list_mounts(settings.run_dir).mounts if one.record.mountpoint == point
    )
    return any(report is not None and report.complete == len(report.layers) for report in reports)


def test_all_mounts_use_it(workplace: Path, settings: Settings, image: str) -> None:
    fetched(image, workplace / "one", settings)
    eventually(lambda: told(settings)["decoder"])
    pid = told(settings)["decoder"]
    assert fetched(image, workplace / "two", settings) > 0
    assert f"process {pid} decodes" in invoke("status", env=environment(settings)).stdout
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not told(settings)["decoder"])
    fetched(image, workplace / "three", settings)
    eventually(lambda: told(settings)["decoder"])


def test_it_goes_with_the_worker_and_serves_its_successor(
    workplace: Path, settings: Settings, image: str
) -> None:
    """Whose descriptors of what was mounted before are those that came with events."""
    mount(image, workplace / "held", settings)
    fetched(image, workplace / "one", settings)
    eventually(lambda: told(settings)["decoder"])
    first, before = told(settings)["decoder"], processes(settings)["worker"]
    kill(settings, "worker")
    another_worker(settings, before)
    eventually(lambda: not Path(f"/proc/{first}").exists())
    fetched(image, workplace / "two", settings)
    eventually(lambda: told(settings)["decoder"])
    assert (workplace / "held/large").read_bytes() == LARGE
    eventually(lambda: decoded(settings) > 0)
    umount(workplace / "held", settings)
