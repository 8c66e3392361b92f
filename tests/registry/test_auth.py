"""Authentication: who is asked for what, how often, and where credentials go."""

import base64
import io
import json
import logging
import ssl
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import trio
import trio.testing
import trustme

from tests.registry.servers import repository_at
from tests.transport.settings import settings_in
from tests.transport.wire import Handler, Seen, Wire, serve
from veneer.errors import RegistryError, Unauthorized, Unavailable, VeneerError
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_MANIFEST
from veneer.registry.client import RegistryRepository
from veneer.registry.credential import Credential
from veneer.serve.registry import BasicAuth, TokenAuth
from veneer.settings import Settings
from veneer.testing.actions import DropHeader, ExpireToken, Hold, Reset, Status
from veneer.testing.registry import ObjectStore, ScriptedRegistry, scripted_registry
from veneer.transport import Transport

USER, PASSWORD = "user", "hunter2-is-secret"
CONFIG = b'{"os":"linux","architecture":"amd64"}'
CONFIG_DESCRIPTOR = Descriptor(OCI_CONFIG, Digest.of(CONFIG), len(CONFIG))
MANIFEST = build_manifest(CONFIG_DESCRIPTOR, [])

LogIn = Callable[[str, Credential | None], Settings]


@pytest.fixture
def log_in(tmp_path: Path) -> LogIn:
    """Settings under which the user has, or has not, a credential for a host."""

    def settings(host: str, credential: Credential | None) -> Settings:
        path = tmp_path / "auth.json"
        entry: dict[str, str] = {}
        if credential is not None and credential.identity_token:
            entry = {"identitytoken": credential.secret}
        elif credential is not None:
            entry = {"auth": credential.basic.removeprefix("Basic ")}
        path.write_text(json.dumps({"auths": {host: entry}}))
        return settings_in(tmp_path, authfile=path)

    return settings


@asynccontextmanager
async def client(host: str, settings: Settings) -> AsyncIterator[RegistryRepository]:
    async with Transport(settings) as transport:
        yield repository_at(host, "team/app", transport, settings)


async def push(repository: RegistryRepository) -> None:
    await repository.push_blob(CONFIG_DESCRIPTOR, lambda: io.BytesIO(CONFIG))
    await repository.push_manifest(MANIFEST, OCI_MANIFEST, "v1")


def statuses(registry: ScriptedRegistry) -> list[tuple[str, int]]:
    """Method and status of all requests, tokens as such."""
    return [
        ("TOKEN" if record.path == "/token" else record.method, record.status) for record in registry.requests
    ]


class TestTokens:
    """A registry with the token flow."""

    @pytest.fixture
    def auth(self) -> TokenAuth:
        return TokenAuth({USER: PASSWORD}, anonymous_pull=True, expires_in_s=300.0)

    @pytest.fixture
    async def registry(self, tmp_path: Path, auth: TokenAuth, log_in: LogIn) -> AsyncIterator[ScriptedRegistry]:
        """With an image in it, and without a past."""
        async with scripted_registry(tmp_path / "registry", auth=auth) as registry:
            async with client(registry.host, log_in(registry.host, Credential(USER, PASSWORD))) as repository:
                await push(repository)
            registry.requests.clear()
            auth.issued = 0
            yield registry

    async def test_anonymous_pull(self, registry: ScriptedRegistry, log_in: LogIn) -> None:
        async with client(registry.host, log_in(registry.host, None)) as repository:
            await repository.resolve("v1")
            await repository.manifest("v1")
        assert statuses(registry) == [("HEAD", 401), ("TOKEN", 200), ("HEAD", 200), ("GET", 200)]
        assert registry.asked("GET", "/token")[0].header("authorization") is None
        assert parse_qs(registry.asked("GET", "/token")[0].query) == {
            "service": ["veneer"],
            "scope": ["repository:team/app:pull"],
        }

    async def test_anonymous_push_is_refused_with_a_hint(
        self, registry: ScriptedRegistry, log_in: LogIn
    ) -> None:
        async with client(registry.host, log_in(registry.host, None)) as repository:
            with pytest.raises(Unauthorized, match="UNAUTHORIZED") as caught:
                await repository.push_manifest(MANIFEST, OCI_MANIFEST, "v2")
        assert f"podman login {registry.host}" in str(caught.value.hint)
        assert len(registry.requests) <= 4

    async def test_wrong_password(self, registry: ScriptedRegistry, log_in: LogIn) -> None:
        async with client(registry.host, log_in(registry.host, Credential(USER, "wrong"))) as repository:
            with pytest.raises(Unauthorized) as caught:
                await repository.resolve("v1")
        assert "log in again" in str(caught.value.hint)
        assert statuses(registry) == [("HEAD", 401), ("TOKEN", 401)]

    async def test_one_token_for_all_who_wait(
        self, registry: ScriptedRegistry, auth: TokenAuth, log_in: LogIn
    ) -> None:
        async with (
            client(registry.host, log_in(registry.host, None)) as repository,
            trio.open_nursery() as nursery,
        ):
            for _ in range(10):
                nursery.start_soon(repository.manifest, "v1")
        assert auth.issued == 1

    async def test_one_refusal_for_all_who_wait(self, registry: ScriptedRegistry, log_in: LogIn) -> None:
        hold, last = Hold(), Hold()
        registry.faults.add(last, path="/manifests/", nth=5)
        registry.faults.add(hold, path="/token")
        registry.faults.add(Status(403), path="/token", count=None)
        async with (
            client(registry.host, log_in(registry.host, None)) as repository,
            trio.open_nursery() as nursery,
        ):

            async def fails() -> None:
                with pytest.raises(Unauthorized):
                    await repository.manifest("v1")

            for _ in range(5):
                nursery.start_soon(fails)
            await hold.arrived.wait()
            await last.arrived.wait()
            last.release.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            hold.release.set()
        assert len(registry.asked("GET", "/token")) == 1

    async def test_a_cancelled_waiter_does_not_take_the_token_along(
        self, registry: ScriptedRegistry, auth: TokenAuth, log_in: LogIn
    ) -> None:
        hold = Hold()
        registry.faults.add(hold, path="/token")
        async with (
            client(registry.host, log_in(registry.host, None)) as repository,
            trio.open_nursery() as nursery,
        ):
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await repository.manifest("v1")

            nursery.start_soon(impatient)
            await hold.arrived.wait()
            nursery.start_soon(repository.manifest, "v1")
            await trio.testing.wait_all_tasks_blocked(0.01)
            first.cancel()
        assert auth.issued == 1

    async def test_tokens_are_renewed_before_they_run_out(
        self, registry: ScriptedRegistry, auth: TokenAuth, log_in: LogIn, mock_clock: trio.testing.MockClock
    ) -> None:
        async with client(registry.host, log_in(registry.host, None)) as repository:
            for _ in range(12):
                await repository.resolve("v1")
                mock_clock.jump(100)
        assert [status for _, status in statuses(registry)].count(401) == 1
        assert auth.issued == 4

    async def test_a_token_refused_before_its_time_is_renewed_once(
        self, registry: ScriptedRegistry, auth: TokenAuth, log_in: LogIn
    ) -> None:
        async with client(registry.host, log_in(registry.host, None)) as repository:
            source = repository.blob(CONFIG_DESCRIPTOR)
            assert await source.read(0, 5) == CONFIG[:5]
            registry.faults.add(ExpireToken(auth), path="/blobs/")
            registry.requests.clear()
            assert await source.read(5, 5) == CONFIG[5:10]
            assert statuses(registry) == [("GET", 401), ("TOKEN", 200), ("GET", 206)]
            registry.faults.add(ExpireToken(auth), path="/blobs/", count=None)
            with pytest.raises(Unauthorized):
                await source.read(5, 5)
        assert len(registry.requests) <= 3 + 6

    async def test_refused_without_challenge(self, registry: ScriptedRegistry, log_in: LogIn) -> None:
        """Some registries name the token service only at the root of their API."""
        registry.faults.add(DropHeader("WWW-Authenticate"), path="/manifests/", count=None)
        async with client(registry.host, log_in(registry.host, None)) as repository:
            await repository.resolve("v1")
        assert statuses(registry) == [("HEAD", 401), ("GET", 401), ("TOKEN", 200), ("HEAD", 200)]

    async def test_expired_tokens_may_be_refused_with_403(
        self, registry: ScriptedRegistry, log_in: LogIn
    ) -> None:
        expired = Status(
            403,
            (("Content-Type", "application/json"),),
            b'{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate"}]}',
        )
        async with client(registry.host, log_in(registry.host, None)) as repository:
            await repository.manifest("v1")
            registry.faults.add(expired, path="/manifests/")
            await repository.manifest("v1")
            registry.faults.add(
                Status(403, expired.headers, b'{"errors":[{"code":"DENIED"}]}'), path="/manifests/"
            )
            with pytest.raises(Unauthorized, match="DENIED"):
                await repository.manifest("v1")

    async def test_identity_tokens(self, registry: ScriptedRegistry, auth: TokenAuth, log_in: LogIn) -> None:
        secret = auth.identity_token(USER)
        async with client(registry.host, log_in(registry.host, Credential("", secret, True))) as repository:
            await repository.push_manifest(MANIFEST, OCI_MANIFEST, "v2")
        assert ("POST", "/token") in [(record.method, record.path) for record in registry.requests]
        assert registry.asked("GET", "/token") == []

    async def test_faults_of_the_token_service(
        self, registry: ScriptedRegistry, log_in: LogIn, clock: trio.testing.MockClock
    ) -> None:
        registry.faults.add(Status(503), path="/token")
        registry.faults.add(Reset(), path="/token", nth=2)
        async with client(registry.host, log_in(registry.host, None)) as repository:
            await repository.manifest("v1")
            assert len(registry.asked("GET", "/token")) == 3
        registry.faults.add(Status(503), path="/token", count=None)
        registry.requests.clear()
        async with (
            client(registry.host, log_in(registry.host, None)) as repository,
            trio.open_nursery() as nursery,
        ):

            async def fails() -> None:
                with pytest.raises(Unavailable):
                    await repository.blob(CONFIG_DESCRIPTOR).read(0, 1)

            for _ in range(5):
                nursery.start_soon(fails)
        assert len(registry.asked("GET", "/token")) <= 5 * 10

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b'{"token": 5}',
            b'{"token": "a\\nb"}',
            b'{"token": ""}',
            b'"hunter2',
            b'{"access_token": null}',
        ],
    )
    async def test_malformed_tokens(self, body: bytes, registry: ScriptedRegistry, log_in: LogIn) -> None:
        registry.faults.add(Status(200, (), body), path="/token", count=None)
        async with client(registry.host, log_in(registry.host, None)) as repository:
            with pytest.raises(RegistryError, match="no valid token") as caught:
                await repository.manifest("v1")
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class TestBasic:
    """A registry that wants a password with every request."""

    @pytest.fixture
    def auth(self) -> BasicAuth:
        return BasicAuth({USER: PASSWORD})

    @pytest.fixture
    async def registry(self, tmp_path: Path, auth: BasicAuth) -> AsyncIterator[ScriptedRegistry]:
        async with scripted_registry(tmp_path / "registry", auth=auth) as registry:
            yield registry

    async def test_push_and_pull(self, registry: ScriptedRegistry, log_in: LogIn) -> None:
        async with client(registry.host, log_in(registry.host, Credential(USER, PASSWORD))) as repository:
            await push(repository)
            assert (await repository.manifest("v1")).data == MANIFEST
        assert [status for _, status in statuses(registry)].count(401) == 1

    @pytest.mark.parametrize("credential", [None, Credential(USER, "wrong"), Credential("", "token", True)])
    async def test_refusal(
        self, credential: Credential | None, registry: ScriptedRegistry, log_in: LogIn
    ) -> None:
        async with client(registry.host, log_in(registry.host, credential)) as repository:
            with pytest.raises(Unauthorized):
                await repository.manifest("v1")
        assert len(registry.requests) <= 2

    async def test_rotated_passwords_are_read_again(
        self, registry: ScriptedRegistry, auth: BasicAuth, log_in: LogIn
    ) -> None:
        async with client(registry.host, log_in(registry.host, Credential(USER, PASSWORD))) as repository:
            await push(repository)
            auth.users = {USER: "rotated"}
            log_in(registry.host, Credential(USER, "rotated"))
            await repository.manifest("v1")


async def test_credentials_stay_with_their_registry(tmp_path: Path, log_in: LogIn) -> None:
    """Neither tokens nor passwords go to the object store that a registry redirects to."""
    store = ObjectStore()
    auth = TokenAuth({USER: PASSWORD})
    async with (
        scripted_registry(tmp_path / "registry", auth=auth, object_store=store) as registry,
        client(registry.host, log_in(registry.host, Credential(USER, PASSWORD))) as repository,
    ):
        await push(repository)
        source = repository.blob(CONFIG_DESCRIPTOR)
        for start in range(5):
            assert await source.read(start, 5) == CONFIG[start : start + 5]
        store.expire()
        assert await source.read(0, 5) == CONFIG[:5]
        store.faults.add(Status(401, (("WWW-Authenticate", f'Basic realm="{store.host}"'),)), count=None)
        with pytest.raises(RegistryError):
            await source.read(0, 5)
        store.faults.clear()
        assert await source.read(0, 5) == CONFIG[:5]
    assert len(store.requests) >= 7
    assert store.leaks == []
    # Nor does the store have a say in how the registry is spoken to.
    sent = [record.header("authorization") for record in registry.requests if record.path != "/token"]
    assert all(value is None or value.startswith("Bearer ") for value in sent)


async def test_a_store_that_is_asked_directly_needs_no_token(
    tmp_path: Path, log_in: LogIn, mock_clock: trio.testing.MockClock
) -> None:
    auth = TokenAuth({USER: PASSWORD}, expires_in_s=300.0)
    async with (
        scripted_registry(tmp_path / "registry", auth=auth, object_store=ObjectStore()) as registry,
        client(registry.host, log_in(registry.host, Credential(USER, PASSWORD))) as repository,
    ):
        await push(repository)
        source = repository.blob(CONFIG_DESCRIPTOR)
        assert await source.read(0, 5) == CONFIG[:5]
        registry.requests.clear()
        mock_clock.jump(1_000)
        assert await source.read(5, 5) == CONFIG[5:10]
        assert statuses(registry) == []


@pytest.mark.parametrize("way", ["same port", "other port", "there and back"])
async def test_authorization_follows_only_within_the_origin(way: str, log_in: LogIn) -> None:
    received: list[str] = []
    hosts: dict[str, str] = {}

    async def elsewhere(seen: Seen, wire: Wire) -> None:
        received.append(seen.headers.get("authorization", ""))
        if way == "there and back":
            await wire.answer(302, headers={"Location": f"http://{hosts['registry']}/final"})
        else:
            await wire.answer(200, b"0123456789")

    async def registry(seen: Seen, wire: Wire) -> None:
        if seen.path == "/final":
            await elsewhere_final(seen, wire)
        elif "authorization" not in seen.headers:
            await wire.answer(401, headers={"WWW-Authenticate": "Basic realm=x"})
        elif way == "same port":
            await wire.answer(307, headers={"Location": "/final"})
        else:
            await wire.answer(307, headers={"Location": f"http://{hosts['store']}/blob?sig=1"})

    async def elsewhere_final(seen: Seen, wire: Wire) -> None:
        received.append(seen.headers.get("authorization", ""))
        await wire.answer(200, b"0123456789")

    async with serve(registry) as one, serve(elsewhere) as other:
        hosts.update(registry=one.host, store=other.host)
        async with client(one.host, log_in(one.host, Credential(USER, PASSWORD))) as repository:
            source = repository.blob(Descriptor(OCI_CONFIG, Digest.of(b""), 10))
            assert await source.read(0, 10) == b"0123456789"
    expected = Credential(USER, PASSWORD).basic
    assert received == {"same port": [expected], "other port": [""], "there and back": ["", ""]}[way]


def refusing(challenge: str) -> Handler:
    """A registry that answers everything with one challenge."""

    async def handler(seen: Seen, wire: Wire) -> None:
        await wire.answer(401, headers={"WWW-Authenticate": challenge})

    return handler


@pytest.mark.parametrize(
    ("challenge", "message"),
    [
        ('Bearer realm="http://auth.example/token"', "over plain http, refused"),
        ('Bearer realm="ftp://auth.example/"', "without a valid address"),
        ('Bearer realm="https://u:p@["', "without a valid address"),
        ("Negotiate", "of a kind that is not supported"),
        ("", "answered 401"),
        ("Bearer", "of a kind that is not supported"),
    ],
)
async def test_challenges_that_cannot_be_met(challenge: str, message: str, log_in: LogIn) -> None:
    async with serve(refusing(challenge)) as server:
        credential = Credential(USER, PASSWORD)
        async with client(server.host, log_in(server.host, credential)) as repository:
            with pytest.raises(RegistryError, match=message):
                await repository.manifest("v1")
        assert len(server.seen) <= 4
        assert not [seen for seen in server.seen if "authorization" in seen.headers]


async def test_a_registry_with_tls_may_not_name_a_plain_token_service(tmp_path: Path) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    asked: list[Seen] = []

    async def token(seen: Seen, wire: Wire) -> None:
        asked.append(seen)
        await wire.answer(200, b'{"token":"t"}')

    async with (
        serve(token) as service,
        serve(refusing(f'Bearer realm="http://{service.host}/token"'), tls=tls) as server,
        client(server.host, settings_in(tmp_path, ca_file=tmp_path / "ca.pem")) as repository,
    ):
        with pytest.raises(RegistryError, match="over plain http, refused"):
            await repository.manifest("v1")
    assert asked == []


async def test_wider_scopes_are_asked_for_once(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    async def registry(seen: Seen, wire: Wire) -> None:
        if seen.path == "/token":
            asked.append(sorted(parse_qs(seen.query)["scope"]))
            await wire.answer(200, json.dumps({"token": f"t{len(asked)}"}).encode())
        elif seen.headers.get("authorization") == "Bearer t2":
            await wire.answer(200, MANIFEST, {"Content-Type": OCI_MANIFEST})
        else:
            fault = (
                ',scope="repository:base:pull",error="insufficient_scope"'
                if "authorization" in seen.headers
                else ""
            )
            challenge = f'Bearer realm="http://{seen.headers["host"]}/token"{fault}'
            await wire.answer(401, headers={"WWW-Authenticate": challenge})

    async with serve(registry) as server, client(server.host, settings_in(tmp_path)) as repository:
        assert (await repository.manifest("v1")).data == MANIFEST
    own = "repository:team/app:pull"
    assert asked == [[own], ["repository:base:pull", own]]


async def test_nothing_secret_is_shown_or_logged(
    tmp_path: Path, log_in: LogIn, caplog: pytest.LogCaptureFixture
) -> None:
    """Passwords, tokens and signatures, when servers repeat them and everything is logged."""
    caplog.set_level(logging.DEBUG)
    mode = {"token": 200}
    token, signature = "tok3n-of-the-registry", "s1gnature-of-the-store"
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    async def registry(seen: Seen, wire: Wire) -> None:
        echo = json.dumps(
            {"errors": [{"code": "DENIED", "message": f"{seen.headers} {seen.body!r} {seen.target}"}]}
        )
        if seen.path == "/token" and mode["token"] == 200:
            await wire.answer(200, json.dumps({"token": token}).encode())
        elif seen.path == "/token":
            await wire.answer(mode["token"], echo.encode())
        elif "authorization" not in seen.headers:
            challenge = f'Bearer realm="http://{seen.headers["host"]}/token"'
            await wire.answer(401, echo.encode(), {"WWW-Authenticate": challenge})
        elif "/blobs/" in seen.path:
            await wire.answer(307, headers={"Location": f"http://localhost:1/b?X-Sig={signature}"})
        else:
            await wire.answer(403, echo.encode())

    shown = []
    for token_status in (200, 403):
        mode["token"] = token_status
        for credential in (Credential(USER, PASSWORD), Credential("", PASSWORD, identity_token=True)):
            async with serve(registry) as server:
                settings = replace(log_in(server.host, credential), read_deadline_s=0.5)
                async with client(server.host, settings) as repository:
                    for operation in (
                        lambda repository=repository: repository.manifest("v1"),
                        lambda repository=repository: repository.blob(CONFIG_DESCRIPTOR).read(0, 5),
                        lambda repository=repository: push(repository),
                    ):
                        with pytest.raises(VeneerError) as caught:
                            await operation()
                        shown.append("".join(traceback.format_exception(caught.value)) + str(caught.value.hint))
    text = "\n".join(shown) + caplog.text
    assert "DENIED" in text
    for secret in (PASSWORD, basic, token, signature):
        assert secret not in text
