"""The contract of repositories, kept by the registry client against real registries."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contract.repository_suite import RepositoryContract
from tests.registry.servers import docker_registry, repository_at
from tests.transport.settings import settings_in

from veneer.registry.client import RegistryRepository
from veneer.settings import Settings
from veneer.transport import Transport


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
async def transport(settings: Settings) -> AsyncIterator[Transport]:
    async with Transport(settings) as transport:
        yield transport


@pytest.mark.network
class TestDockerRegistry(RepositoryContract):
    """Debian's docker-registry 2.8: ranges, no referrers API, uploads that must be asked how far they are."""

    @pytest.fixture
    async def host(self, tmp_path: Path) -> AsyncIterator[str]:
        async with docker_registry(tmp_path) as host:
            yield host

    @pytest.fixture
    def repository(self, host: str, transport: Transport, settings: Settings) -> RegistryRepository:
        return repository_at(host, "team/app", transport, settings)

    @pytest.fixture
    def other_repository(self, host: str, transport: Transport, settings: Settings) -> RegistryRepository:
        return repository_at(host, "team/other", transport, settings)
