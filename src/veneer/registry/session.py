"""One request to one repository of a registry: address, authentication, redirects, and failures as errors.

Authorization is sent to the registry's own origin and nowhere else. A request is tried again here only to meet
a challenge; faults are the business of whoever knows what to repeat (:class:`~veneer.transport.Attempts`).
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from urllib.parse import urljoin

from veneer.errors import RegistryError
from veneer.registry.answers import REDIRECTS, failure, is_expired_token
from veneer.registry.auth import Authenticator
from veneer.registry.keychain import Keychain
from veneer.settings import Settings
from veneer.source.tasks import run_all
from veneer.transport import Patience, Request, Response, Transport
from veneer.transport.address import origin_of, redirect_target, same_origin

__all__ = ["PULL", "PUSH", "Call", "Session"]

_Result = TypeVar("_Result")

PULL = "pull"
PUSH = "pull,push"
#: For what a person waits for (names, manifests, uploads): a registry that is down is reported in seconds.
CALL_PATIENCE = Patience(tries=5, deadline_s=60.0)
#: For bytes of files: tried for as long as the reader may wait, at most some 25 s of pauses.
BLOB_TRIES = 10
#: An anonymous request, one with a token, and one with a wider or fresher token.
_MAX_RENEWALS = 2
#: Object stores behind registries redirect once or twice.
_MAX_HOPS = 5
#: Connections beside the one that gets the manifest: for the index, the config and a pack.
_AHEAD = 3
#: Redirects that keep the method; others turn it into GET.
_KEEP_METHOD = frozenset({307, 308})
#: Docker Hub's API has another host than its images are called by.
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the distribution API describes it.

    Args:
        method: in upper case.
        target: relative to ``/v2/NAME/``, or an address from a Location.
        what: names the thing in errors.
        expect: the statuses that are no error; a redirect among them is not followed.
        actions: what a token must allow, PULL or PUSH.
        headers: for this request.
        body: for this request.
        extra_scope: another scope that is needed, as for a mount from another repository.
    """

    method: str
    target: str = field(repr=False)
    what: str
    expect: frozenset[int]
    actions: str = PULL
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    extra_scope: str = ""


class Session:
    """Requests to one repository. May be used by many tasks.

    Args:
        host: as in references, ``HOST`` or ``HOST:PORT``.
        repository: as in references, ``team/app``.
        transport: shared by all sessions of a process.
        keychain: where credentials come from.
        settings: deadlines.
    """

    def __init__(
        self, host: str, repository: str, *, transport: Transport, keychain: Keychain, settings: Settings
    ) -> None:
        self.host = host
        self.repository = repository
        self.transport = transport
        self.blob_patience = Patience(BLOB_TRIES, settings.read_deadline_s)
        self._api_host = _API_HOSTS.get(host, host)
        self._auth = Authenticator(host, repository, transport, keychain)

    @property
    def name(self) -> str:
        """``host/repository``."""
        return f"{self.host}/{self.repository}"

    async def run(self, operation: Callable[[], Awaitable[_Result]], what: str) -> _Result:
        """The result of ``operation``, tried again after temporary failures."""
        return await self.transport.attempts(CALL_PATIENCE).run(operation, what)

    async def base_url(self, what: str) -> str:
        """The address that targets are relative to."""
        return f"{await self.transport.base_url(self._api_host, what)}/v2/{self.repository}/"

    async def open_ahead(self) -> None:
        """Open connections while another request is under way; what fails, requests that matter will tell."""
        with suppress(RegistryError):
            base = await self.base_url(self.name)
            if not self.transport.is_far(base):
                return
            request = Request("GET", urljoin(base, "/v2/"), self.name)
            await run_all([partial(self._touch, request)] * _AHEAD)

    async def _touch(self, request: Request) -> None:
        response = await self.transport.send(request)
        await response.discard()

    async def send(self, call: Call) -> Response:
        """One try: the answer, whose status is one that ``call`` expects. The caller closes it."""
        base = await self.base_url(call.what)
        url = urljoin(base, call.target)
        scopes = self._scopes(call)
        for renewals in range(_MAX_RENEWALS + 1):
            # Asked for each time: somebody else may have met the challenge meanwhile.
            authorization = await self._auth.header(scopes, call.what) if same_origin(url, base) else ""
            response = await self._follow(call, url, base, authorization)
            if response.status in call.expect:
                return response
            ours = same_origin(response.url, base)
            error = await failure(response, self.host, authenticated=self._auth.has_credential, ours=ours)
            if not ours or not is_expired_token(error) or renewals == _MAX_RENEWALS:
                raise error
            if not await self._auth.renew(response, authorization, scopes, call.what):
                raise error
        raise AssertionError("unreachable: the last round returns or raises")

    async def _follow(self, call: Call, url: str, base: str, authorization: str) -> Response:
        for _ in range(_MAX_HOPS + 1):
            if authorization and not same_origin(url, base):
                authorization = ""  # for good: what another host sends back to us is not our request any more
            headers = {**call.headers, "Authorization": authorization} if authorization else call.headers
            response = await self.transport.send(Request(call.method, url, call.what, headers, call.body))
            status = response.status
            if status in call.expect or status not in REDIRECTS:
                return response
            if call.method not in ("GET", "HEAD") and status not in _KEEP_METHOD:
                return response
            await response.discard()
            url = redirect_target(url, response.header("Location"), call.what)
        raise RegistryError(
            f"{call.what}: {call.method} {origin_of(base).address}: more than {_MAX_HOPS} redirects",
            status=status,
        )

    def _scopes(self, call: Call) -> frozenset[str]:
        own = f"repository:{self.repository}:{call.actions}"
        return frozenset({own, call.extra_scope} if call.extra_scope else {own})
