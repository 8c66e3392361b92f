"""Credentials as podman, skopeo, buildah and docker keep them: ``auth.json`` and ``config.json``.

The order is that of containers-auth.json(5): files in their standard places, in each file ``credHelpers``, then
``auths`` with the longest matching path, then ``credsStore``. Files are read anew for every question, so a
login or a rotated secret is seen without a restart. A malformed file is an error that names the file and never
its content; a missing one is no error unless the user named it. Not for: storing credentials.
"""

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path

from veneer.errors import IntegrityError, UsageError
from veneer.oci.canonical import Json, parse_json
from veneer.registry.credential import Credential
from veneer.registry.helper import ask_helper
from veneer.settings import Settings

__all__ = ["Credential", "Keychain"]

#: Files with hundreds of registries have some 100 KiB.
_MAX_FILE = 1 << 20
#: Names of Docker Hub. ``docker login`` writes the last one, as a URL.
_DOCKER_HUB = ("docker.io", "registry-1.docker.io", "index.docker.io")
_DOCKER_HUB_SERVER = "https://index.docker.io/v1/"


class Keychain:
    """The credentials of this user. Stateless; may be used by many tasks."""

    def __init__(self, settings: Settings) -> None:
        self._authfile = settings.authfile

    async def credential(self, host: str, repository: str) -> Credential | None:
        """The credential for a repository, from the first file that has one.

        Raises UsageError for a file that cannot be read or understood and for a helper that does not work.
        """
        for path, legacy in self._files():
            if (content := self._load(path)) is not None and (
                found := await _search(content, host, repository, path, legacy=legacy)
            ):
                return found
        return None

    def _files(self) -> Iterator[tuple[Path, bool]]:
        if self._authfile is not None:
            yield self._authfile, False
            return
        env, home = os.environ, Path.home()
        runtime = env.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.geteuid()}"
        yield Path(runtime) / ("containers/auth.json" if env.get("XDG_RUNTIME_DIR") else "auth.json"), False
        yield Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json", False
        yield Path(env.get("DOCKER_CONFIG") or home / ".docker") / "config.json", False
        yield home / ".dockercfg", True

    def _load(self, path: Path) -> dict[str, Json] | None:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            if self._authfile is None:
                return None
            raise UsageError(f"the credentials file {path} does not exist") from None
        except OSError as error:
            raise UsageError(f"cannot read the credentials file {path}: {error.strerror}") from error
        if not data.strip():
            return {}
        try:
            content = parse_json(data, "credentials", limit=_MAX_FILE)
        except IntegrityError:
            content = None  # the cause would quote the content
        if not isinstance(content, dict):
            raise _malformed(path)
        return content


async def _search(
    content: dict[str, Json], host: str, repository: str, path: Path, *, legacy: bool
) -> Credential | None:
    entries = content if legacy else _member(content, "auths", path)
    if not legacy:
        helpers = _member(content, "credHelpers", path)
        for alias in _aliases(host):
            name = helpers.get(alias)
            if name is not None and (found := await _ask(name, host, path)):
                return found
    for key in _keys(host, "" if legacy else repository):
        for entry_key, entry in entries.items():
            if _normalise(entry_key) == key and (found := _decode(entry, path)):
                return found
    store = None if legacy else content.get("credsStore")
    return await _ask(store, host, path) if store else None


async def _ask(name: Json, host: str, path: Path) -> Credential | None:
    if not isinstance(name, str):
        raise _malformed(path)
    return await ask_helper(name, _DOCKER_HUB_SERVER if host in _DOCKER_HUB else host)


def _member(content: dict[str, Json], name: str, path: Path) -> dict[str, Json]:
    value = content.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _malformed(path)
    return value


def _aliases(host: str) -> tuple[str, ...]:
    return (*_DOCKER_HUB, _DOCKER_HUB_SERVER) if host in _DOCKER_HUB else (host,)


def _keys(host: str, repository: str) -> Iterator[str]:
    """Keys that serve a repository, longest first: ``host/a/b``, ``host/a``, ``host``."""
    canonical = _DOCKER_HUB[0] if host in _DOCKER_HUB else host
    parts = repository.split("/") if repository else []
    for count in range(len(parts), -1, -1):
        yield "/".join([canonical, *parts[:count]])


def _normalise(key: str) -> str:
    """A key of ``auths`` without scheme; the path of URL keys (``https://host/v1/``) means nothing."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, path = bare.partition("/")
    path = path.strip("/")
    if host in _DOCKER_HUB:
        host = _DOCKER_HUB[0]
    return host if bare != key or path in ("", "v1", "v2") else f"{host}/{path}"


def _decode(entry: Json, path: Path) -> Credential | None:
    """The credential in one entry; None for the empty entries that helpers leave behind."""
    if not isinstance(entry, dict):
        raise _malformed(path)
    token, auth = entry.get("identitytoken"), entry.get("auth")
    username, password = entry.get("username"), entry.get("password")
    if isinstance(token, str) and token:
        return Credential("", token, identity_token=True)
    if isinstance(auth, str) and auth:
        try:
            name, colon, secret = base64.b64decode(auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise _malformed(path) from None
        if not colon:
            raise _malformed(path)
        return Credential(name, secret.strip("\0"))
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credential(username, password)
    return None


def _malformed(path: Path) -> UsageError:
    return UsageError(f"the credentials file {path} is malformed", hint="log in again, or repair or remove it")
