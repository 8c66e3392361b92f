"""A registry that misbehaves on demand, and a client for it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio.testing

from tests.clocks import patient_clock
from tests.registry.servers import repository_at
from tests.transport.settings import settings_in
from veneer.registry.client import RegistryRepository
from veneer.settings import Settings
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.transport import Transport


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """A fast clock that does not take a busy machine for a stall."""
    return patient_clock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
async def transport(settings: Settings) -> AsyncIterator[Transport]:
    async with Transport(settings) as transport:
        yield transport


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[ScriptedRegistry]:
    async with scripted_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def repository(registry: ScriptedRegistry, transport: Transport, settings: Settings) -> RegistryRepository:
    return repository_at(registry.host, "team/app", transport, settings)
