from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from trio.testing import MockClock

from tests.clocks import patient_clock
from tests.serve.clients import connect
from veneer.serve.registry import RegistryServer, serve_registry


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[RegistryServer]:
    async with serve_registry(directory, page_size=4, grace_s=0) as server:
        yield server


@pytest.fixture
async def client(server: RegistryServer) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(server.host) as client:
        yield client


@pytest.fixture
def jumping_clock() -> MockClock:
    return patient_clock()
