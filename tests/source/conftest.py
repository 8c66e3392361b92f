"""A layout that is not there yet, and its directory."""

from pathlib import Path

import pytest

from veneer.source.layout import OCILayout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layout"


@pytest.fixture
def layout(path: Path) -> OCILayout:
    return OCILayout(path, create=True)
