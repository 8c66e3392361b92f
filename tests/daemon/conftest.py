"""One converted image for all tests, and a directory each that must be left without mounts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.daemon.layouts import LARGE, busybox_layer, lazy_image, nothing_left, settings_in
from veneer.settings import Settings
from veneer.testing.tars import TarItem

#: What ``sample`` says.
CONFIG = {"Cmd": ["sh", "-c", "cat /etc/hello"], "Env": ["A=image"], "WorkingDir": "/home"}
PASSWD = b"root:x:0:0::/root:/bin/sh\nbob:x:1007:1008:Bob:/home/bob:/bin/sh\n"
GROUP = b"root:x:0:\nbob:x:1008:\nwheel:x:10:alice,bob\n"


@pytest.fixture(scope="session")
def sample_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image ``lazy`` (and ``plain``, which has no index)."""
    directory = tmp_path_factory.mktemp("sample")
    layer = busybox_layer(
        TarItem(b"etc/hello", content=b"hello\n"),
        TarItem(b"etc/passwd", content=PASSWD),
        TarItem(b"etc/group", content=GROUP),
        TarItem(b"home/bob", "dir", 0o750, 1007, 1008),
        TarItem(b"large", content=LARGE),
    )

    async def make() -> None:
        await lazy_image(directory, settings_in(directory), [layer], CONFIG)

    trio.run(make)
    return directory


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A directory for mounts and state."""
    with nothing_left(tmp_path):
        yield tmp_path


@pytest.fixture
def settings(workplace: Path) -> Settings:
    """Settings that keep everything in the workplace."""
    return settings_in(workplace)


@pytest.fixture
def image(workplace: Path, sample_layout: Path) -> str:
    """The reference of the sample, in a layout that the test may damage."""
    shutil.copytree(sample_layout, workplace / "layout")
    return f"oci:{workplace}/layout:lazy"
