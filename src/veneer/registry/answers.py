"""From an answer that is not the one hoped for to the error that says so.

The status decides the class; the body's distribution error codes and messages, bounded and redacted, go into
the text. What a server says is shown to the user but never believed.
"""

import base64
import re
from contextlib import suppress
from urllib.parse import parse_qsl

from veneer.errors import (
    IntegrityError,
    NotFound,
    RateLimited,
    RegistryError,
    Unauthorized,
    Unavailable,
)
from veneer.oci.canonical import Json, parse_json
from veneer.transport import Request, Response
from veneer.transport.address import origin_of, redact_text
from veneer.transport.retry import parse_retry_after

__all__ = ["FORM", "REDIRECTS", "failure", "is_expired_token"]

#: Error bodies have some hundred bytes; a proxy's error page some KiB.
_MAX_ERROR_BODY = 64 << 10
_MAX_CODES = 5
_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_TEMPORARY = frozenset({500, 502, 503, 504})
#: Content type of an OAuth 2 request.
FORM = "application/x-www-form-urlencoded"
#: Statuses that lead elsewhere.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: How ECR refuses an expired token: with 403 and no challenge.
_EXPIRED = "token has expired"


async def failure(
    response: Response, registry: str, *, authenticated: bool, ours: bool = True
) -> RegistryError:
    """The error for an answer, which is read as far as needed and closed.

    Args:
        response: an answer with an unexpected status.
        registry: the host that the user knows, for hints.
        authenticated: whether a credential of the user was used.
        ours: whether the registry itself answered, not a store that it redirects to.
    """
    body = b""
    with suppress(RegistryError):  # the status is the news, an incomplete body must not hide it
        body = await response.prefix(_MAX_ERROR_BODY)
    await response.discard()
    request, status = response.request, response.status
    codes, details = _parse_errors(body, _sent_secrets(request))
    host = origin_of(request.url).address
    message = f"{request.what}: {request.method} {host}: answered {status}{details}"
    after = parse_retry_after(response.header("Retry-After"))
    if status == 429 or (400 <= status < 500 and "TOOMANYREQUESTS" in codes):
        hint = "wait, or log in: registries allow more to users they know"
        return RateLimited(message, hint=hint, status=status, codes=codes, retry_after_s=after)
    if status in _TEMPORARY:
        return Unavailable(message, status=status, codes=codes, retry_after_s=after)
    if status in (401, 403) and ours:
        return Unauthorized(message, hint=_login_hint(registry, authenticated), status=status, codes=codes)
    if status in (404, 410):
        hint = "check the name; what is private may look missing" + (
            "" if authenticated else " until you log in"
        )
        return NotFound(message, hint=hint, status=status, codes=codes)
    return RegistryError(message, status=status, codes=codes)


def is_expired_token(error: RegistryError) -> bool:
    """Whether a refusal means that the token is too old, whatever its status."""
    return error.status == 401 or (error.status == 403 and _EXPIRED in error.message)


def _login_hint(host: str, authenticated: bool) -> str:
    if authenticated:
        return f"the stored credentials for {host} were refused or are not enough: log in again"
    return f"log in with podman, skopeo or docker (podman login {host}), or name a file with --authfile"


def _sent_secrets(request: Request) -> list[str]:
    """What was secret in the request, so that an echo of it is not shown."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    secrets = [value]
    if scheme == "Basic":
        secrets.append(base64.b64decode(value).decode().partition(":")[2])
    if request.headers.get("Content-Type") == FORM and request.body is not None:
        secrets.append(dict(parse_qsl(request.body.decode())).get("refresh_token", ""))
    return [secret for secret in secrets if secret]


def _parse_errors(body: bytes, secrets: list[str]) -> tuple[tuple[str, ...], str]:
    """The codes of an error body, and what to add to a message; ("", nothing) for other bodies."""
    try:
        document = parse_json(body, "error", limit=_MAX_ERROR_BODY)
    except IntegrityError:
        return (), ""
    errors = document.get("errors") if isinstance(document, dict) else None
    codes, texts = [], []
    for item in errors[:_MAX_CODES] if isinstance(errors, list) else []:
        if isinstance(item, dict) and _CODE.fullmatch(code := _text(item.get("code"))):
            codes.append(code)
            text = _text(item.get("message"))
            for secret in secrets:
                text = text.replace(secret, "...")
            texts.append(redact_text(f"{code}: {text}" if text else code))
    return tuple(codes), f" ({'; '.join(texts)})" if texts else ""


def _text(value: Json) -> str:
    return value if isinstance(value, str) else ""
