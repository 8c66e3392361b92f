"""Referrers: which manifests say something about another one (distribution-spec 1.1, "Listing Referrers").

Registries without the referrers API keep the list in an index under the tag ``ALGORITHM-HEX``, which clients
read and write. Registries in between answer with a page of HTML, or ignore the filter; both are met here.
"""

import re
from collections.abc import Iterable

import trio

from veneer.errors import IntegrityError, NotFound, RegistryError, UnsupportedFormat
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_INDEX_ENTRIES, MAX_MANIFEST_SIZE, Index, Manifest, build_index
from veneer.oci.mediatypes import OCI_INDEX
from veneer.registry.manifests import Manifests, StoredManifest
from veneer.registry.session import Call, Session
from veneer.transport import Response
from veneer.transport.address import redirect_target, same_origin

__all__ = ["Referrers"]

#: Pages of a list. Registries put 50 to 1,000 entries on one.
_MAX_PAGES = 100
#: Entries without artifact type whose manifests are read to learn it. Only some clients write such entries.
_MAX_LOOKUPS = 32
#: Rounds of reading, changing and writing the list when others write it at the same time.
_MAX_WRITES = 8
#: Answers of registries that do not know the API.
_UNKNOWN = frozenset({400, 404, 405, 501})
#: Parameters do not reach into another link: a header of 100 KB full of links would take half a minute.
_NEXT = re.compile(r"<([^<>]+)>\s*;[^,<]*\brel=\"?next\"?", re.IGNORECASE)


class Referrers:
    """The referrers of the manifests of one repository. May be used by many tasks."""

    def __init__(self, session: Session, manifests: Manifests) -> None:
        self._session = session
        self._manifests = manifests
        self._writing = trio.Lock()

    async def find(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """The referrers of ``subject``, of one artifact type when one is given; none is no error."""
        what = f"referrers of {self._session.name}@{subject}"
        found = await self._session.run(lambda: self._from_api(subject, artifact_type, what), what)
        if found is None:
            stored = await self._from_tag(subject)
            found = list(stored.parsed.manifests) if stored and isinstance(stored.parsed, Index) else []
        unique = list({entry.digest: entry for entry in found}.values())
        if not artifact_type:
            return unique
        return await self._of_type(unique, artifact_type)

    async def add(self, referrer: Manifest | Index) -> None:
        """Put a manifest with a subject into the list of a registry that keeps none itself."""
        if referrer.subject is None:
            raise ValueError("a referrer has a subject")
        subject = referrer.subject.digest
        async with self._writing:
            for _ in range(_MAX_WRITES):
                stored = await self._from_tag(subject)
                entries = list(stored.parsed.manifests) if stored and isinstance(stored.parsed, Index) else []
                if any(entry.digest == referrer.digest for entry in entries):
                    return
                index = Index.parse(build_index([*entries, referrer.referrer]), OCI_INDEX)
                try:
                    await self._manifests.put(index, _tag(subject), if_match=stored.etag if stored else "")
                except RegistryError as error:
                    if error.status != 412:
                        raise
                # Read again: where If-Match means nothing, another writer may have won.
        raise RegistryError(
            f"{self._session.name}: the list of referrers of {subject} is being written by others all the time",
            hint="push again when they have finished",
        )

    async def _from_api(self, subject: Digest, artifact_type: str, what: str) -> list[Descriptor] | None:
        """The list that the API gives, None when the registry does not have it."""
        first = url = await self._session.base_url(what) + f"referrers/{subject}"
        if artifact_type:
            url += f"?artifactType={artifact_type.replace('+', '%2B')}"
        found: list[Descriptor] = []
        for page in range(_MAX_PAGES):
            call = Call("GET", url, what, frozenset({200}), headers={"Accept": OCI_INDEX})
            try:
                response = await self._session.send(call)
            except RegistryError as error:
                if page == 0 and error.status in _UNKNOWN:
                    return None
                raise
            async with response:
                entries = await _entries(response)
            if entries is None:
                if page == 0:
                    return None
                raise RegistryError(f"{what}: a further page is no index")
            found += entries
            following = _NEXT.search(", ".join(response.header_values("Link")))
            if following is None:
                return found
            url = redirect_target(url, following[1], what)
            if len(found) > MAX_INDEX_ENTRIES or not same_origin(url, first):
                break
        raise RegistryError(f"{what}: the list does not end, or leads to another host")

    async def _from_tag(self, subject: Digest) -> StoredManifest | None:
        try:
            stored = await self._manifests.get(_tag(subject))
        except NotFound:
            return None
        if not isinstance(stored.parsed, Index):
            raise IntegrityError(f"{self._session.name}:{_tag(subject)}: the list of referrers is no index")
        return stored

    async def _of_type(self, entries: Iterable[Descriptor], artifact_type: str) -> list[Descriptor]:
        found, lookups = [], 0
        for entry in entries:
            kind = entry.artifact_type
            if not kind and lookups < _MAX_LOOKUPS:
                lookups += 1
                try:
                    kind = (await self._manifests.get(str(entry.digest))).parsed.referrer.artifact_type
                except (NotFound, UnsupportedFormat):
                    continue  # listed, but deleted or of a kind that is none of ours
            if kind == artifact_type:
                found.append(entry)
        return found


async def _entries(response: Response) -> list[Descriptor] | None:
    """The entries of one page; None for what is not an index at all, such as a login page."""
    data = await response.body(MAX_MANIFEST_SIZE)
    try:
        return list(Index.parse(data, OCI_INDEX).manifests)
    except (IntegrityError, UnsupportedFormat):
        if response.header("Content-Type").startswith(OCI_INDEX):
            raise
        return None


def _tag(subject: Digest) -> str:
    """The tag of the referrers tag schema."""
    return f"{subject.algorithm[:32]}-{subject.hex[:64]}"
