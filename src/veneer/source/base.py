"""The protocols of everything that holds images: blobs by range, and repositories of manifests and blobs.

Implementations: :mod:`veneer.registry.client` (a registry), :mod:`veneer.source.layout` (an OCI layout on
disk). All of them pass the same contract suite, ``tests/contract``.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable

from veneer.events import Reporter, silent
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["BlobBody", "BlobSource", "RawManifest", "Repository", "WithWindows"]

#: Opens the bytes of a blob from its beginning; may be called again when an upload is retried.
BlobBody = Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class RawManifest:
    """A manifest or image index exactly as stored. ``data`` has been checked against ``descriptor``."""

    descriptor: Descriptor
    data: bytes


@runtime_checkable
class BlobSource(Protocol):
    """Bytes of one blob. May be used by many tasks at once."""

    @property
    def name(self) -> str:
        """For messages: where the blob is, without secrets, as in ``localhost:5000/app@sha256:12ab...``."""

    @property
    def size(self) -> int:
        """Size of the blob in bytes, as its descriptor states it."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` unverified bytes from ``offset``, or a :class:`~veneer.errors.VeneerError`.

        Raises RegistryError (with ``temporary`` set where a later try may succeed) or IntegrityError when
        the source answers with another range or size than it was asked for.
        """

    def stream(
        self, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The unverified bytes of a range in chunks as they arrive, resumed on faults; fails as ``read`` does.

        Without a length it goes to the end of the blob.
        """


@dataclass(frozen=True, slots=True, eq=False)
class WithWindows:
    """A blob whose spans are decoded with windows, and the blob that has those.

    Args:
        blob: the layer.
        windows: the blob of its device's windows.
    """

    blob: BlobSource
    windows: BlobSource

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.blob.name

    @property
    def size(self) -> int:
        """Of the layer."""
        return self.blob.size

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the layer."""
        return await self.blob.read(offset, length)

    def stream(
        self, offset: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Bytes of the layer."""
        return self.blob.stream(offset, length)


@runtime_checkable
class Repository(Protocol):
    """One repository of a registry, or one OCI layout. May be used by many tasks at once."""

    @property
    def name(self) -> str:
        """For messages and references, as in ``localhost:5000/team/app`` or ``oci:/srv/images``."""

    async def resolve(self, reference: str) -> Descriptor:
        """The descriptor of the manifest or index that a tag or digest names. Raises NotFound."""

    async def manifest(self, reference: str) -> RawManifest:
        """The manifest or index itself, of bounded size, its digest checked. Raises NotFound."""

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """The blob; nothing is asked of the registry before the first read."""

    async def referrers(self, subject: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Manifests whose ``subject`` is the given manifest, filtered by artifact type when one is given."""

    async def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there with the right size."""

    async def mount_blob(self, descriptor: Descriptor, origin: "Repository") -> bool:
        """Take the blob from another repository of the same registry without a transfer, if that works."""

    async def push_blob(self, descriptor: Descriptor, body: BlobBody, report: Reporter = silent) -> None:
        """Store a blob (which must match its descriptor). Does nothing when it is there already."""

    async def push_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest or index under its digest, and under ``tag`` when one is given.

        A manifest with a ``subject`` becomes findable by :meth:`referrers`.
        """

    async def aclose(self) -> None:
        """Release connections."""
