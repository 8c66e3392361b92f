"""A converted image behind a registry, and settings with an empty cache."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from veneer.convert.convert import convert
from veneer.oci.descriptor import Platform
from veneer.settings import Settings
from veneer.testing.images import write_image
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem

BIG = b"".join(b"line %d\n" % number for number in range(100_000))

BASE = (
    TarItem(b"etc", "dir", mode=0o755),
    TarItem(b"etc/os-release", content=b"ID=test\n", mode=0o644, uid=1, gid=2, mtime_ns=1_700_000_000 * 10**9),
    TarItem(b"big", content=BIG),
    TarItem(b"sparse", pieces=((5_000_000, b"middle"),), size=9_000_000),
    TarItem(b"bin", "symlink", link=b"usr/bin"),
    TarItem(b"usr/bin/tool", content=b"#!tool", mode=0o4755),
    TarItem(b"hard", "link", link=b"usr/bin/tool"),
)
TOP = (
    TarItem(b"release", "symlink", link=b"/etc/../../etc/os-release"),
    TarItem(b"loop", "symlink", link=b"loop"),
    TarItem(b"out", "symlink", link=b"../../../../etc/os-release"),
    TarItem(b"tool", "symlink", link=b"bin/tool"),
    TarItem(b"usr/bin/absolute", "symlink", link=b"/etc/os-release"),
    TarItem(b"empty"),
    TarItem(b"xattrs", content=b"x", xattrs=((b"user.note", b"kept"),)),
)


def settings_in(directory: Path) -> Settings:
    return Settings(
        cache_dir=directory / "cache",
        run_dir=directory / "run",
        cache_quota=1 << 30,
        read_deadline_s=30,
        platform=Platform("linux", "amd64"),
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout ``source``, of tag v1, and ``app``, which was made of it; to be copied."""
    directory = tmp_path_factory.mktemp("repositories")
    write_image([BASE, TOP], directory / "registry/source", "v1", config={"Cmd": ["/bin/tool"]})
    source, made = f"oci:{directory}/registry/source:v1", f"oci:{directory}/registry/app:v1"
    trio.run(convert, source, made, settings_in(directory))
    return directory / "registry"


@pytest.fixture
async def registry(tmp_path: Path, repositories: Path) -> AsyncIterator[ScriptedRegistry]:
    """Serves ``app:v1`` and ``source:v1``."""
    shutil.copytree(repositories, tmp_path / "registry")
    async with scripted_registry(tmp_path / "registry") as registry:
        yield registry
