"""Who may do what: Basic authentication, and Bearer tokens with the token endpoint embedded.

The token flow is that of the distribution project (docs/content/spec/auth): a challenge names realm, service
and scope, the endpoint grants of the scope what the user may have and says nothing about the rest. All known
users may do everything; anonymous clients may pull when that is allowed. Tokens live in memory only.
"""

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import parse_qs

import trio

from veneer.serve.api import REPOSITORY_NAME, APIError, json_response
from veneer.serve.message import BodyTooLarge, Headers, Request, Response

__all__ = ["Access", "Authorizer", "BasicAuth", "TokenAuth"]

#: A form with one token and a few scopes.
_MAX_FORM = 64 << 10
#: Live tokens; the oldest go first.
_MAX_TOKENS = 10_000
_AUTHORITY = re.compile(r"[A-Za-z0-9.\-]{1,255}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Access:
    """One right: ``action`` (pull, push or delete) on ``repository``."""

    repository: str
    action: str


class Authorizer(Protocol):
    """Decides about requests, and answers at the token endpoint when it has one."""

    async def authorize(self, request: Request, needed: Sequence[Access], authority: str) -> None:
        """Return when the request may have all that it needs; raise APIError with a challenge otherwise."""

    async def token(self, request: Request, authority: str) -> Response:
        """Answer a request to ``/token``."""


def _basic_credentials(request: Request) -> tuple[str, str] | None:
    """User and password of a Basic Authorization header, or None when there is none."""
    kind, _, text = (request.header("authorization") or "").partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(text.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return (user, password) if colon else ("", "")


def _known(users: Mapping[str, str], user: str, password: str) -> bool:
    expected = users.get(user, "")
    return bool(expected) and hmac.compare_digest(expected.encode(), password.encode())


def _denied(challenge: str, message: str = "authentication required") -> APIError:
    return APIError("UNAUTHORIZED", message, headers=(("WWW-Authenticate", challenge),))


@dataclass(slots=True)
class BasicAuth:
    """Users with passwords, asked for on every request."""

    users: Mapping[str, str]
    realm: str = "veneer"

    async def authorize(self, request: Request, needed: Sequence[Access], authority: str) -> None:
        """Accept any known user."""
        credentials = _basic_credentials(request)
        if credentials is None or not _known(self.users, *credentials):
            raise _denied(f'Basic realm="{self.realm}"')

    async def token(self, request: Request, authority: str) -> Response:
        """There is none."""
        raise APIError("UNSUPPORTED", "this registry has no token endpoint", status=404)


@dataclass(frozen=True, slots=True)
class _Grant:
    access: frozenset[Access]
    expires: float


@dataclass(slots=True)
class TokenAuth:
    """Bearer tokens from ``/token`` of the same server.

    Args:
        users: names and passwords.
        anonymous_pull: whether clients without credentials get tokens for pulling.
        expires_in_s: lifetime of tokens on trio's clock.
        service: the name that challenges carry.
    """

    users: Mapping[str, str]
    anonymous_pull: bool = False
    expires_in_s: float = 300.0
    service: str = "veneer"
    #: How many access tokens have been given out.
    issued: int = 0
    _grants: dict[str, _Grant] = field(default_factory=dict, repr=False)
    _refresh: dict[str, str] = field(default_factory=dict, repr=False)

    async def authorize(self, request: Request, needed: Sequence[Access], authority: str) -> None:
        """Accept a live token that was granted all that is needed."""
        kind, _, token = (request.header("authorization") or "").partition(" ")
        fault = ""
        if kind.lower() == "bearer":
            grant = self._grants.get(token.strip())
            if grant is None or grant.expires <= trio.current_time():
                fault = "invalid_token"
            elif not grant.access.issuperset(needed):
                fault = "insufficient_scope"
            else:
                return
        raise _denied(self._challenge(request, needed, authority, fault), fault or "authentication required")

    def _challenge(self, request: Request, needed: Sequence[Access], authority: str, fault: str) -> str:
        actions: dict[str, list[str]] = {}
        for access in needed:
            actions.setdefault(access.repository, []).append(access.action)
        scope = " ".join(f"repository:{name}:{','.join(names)}" for name, names in actions.items())
        host = request.header("host") or ""
        realm = f"{request.scheme}://{host if _AUTHORITY.fullmatch(host) else authority}/token"
        parts = [f'realm="{realm}"', f'service="{self.service}"']
        parts += [f'scope="{scope}"'] if scope else []
        parts += [f'error="{fault}"'] if fault else []
        return "Bearer " + ",".join(parts)

    async def token(self, request: Request, authority: str) -> Response:
        """Give out a token: GET with Basic credentials or none, or POST with a refresh token or password."""
        if request.method == "GET":
            query = request.query
            credentials = _basic_credentials(request)
            user = "" if credentials is None else self._login(*credentials)
            remember = query.get("offline_token") == ["true"]
        else:
            try:
                query = parse_qs((await request.read(_MAX_FORM)).decode(), errors="strict", max_num_fields=100)
            except (BodyTooLarge, ValueError) as error:
                raise APIError("UNSUPPORTED", "malformed token request", status=400) from error
            user = self._authenticate(query)
            remember = query.get("access_type") == ["offline"]
        scopes = [scope for value in query.get("scope", []) for scope in value.split()]
        granted = self._granted(user, scopes)
        if not user and not self.anonymous_pull:
            raise _denied(f'Basic realm="{self.service}"')
        document: dict[str, str | int] = self._issue(granted)
        if user and (remember or query.get("grant_type") == ["refresh_token"]):
            document["refresh_token"] = self.identity_token(user)
        return json_response(document, headers=_NO_STORE)

    def _authenticate(self, form: Mapping[str, list[str]]) -> str:
        match form.get("grant_type"):
            case ["refresh_token"]:
                user = self._refresh.get(form.get("refresh_token", [""])[-1], "")
                if not user:
                    raise _denied(f'Basic realm="{self.service}"', "unknown refresh token")
                return user
            case ["password"]:
                return self._login(form.get("username", [""])[-1], form.get("password", [""])[-1])
            case _:
                raise APIError("UNSUPPORTED", "unknown grant_type", status=400)

    def _login(self, user: str, password: str) -> str:
        if not _known(self.users, user, password):
            raise _denied(f'Basic realm="{self.service}"', "wrong user name or password")
        return user

    def _granted(self, user: str, scopes: Sequence[str]) -> frozenset[Access]:
        allowed = {"pull", "push", "delete"} if user else {"pull"} if self.anonymous_pull else set()
        granted = set()
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            if kind != "repository" or not REPOSITORY_NAME.fullmatch(name):
                continue
            wanted = allowed if actions == "*" else allowed & set(actions.split(","))
            granted |= {Access(name, action) for action in wanted}
        return frozenset(granted)

    def _issue(self, access: frozenset[Access]) -> dict[str, str | int]:
        now = trio.current_time()
        self._grants = {token: grant for token, grant in self._grants.items() if grant.expires > now}
        while len(self._grants) >= _MAX_TOKENS:
            del self._grants[next(iter(self._grants))]
        token = secrets.token_urlsafe(32)
        self._grants[token] = _Grant(access, now + self.expires_in_s)
        self.issued += 1
        issued_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {
            "token": token,
            "access_token": token,
            "expires_in": max(1, int(self.expires_in_s)),
            "issued_at": issued_at,
        }

    def identity_token(self, user: str) -> str:
        """A refresh token ("identity token") for a user."""
        token = secrets.token_urlsafe(32)
        self._refresh[token] = user
        return token

    def revoke(self, token: str | None = None) -> None:
        """Make one access token invalid, or all of them."""
        if token is None:
            self._grants.clear()
        else:
            self._grants.pop(token, None)


_NO_STORE: Headers = (("Cache-Control", "no-store"),)
