"""Manifests and indexes of one repository: ask for, read, store.

What a registry says is checked against itself and against what was asked: the bytes against the digest in the
reference and the one in Docker-Content-Digest, the content type against the document.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.errors import IntegrityError, RegistryError, UsageError
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE, Index, Manifest, parse_manifest
from veneer.oci.mediatypes import INDEXES, MANIFESTS
from veneer.registry.session import PUSH, Call, Session
from veneer.source.base import RawManifest
from veneer.transport import Response
from veneer.transport.address import origin_of, redact_text

__all__ = ["Manifests", "StoredManifest"]

_ACCEPT = {"Accept": ", ".join(MANIFESTS + INDEXES)}
_MEDIA_TYPES = frozenset(MANIFESTS + INDEXES)
_OK = frozenset({200})
#: 201 is the rule; some registries answer 200 or 202 to a manifest that they have.
_STORED = frozenset({200, 201, 202})


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest and its entity tag ("" for none), for storing a changed one in its place."""

    raw: RawManifest
    parsed: Manifest | Index
    etag: str


class Manifests:
    """The manifests of one repository. May be used by many tasks."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def resolve(self, reference: str) -> Descriptor:
        """The descriptor that a tag or digest names.

        Asks with HEAD, which registries do not count as a pull, and with GET when that says too little: proxies
        answer 404 for what they have not fetched yet, and some servers leave headers out.
        """
        what = self._what(reference)
        found = await self._session.run(lambda: self._head(reference, what), what)
        return found or (await self.get(reference)).raw.descriptor

    async def get(self, reference: str) -> StoredManifest:
        """The manifest itself, checked."""
        what = self._what(reference)
        try:
            return await self._session.run(lambda: self._get(reference, what), what)
        except IntegrityError:
            # One flipped bit on the way is mended by asking again; a registry that means it says it twice.
            self._session.transport.stats.retries += 1
            return await self._session.run(lambda: self._get(reference, what), what)

    async def put(self, parsed: Manifest | Index, tag: str, *, if_match: str = "") -> bool:
        """Store a manifest under its digest, and ``tag``; whether the registry noted its subject by itself.

        Raises RegistryError with status 412 when ``if_match`` names a version that is no longer there.
        """
        what = self._what(tag or str(parsed.digest))
        return await self._session.run(lambda: self._put(parsed, tag, if_match, what), what)

    async def _head(self, reference: str, what: str) -> Descriptor | None:
        call = Call("HEAD", f"manifests/{reference}", what, _OK, headers=_ACCEPT)
        try:
            response = await self._session.send(call)
        except RegistryError as error:
            if error.temporary or error.status in (None, 401, 403):
                raise
            return None  # GET finds out whether, and has a body that says why
        async with response:
            digest, size = _announced(response, what), response.length
            media_type = _content_type(response)
        if digest is None or size is None or media_type not in _MEDIA_TYPES:
            return None
        asked = _digest_in(reference)
        if asked is not None and asked != digest:
            if asked.algorithm != digest.algorithm:
                return None
            raise IntegrityError(f"{what}: HEAD {origin_of(response.url).address}: announces {digest}")
        return Descriptor(media_type, digest, size)

    async def _get(self, reference: str, what: str) -> StoredManifest:
        call = Call("GET", f"manifests/{reference}", what, _OK, headers=_ACCEPT)
        async with await self._session.send(call) as response:
            data = await response.body(MAX_MANIFEST_SIZE)
        where = f"{what}: GET {origin_of(response.url).address}"
        asked, announced = _digest_in(reference), _announced(response, what)
        if announced is not None:
            announced.check(data, f"{where}: not what Docker-Content-Digest says")
        if asked is not None:
            asked.check(data, where)
        try:
            parsed = parse_manifest(data, _content_type(response))
        except IntegrityError as error:
            raise IntegrityError(f"{where}: {error.message}", hint=error.hint) from error
        descriptor = Descriptor(parsed.media_type, asked or Digest.of(data), len(data))
        return StoredManifest(RawManifest(descriptor, data), parsed, response.header("ETag"))

    async def _put(self, parsed: Manifest | Index, tag: str, if_match: str, what: str) -> bool:
        headers: Mapping[str, str] = {"Content-Type": parsed.media_type}
        if if_match:
            headers = {**headers, "If-Match": if_match}
        call = Call("PUT", f"manifests/{tag or parsed.digest}", what, _STORED, PUSH, headers, parsed.raw)
        async with await self._session.send(call) as response:
            await response.discard()
            announced = _announced(response, what)
        if announced is not None:
            announced.check(
                parsed.raw, f"{what}: PUT {origin_of(response.url).address}: stored as something else"
            )
        return parsed.subject is not None and response.header("OCI-Subject") == str(parsed.subject.digest)

    def _what(self, reference: str) -> str:
        return f"{self._session.name}{'@' if ':' in reference else ':'}{reference}"


def _digest_in(reference: str) -> Digest | None:
    """The digest that a reference is, None for a tag (which has no colon)."""
    return Digest.parse(reference) if ":" in reference else None


def _announced(response: Response, what: str) -> Digest | None:
    value = response.header("Docker-Content-Digest")
    if not value:
        return None
    try:
        return Digest.parse(value)
    except UsageError:
        where = f"{what}: {response.request.method} {origin_of(response.url).address}"
        raise IntegrityError(f"{where}: announces the digest {redact_text(value, 80)!r}") from None


def _content_type(response: Response) -> str:
    return response.header("Content-Type").partition(";")[0].strip().lower()
