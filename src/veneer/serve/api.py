"""Answers in the words of the distribution API: error documents, names and paging (distribution-spec 1.1)."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import urlencode

from veneer.errors import UsageError
from veneer.oci.canonical import canonical_json
from veneer.oci.digest import Digest
from veneer.serve.message import Headers, Response

__all__ = [
    "REPOSITORY_NAME",
    "APIError",
    "digest_parameter",
    "error_response",
    "json_response",
    "page",
]

Item = TypeVar("Item")

#: distribution-spec, "Pulling manifests"; with the usual limit of 255 characters applied by the caller.
REPOSITORY_NAME = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)

#: Error code of the API -> status, where the spec or the reference implementation fixes it.
_STATUS = {
    "BLOB_UNKNOWN": 404,
    "BLOB_UPLOAD_INVALID": 400,
    "BLOB_UPLOAD_UNKNOWN": 404,
    "DENIED": 403,
    "DIGEST_INVALID": 400,
    "MANIFEST_BLOB_UNKNOWN": 404,
    "MANIFEST_INVALID": 400,
    "MANIFEST_UNKNOWN": 404,
    "NAME_INVALID": 400,
    "NAME_UNKNOWN": 404,
    "PAGINATION_NUMBER_INVALID": 400,
    "SIZE_INVALID": 400,
    "TOOMANYREQUESTS": 429,
    "UNAUTHORIZED": 401,
    "UNKNOWN": 500,
    "UNSUPPORTED": 405,
}


class APIError(Exception):
    """Raised by handlers for an answer that is an error; ``code`` is one of the distribution API."""

    def __init__(self, code: str, message: str, *, status: int | None = None, headers: Headers = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or _STATUS[code]
        self.headers = headers


def error_response(error: APIError) -> Response:
    """The error document that the API prescribes."""
    document = {"errors": [{"code": error.code, "message": error.message, "detail": None}]}
    return json_response(document, status=error.status, headers=error.headers)


def json_response(
    document: object, *, status: int = 200, headers: Headers = (), media_type: str = "application/json"
) -> Response:
    """A JSON document as a response."""
    return Response(status, (("Content-Type", media_type), *headers), (canonical_json(document),))


def digest_parameter(text: str) -> Digest:
    """Parse a digest of a path or query."""
    try:
        return Digest.parse(text)
    except UsageError as error:
        raise APIError("DIGEST_INVALID", error.message) from error


def page(
    path: str,
    items: Sequence[Item],
    key: Callable[[Item], str],
    *,
    last: str,
    number: str,
    limit: int,
    query: Sequence[tuple[str, str]] = (),
) -> tuple[Sequence[Item], Headers]:
    """One page of ``items`` (ascending by ``key``) after ``last``, and a Link header when there are more.

    ``number`` is what the client asked for, at most ``limit`` are given; ``query`` is carried along.
    """
    if number and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise APIError("PAGINATION_NUMBER_INVALID", f"n is not a number: {number[:20]!r}")
    count = min(int(number), limit) if number else limit
    rest = [item for item in items if key(item) > last] if last else items
    chosen = rest[:count]
    if len(rest) <= count or not chosen:
        return chosen, ()
    parameters = [*query, ("n", str(count)), ("last", key(chosen[-1]))]
    return chosen, (("Link", f'<{path}?{urlencode(parameters)}>; rel="next"'),)
