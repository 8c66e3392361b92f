"""The contract of repositories, kept by the registry client against real registries."""

import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from tests.contract.repository_suite import RepositoryContract
from tests.registry.servers import docker_registry, repository_at
from tests.transport.settings import settings_in
from veneer.registry.client import RegistryRepository
from veneer.registry.credential import Credential
from veneer.serve.registry import TokenAuth, serve_registry
from veneer.settings import Settings
from veneer.transport import Transport


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class _Repositories:
    """Two repositories of the registry at ``host``."""

    @pytest.fixture
    def repository(self, host: str, transport: Transport, settings: Settings) -> RegistryRepository:
        return repository_at(host, "team/app", transport, settings)

    @pytest.fixture
    def other_repository(self, host: str, transport: Transport, settings: Settings) -> RegistryRepository:
        return repository_at(host, "team/other", transport, settings)


@pytest.mark.network
class TestDockerRegistry(_Repositories, RepositoryContract):
    """Debian's docker-registry 2.8: no referrers API, and uploads as most registries have them."""

    @pytest.fixture
    async def host(self, tmp_path: Path) -> AsyncIterator[str]:
        async with docker_registry(tmp_path) as host:
            yield host


class TestEmbeddedRegistry(_Repositories, RepositoryContract):
    """The embedded registry: the API as specified, referrers included."""

    @pytest.fixture
    async def host(self, tmp_path: Path) -> AsyncIterator[str]:
        async with serve_registry(tmp_path / "registry") as server:
            yield server.host


class TestTokensAndTLS(_Repositories, RepositoryContract):
    """The same behind tokens, and TLS with a certificate of a private authority."""

    @pytest.fixture
    async def host(self, tmp_path: Path, authority: trustme.CA) -> AsyncIterator[str]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        auth = TokenAuth({"user": "password"})
        async with serve_registry(tmp_path / "registry", auth=auth, tls=tls) as server:
            yield server.host

    @pytest.fixture
    async def settings(self, host: str, tmp_path: Path, authority: trustme.CA) -> Settings:
        ca_file, authfile = tmp_path / "ca.pem", tmp_path / "auth.json"
        authority.cert_pem.write_to_path(str(ca_file))
        basic = Credential("user", "password").basic.removeprefix("Basic ")
        authfile.write_text(json.dumps({"auths": {host: {"auth": basic}}}))
        return settings_in(tmp_path, ca_file=ca_file, authfile=authfile)
