"""Settings with an empty cache, and layers that are worth cutting."""

from pathlib import Path

import pytest

from veneer.oci.descriptor import Platform
from veneer.settings import Settings
from veneer.testing.images import Layer
from veneer.testing.tars import TarItem, whiteout


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
def layers() -> list[Layer]:
    """Two layers: small files, a large one, a device node; then a change."""
    text = b"".join(b"line %d\n" % number for number in range(60_000))
    base = (
        TarItem(b"etc", "dir", mode=0o755),
        *(TarItem(b"etc/small-%d" % number, content=b"%d" % number * 500) for number in range(40)),
        TarItem(b"large", content=text),
        TarItem(b"null", "char", rdev=(1, 3)),
    )
    change = (
        whiteout(b"etc/small-3"),
        TarItem(b"etc/new", content=b"new"),
        TarItem(b"sym", "symlink", link=b"etc/new"),
    )
    return [base, change]
