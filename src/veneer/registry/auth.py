"""Authentication against one registry: anonymous, Basic, or the Bearer token flow of distribution.

A credential goes only to the registry itself or to the token service that the registry announced over the
same kind of connection; a token goes only to the registry (:mod:`veneer.registry.session` sees to that). Tokens
live in memory, are renewed before they run out, and one renewal serves everybody who waits for it.

Not for: storing credentials, judging what a token allows (the registry says so when it is used), or trying
again after faults (whoever sends the request that needs the token does).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

import trio

from veneer.errors import IntegrityError, RegistryError, Unauthorized
from veneer.oci.canonical import Json, parse_json
from veneer.registry.answers import FORM, failure
from veneer.registry.challenge import Challenge, parse_challenges
from veneer.registry.credential import Credential
from veneer.registry.keychain import Keychain
from veneer.transport import Request, Response, Transport
from veneer.transport.address import origin_of, redact_text

__all__ = ["Authenticator"]

#: What the specification says a token lives when the answer does not, and the least that clients must assume.
_DEFAULT_LIFE_S = 60.0
#: A token in its last tenth (and at most the last minute) is renewed: a request takes time to arrive.
_MAX_MARGIN_S = 60.0
#: Tokens with hundreds of scopes have some 10 KiB.
_MAX_TOKEN_ANSWER = 1 << 20
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_CLIENT_ID = "veneer"


@dataclass(slots=True)
class _Token:
    """A token and who asks for it. ``value`` is "" until the first answer."""

    value: str = field(default="", repr=False)
    renew_at: float = 0.0
    #: Scopes that the registry asked for on top of ours.
    extra: frozenset[str] = frozenset()
    lock: trio.Lock = field(default_factory=trio.Lock)
    failures: int = 0
    error: RegistryError | None = None


class Authenticator:
    """Authorization headers for one repository of one registry. May be used by many tasks."""

    def __init__(self, host: str, repository: str, transport: Transport, keychain: Keychain) -> None:
        self._host = host
        self._repository = repository
        self._transport = transport
        self._keychain = keychain
        self._challenge: Challenge | None = None
        self._credential: Credential | None = None
        self._tokens: dict[frozenset[str], _Token] = {}

    async def header(self, scopes: frozenset[str], what: str) -> str:
        """The Authorization header to send now, "" for none."""
        if self._challenge is None:
            return ""
        if self._challenge.scheme == "basic":
            return self._credential.basic if self._credential else ""
        token = self._tokens.setdefault(scopes, _Token())
        return "Bearer " + await self._fresh(token, scopes, what)

    async def renew(self, response: Response, sent: str, scopes: frozenset[str], what: str) -> bool:
        """After a refusal of a request that carried ``sent``: whether sending it again makes sense.

        Raises UsageError when the user's credentials cannot be read, and RegistryError for a challenge that
        nobody here can meet.
        """
        challenge = self._choose(response, what)
        if challenge is None and self._challenge is None:
            challenge = await self._ping(response, what)
        if challenge is not None:
            self._challenge = challenge
        elif self._challenge is None:
            return False
        else:
            challenge = self._challenge  # a token that is too old may be refused without a challenge
        if challenge.scheme == "basic":
            self._credential = await self._keychain.credential(self._host, self._repository)
            usable = self._credential is not None and not self._credential.identity_token
            return usable and await self.header(scopes, what) != sent
        token = self._tokens.setdefault(scopes, _Token())
        current = sent == f"Bearer {token.value}"
        if sent:
            more = frozenset(_VISIBLE.findall(challenge.parameters.get("scope", ""))) - scopes - token.extra
            if current and not more and challenge.parameters.get("error") == "insufficient_scope":
                return False  # the same question would get the same token
            token.extra |= more
        if current:
            token.value = ""  # refused before its time, or by another clock
        return True

    @property
    def has_credential(self) -> bool:
        """Whether a credential of the user was used."""
        return self._credential is not None

    async def _ping(self, response: Response, what: str) -> Challenge | None:
        """The challenge of the API's root: some registries refuse a request without one."""
        origin = origin_of(response.url)
        request = Request("GET", f"{origin.scheme}://{origin.address}/v2/", what)
        async with await self._transport.send(request) as answer:
            await answer.discard()
            return self._choose(answer, what)

    def _choose(self, response: Response, what: str) -> Challenge | None:
        """The challenge to meet: a token where one is offered, otherwise a password."""
        challenges = parse_challenges(response.header_values("WWW-Authenticate"))
        for challenge in challenges:
            if challenge.scheme == "bearer" and "realm" in challenge.parameters:
                self._check_realm(challenge.parameters["realm"], response, what)
                return challenge
        for challenge in challenges:
            if challenge.scheme == "basic":
                return challenge
        if challenges:
            names = redact_text(", ".join(challenge.scheme for challenge in challenges), 100)
            raise Unauthorized(
                f"{what}: {self._host} wants authentication of a kind that is not supported ({names})"
            )
        return None

    def _check_realm(self, realm: str, response: Response, what: str) -> None:
        try:
            origin = origin_of(realm)
        except RegistryError:
            raise RegistryError(f"{what}: {self._host} names a token service without a valid address") from None
        if origin.scheme == "http" and (
            response.url.startswith("https:") or not self._transport.allows_plain(origin.address)
        ):
            raise RegistryError(
                f"{what}: {self._host} names a token service at {origin.address} over plain http, refused",
                hint="credentials would travel unprotected; the registry's configuration must be mended",
            )

    async def _fresh(self, token: _Token, scopes: frozenset[str], what: str) -> str:
        failures = token.failures
        if token.value and trio.current_time() < token.renew_at:
            return token.value
        async with token.lock:
            if token.value and trio.current_time() < token.renew_at:
                return token.value
            if token.failures != failures and token.error is not None:
                raise token.error  # of the request that this one waited for
            try:
                await self._ask(token, scopes | token.extra, what)
            except RegistryError as error:
                token.failures += 1
                token.error = error
                raise
            return token.value

    async def _ask(self, token: _Token, scopes: frozenset[str], what: str) -> None:
        if self._challenge is None:
            raise AssertionError("a token is asked for only after a challenge")
        parameters = self._challenge.parameters
        self._credential = await self._keychain.credential(self._host, self._repository)
        request = _token_request(parameters, sorted(scopes), self._credential, what)
        asked_at = trio.current_time()
        async with await self._transport.send(request) as response:
            if response.status != 200:
                raise await failure(response, self._host, authenticated=self.has_credential)
            data = await response.body(_MAX_TOKEN_ANSWER)
        token.value, life_s = _parse_token(data, request)
        margin_s = min(life_s / 10, _MAX_MARGIN_S)
        # Counted from before the request and by our own clock: the server's may be wrong.
        token.renew_at = asked_at + life_s - margin_s


def _token_request(
    parameters: Mapping[str, str], scopes: list[str], credential: Credential | None, what: str
) -> Request:
    """The request for a token: OAuth 2 for identity tokens, the older GET for everything else."""
    realm = parameters["realm"]
    service = [("service", parameters["service"])] if "service" in parameters else []
    if credential is not None and credential.identity_token:
        form = [
            ("grant_type", "refresh_token"),
            *service,
            ("client_id", _CLIENT_ID),
            ("scope", " ".join(scopes)),
            ("refresh_token", credential.secret),
        ]
        headers = {"Content-Type": FORM}
        return Request("POST", realm, what, headers, urlencode(form).encode())
    query = [*service, *(("scope", scope) for scope in scopes)]
    headers = {}
    if credential is not None:
        query.insert(0, ("account", credential.username))
        headers["Authorization"] = credential.basic
    url = realm + ("&" if "?" in realm else "?") + urlencode(query) if query else realm
    return Request("GET", url, what, headers)


def _parse_token(data: bytes, request: Request) -> tuple[str, float]:
    host = origin_of(request.url).address
    malformed = RegistryError(f"{request.what}: {request.method} {host}: the token service sent no valid token")
    try:
        answer: Json = parse_json(data, "token", limit=_MAX_TOKEN_ANSWER)
    except IntegrityError:
        raise malformed from None  # the cause would quote the token
    if not isinstance(answer, dict):
        raise malformed
    value, life_s = answer.get("token") or answer.get("access_token"), answer.get("expires_in")
    if not isinstance(value, str) or not _VISIBLE.fullmatch(value):
        raise malformed
    if isinstance(life_s, bool) or not isinstance(life_s, int | float):
        life_s = _DEFAULT_LIFE_S
    return value, max(float(life_s), _DEFAULT_LIFE_S)
