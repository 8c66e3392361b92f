"""A converted image behind a registry, and settings with an empty cache."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

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


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        cache_dir=tmp_path / "cache",
        run_dir=tmp_path / "run",
        cache_quota=1 << 30,
        read_deadline_s=30,
        platform=Platform("linux", "amd64"),
    )


@pytest.fixture
async def registry(tmp_path: Path, settings: Settings) -> AsyncIterator[ScriptedRegistry]:
    """Serves ``app:v1``, converted, and the layout ``source``, of tag v1, from which it was made."""
    write_image([BASE, TOP], tmp_path / "registry/source", "v1", config={"Cmd": ["/bin/tool"]})
    async with scripted_registry(tmp_path / "registry") as registry:
        elsewhere = replace(settings, cache_dir=tmp_path / "convert-cache")
        await convert(f"oci:{tmp_path / 'registry/source'}:v1", f"{registry.host}/app:v1", elsewhere)
        del registry.requests[:]
        yield registry
