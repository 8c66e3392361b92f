"""A repository of a registry, spoken to by the distribution API 1.1: the parts put together.

Writes are idempotent: what is there is not sent again. Not for: several registries that hold the same images;
that is a source of its own above this one.
"""

from weakref import WeakValueDictionary

import trio

from veneer.events import Progress, Reporter, silent
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import parse_manifest
from veneer.registry.blob import RegistryBlob
from veneer.registry.keychain import Keychain
from veneer.registry.manifests import Manifests
from veneer.registry.referrers import Referrers
from veneer.registry.session import PULL, PUSH, Session
from veneer.registry.upload import Upload, has_blob
from veneer.settings import Settings
from veneer.source.base import BlobBody, BlobSource, RawManifest, Repository
from veneer.transport import Transport

__all__ = ["RegistryRepository"]


class RegistryRepository:
    """One repository of one registry. May be used by many tasks.

    Args:
        host: as in references, ``HOST`` or ``HOST:PORT``.
        repository: as in references, ``team/app``.
        transport: shared; not closed by :meth:`aclose`.
        keychain: where credentials come from.
        settings: deadlines.
    """

    def __init__(
        self, host: str, repository: str, *, transport: Transport, keychain: Keychain, settings: Settings
    ) -> None:
        self._session = Session(host, repository, transport=transport, keychain=keychain, settings=settings)
        self._manifests = Manifests(self._session)
        self._referrers = Referrers(self._session, self._manifests)
        self._pushing: WeakValueDictionary[Digest, trio.Lock] = WeakValueDictionary()

    @property
    def name(self) -> str:
        """``host/repository``."""
        return self._session.name

    async def open_ahead(self) -> None:
        """Have some connections to a distant registry ready for the requests that follow the first one."""
        await self._session.open_ahead()

    async def resolve(self, reference: str) -> Descriptor:
        """The descriptor of the manifest or index that a tag or digest names. Raises NotFound."""
        return await self._manifests.resolve(reference)

    async def manifest(self, reference: str) -> RawManifest:
        """The manifest or index itself, of bounded size, its digest checked. Raises NotFound."""
        return (await self._manifests.get(reference)).raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """The blob; nothing is asked of the registry before the first read."""
        return RegistryBlob(self._session, descriptor)

    async def referrers(self, subject: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Manifests whose ``subject`` is the given manifest, filtered by artifact type when one is given."""
        return await self._referrers.find(subject, artifact_type)

    async def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there with the right size."""
        return await has_blob(self._session, descriptor, PULL)

    async def mount_blob(self, descriptor: Descriptor, origin: Repository) -> bool:
        """Take the blob from another repository of the same registry without a transfer, if that works."""
        if not isinstance(origin, RegistryRepository) or origin._session.host != self._session.host:
            return False
        return await Upload(self._session, descriptor).mount(origin._session.repository)

    async def push_blob(self, descriptor: Descriptor, body: BlobBody, report: Reporter = silent) -> None:
        """Store a blob (which must match its descriptor). Does nothing when it is there already."""
        # One at a time for one blob: the others find it there. Registries on plain file systems also lose
        # sight of a blob for a moment when it is stored twice, and refuse manifests that name it.
        lock = self._pushing.setdefault(descriptor.digest, trio.Lock())
        async with lock:
            if await has_blob(self._session, descriptor, PUSH):
                report(Progress("push", descriptor.digest.hex[:12], descriptor.size, descriptor.size))
            else:
                await Upload(self._session, descriptor).push(body, report)

    async def push_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest or index under its digest, and under ``tag`` when one is given.

        A manifest with a ``subject`` becomes findable by :meth:`referrers`.
        """
        parsed = parse_manifest(data, media_type)
        noted = await self._manifests.put(parsed, tag)
        if parsed.subject is not None and not noted:
            await self._referrers.add(parsed)
        return parsed.descriptor

    async def aclose(self) -> None:
        """Nothing to release: the connections belong to the transport."""
