"""The repository contract on OCI layouts."""

from pathlib import Path

import pytest

from tests.contract.repository_suite import RepositoryContract
from veneer.source.base import Repository
from veneer.source.layout import OCILayout


class TestOCILayout(RepositoryContract):
    @pytest.fixture
    def repository(self, tmp_path: Path) -> Repository:
        return OCILayout(tmp_path / "one", create=True)

    @pytest.fixture
    def other_repository(self, tmp_path: Path) -> Repository:
        return OCILayout(tmp_path / "two", create=True)
