"""Where credentials are found, and what of them is never shown."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio.testing
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.transport.settings import settings_in
from veneer.errors import UsageError
from veneer.registry.helper import HELPER_TIMEOUT_S
from veneer.registry.keychain import Credential, Keychain


def auth(user: str, secret: str = "pw") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}


async def look_up(directory: Path, content: object, host: str, repository: str = "app") -> Credential | None:
    path = directory / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return await Keychain(settings_in(directory, authfile=path)).credential(host, repository)


@pytest.mark.parametrize(
    ("repository", "user"),
    [
        ("team/app", "exact"),
        ("team/app/sub", "exact"),
        ("team/other", "team"),
        ("teams", "host"),
        ("x/y", "host"),
    ],
)
async def test_the_longest_path_wins(tmp_path: Path, repository: str, user: str) -> None:
    auths = {
        "reg.example": auth("host"),
        "reg.example/team/app": auth("exact"),
        "reg.example/team": auth("team"),
        "reg.example:5000": auth("other port"),
    }
    assert await look_up(tmp_path, {"auths": auths}, "reg.example", repository) == Credential(user, "pw")


@pytest.mark.parametrize(
    "key",
    [
        "docker.io",
        "index.docker.io",
        "https://index.docker.io/v1/",
        "registry-1.docker.io",
        "https://docker.io",
    ],
)
async def test_docker_hub_has_several_names(tmp_path: Path, key: str) -> None:
    assert await look_up(tmp_path, {"auths": {key: auth("hub")}}, "docker.io", "library/debian") is not None


@pytest.mark.parametrize(
    "key", ["https://reg.example/v2/", "http://reg.example", "reg.example/v1/", "reg.example/"]
)
async def test_keys_may_be_urls(tmp_path: Path, key: str) -> None:
    assert await look_up(tmp_path, {"auths": {key: auth("u")}}, "reg.example") == Credential("u", "pw")


async def test_other_hosts_get_nothing(tmp_path: Path) -> None:
    auths = {"reg.example": auth("u"), "a.reg.example": {}}
    for host in ("reg.example:5000", "a.reg.example", "reg.example.org", "docker.io"):
        assert await look_up(tmp_path, {"auths": auths}, host) is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"username": "u", "password": "p:w"}, Credential("u", "p:w")),
        (auth("u", "p:w"), Credential("u", "p:w")),
        (auth("u", "pw\0\0"), Credential("u", "pw")),
        ({**auth("u"), "identitytoken": "tok"}, Credential("", "tok", identity_token=True)),
        ({}, None),
        ({"auth": ""}, None),
    ],
)
async def test_entries(tmp_path: Path, entry: object, expected: Credential | None) -> None:
    assert await look_up(tmp_path, {"auths": {"reg.example": entry}}, "reg.example") == expected


async def test_standard_places_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for name in ("XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    places = ["run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json", ".dockercfg"]
    keychain = Keychain(replace(settings_in(tmp_path), authfile=None))
    assert await keychain.credential("reg.example", "app") is None
    for place in reversed(places):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {"reg.example": auth(place)}
        path.write_text(json.dumps(entries if place == ".dockercfg" else {"auths": entries}))
        found = await keychain.credential("reg.example", "app")
        assert found is not None
        assert found.username == place


async def test_a_missing_file_matters_only_when_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json"):
        await Keychain(settings_in(tmp_path, authfile=tmp_path / "absent.json")).credential(
            "reg.example", "app"
        )


SECRET = "c2VjcmV0OnNlY3JldA"


@pytest.mark.parametrize(
    "content",
    [
        f'{{"auths": {{"reg.example": {{"auth": "{SECRET}',
        f'["{SECRET}"]',
        f'{{"auths": "{SECRET}"}}',
        f'{{"auths": {{"reg.example": "{SECRET}"}}}}',
        f'{{"auths": {{"reg.example": {{"auth": "{SECRET}!"}}}}}}',
        '{"auths": {"reg.example": {"auth": "bm9jb2xvbg=="}}}',
        f'{{"auths": {{}}, "auths": {{"{SECRET}": 1}}}}',
        f'{{"credHelpers": {{"reg.example": ["{SECRET}"]}}}}',
        f'{{"credHelpers": "{SECRET}"}}',
        f'{{"credsStore": {{"x": "{SECRET}"}}}}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
async def test_malformed_files_are_named_and_not_quoted(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"given\.json is malformed") as caught:
        await look_up(tmp_path, content, "reg.example")
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    assert caught.value.__cause__ is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["auths", "auth", "credHelpers", "reg.example", "identitytoken", "username", "password"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@examples(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(content=st.dictionaries(st.sampled_from(["auths", "credHelpers"]), JSON, max_size=2))
async def test_any_file_gives_a_credential_nothing_or_a_usage_error(tmp_path: Path, content: object) -> None:
    try:
        await look_up(tmp_path, content, "reg.example")
    except UsageError:
        return


class TestHelpers:
    """Programs that keep credentials."""

    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(self, directory: Path, script: str, name: str = "test") -> None:
        path = directory / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    async def ask(self, directory: Path, host: str = "reg.example") -> Credential | None:
        return await look_up(directory, {"credHelpers": {"reg.example": "test", "docker.io": "test"}}, host)

    async def test_a_helper_is_asked_for_its_host(self, tmp_path: Path) -> None:
        self.install(tmp_path, f'echo "$1 $(cat)" > {tmp_path}/asked; echo \'{{"Username":"u","Secret":"s"}}\'')
        assert await self.ask(tmp_path) == Credential("u", "s")
        assert (tmp_path / "asked").read_text() == "get reg.example\n"
        await self.ask(tmp_path, "docker.io")
        assert (tmp_path / "asked").read_text() == "get https://index.docker.io/v1/\n"
        assert await self.ask(tmp_path, "other.example") is None

    async def test_identity_tokens(self, tmp_path: Path) -> None:
        self.install(tmp_path, 'echo \'{"ServerURL":"x","Username":"<token>","Secret":"t"}\'')
        assert await self.ask(tmp_path) == Credential("", "t", identity_token=True)

    async def test_helpers_come_before_entries_and_the_store_after(self, tmp_path: Path) -> None:
        self.install(tmp_path, 'echo \'{"Username":"helper","Secret":"s"}\'')
        self.install(tmp_path, 'echo \'{"Username":"store","Secret":"s"}\'', "all")
        content = {
            "credHelpers": {"a.example": "test"},
            "auths": {"a.example": auth("entry"), "b.example": auth("entry"), "c.example": {}},
            "credsStore": "all",
        }
        for host, user in (("a.example", "helper"), ("b.example", "entry"), ("c.example", "store")):
            found = await look_up(tmp_path, content, host)
            assert found is not None
            assert found.username == user

    async def test_having_nothing_is_no_error(self, tmp_path: Path) -> None:
        self.install(tmp_path, "echo credentials not found in native keychain; exit 1")
        assert await self.ask(tmp_path) is None

    @pytest.mark.parametrize(
        "script",
        [
            "echo hunter2; echo hunter2 >&2; exit 1",
            "echo hunter2",
            'echo \'{"Username":"u","hunter2":1}\'',
            "echo '[\"hunter2\"]'",
            "exit 0",
        ],
    )
    async def test_broken_helpers_are_named_and_not_quoted(
        self, tmp_path: Path, script: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(0)
        self.install(tmp_path, script)
        with pytest.raises(UsageError, match="docker-credential-test") as caught:
            await self.ask(tmp_path)
        assert "hunter2" not in f"{caught.value} {caught.value.hint} {caplog.text}"
        assert caught.value.__cause__ is None

    async def test_missing_helpers_have_a_hint(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot run docker-credential-test") as caught:
            await self.ask(tmp_path)
        assert "install" in str(caught.value.hint)

    async def test_a_helper_that_waits_is_ended(
        self, tmp_path: Path, autojump_clock: trio.testing.MockClock
    ) -> None:
        autojump_clock.autojump_threshold = 0.3
        self.install(tmp_path, "exec sleep 1000")
        with pytest.raises(UsageError, match="no answer within"):
            await self.ask(tmp_path)
        assert trio.current_time() < HELPER_TIMEOUT_S + 10

    @pytest.mark.parametrize("name", ["../evil", "a/b", "", "-x", "a b", "a" * 100])
    async def test_helpers_cannot_be_named_by_path(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError):
            await look_up(tmp_path, {"credHelpers": {"reg.example": name}}, "reg.example")


def test_credentials_do_not_show_their_secret() -> None:
    assert "hunter2" not in repr(Credential("u", "hunter2"))
