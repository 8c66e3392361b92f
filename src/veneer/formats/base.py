"""What a format of lazily loadable images has to offer, and what it may ask for.

A format finds layer indexes; it decides nothing about trust. Whoever opens an image checks that what a format
returns is about exactly the layers that the manifest and the config name.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from veneer.index.model import Device, LayerIndex, MetadataPolicy
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.source.base import BlobSource, Repository

__all__ = [
    "DeviceIntake",
    "DeviceKeeper",
    "ImageContents",
    "IncomingLayer",
    "IndexLocation",
    "LayerFormat",
    "OpenedIndex",
]


class ImageContents(Protocol):
    """The documents around one image: in the repository, with a local copy in front of it."""

    @property
    def repository(self) -> Repository:
        """Where the image is."""

    async def fetch(self, descriptor: Descriptor, what: str, limit: int) -> bytes:
        """A whole blob of at most ``limit`` bytes, its digest checked; ``what`` names it in errors."""

    async def manifest(self, descriptor: Descriptor, what: str) -> bytes:
        """A manifest, its digest checked."""

    async def known(self, descriptor: Descriptor) -> bytes | None:
        """The blob if the local copy has it."""

    async def keep(self, descriptor: Descriptor, data: bytes) -> None:
        """Put a checked blob into the local copy; a local copy that cannot be written costs only itself."""


class DeviceIntake(Protocol):
    """A device that is being written from its beginning on; for one thread at a time."""

    def append(self, data: bytes) -> None:
        """Write the next bytes. Raises CacheError."""

    def commit(self, device: Device, digests: Sequence[bytes]) -> None:
        """Make it the cached copy of ``device``: these bytes are proven, and spans have these SHA-256 digests.

        Raises CacheError.
        """

    def close(self) -> None:
        """Delete what was not committed."""


class IncomingLayer(BlobSource, Protocol):
    """A layer on its way, whose requests take turns with others."""

    def proven(self) -> None:
        """Tell that all of it has come and is what it should be."""


class DeviceKeeper(Protocol):
    """Where whole devices can be put: the cache. Any thread, but for :meth:`incoming`."""

    def incoming(self, blob: BlobSource, layer: Descriptor) -> AbstractContextManager[IncomingLayer]:
        """The same blob, for a download of all of it; for the thread that the keeper was opened in."""

    def is_at_hand(self, device: Device) -> bool:
        """Whether a device need not be brought again: all of it is on disk, or it is mounted. Blocks."""

    def intake(self, what: str) -> DeviceIntake:
        """Begin to write a device; ``what`` names it in errors. Raises CacheError."""


@dataclass(frozen=True, slots=True)
class IndexLocation:
    """Where an image's index is and how that became known.

    Args:
        origin: ``annotation`` (the manifest names it), ``referrer`` (it names the manifest), ``local`` (this
            host made it earlier) or ``streamed`` (this host makes it now, from the layers themselves).
        descriptor: of the index blob; None when there is no such blob.
        packs: indexes of packs that are named together with the index, and are believed as much.
        pinned: it is in use already: it is opened whatever is known against it.
    """

    origin: str
    descriptor: Descriptor | None = None
    packs: tuple[Descriptor, ...] = ()
    pinned: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class OpenedIndex:
    """The indexes of all layers, lowest first, as some format gave them.

    Args:
        devices: of the layers.
        policy: what the trees keep of the layers' metadata.
        section_sizes: stored bytes that each layer takes in the index.
        layers: decodes the trees, over the same devices. Blocks; raises IntegrityError.
        identity: digest of all that the index says.
        sources: where what the spans call stored bytes is read, one a device; None: in the layers' blobs.
        windows: for devices whose spans have windows, where those are read; one a device, or none at all.
        artifact: all of that as one blob for :class:`~veneer.index.wire.PackedIndex`; None where it is none.
    """

    devices: tuple[Device, ...]
    policy: MetadataPolicy
    section_sizes: tuple[int, ...]
    layers: Callable[[], tuple[LayerIndex, ...]]
    identity: Digest
    sources: tuple[BlobSource, ...] | None = None
    artifact: bytes | None = None
    windows: tuple[BlobSource | None, ...] = ()


class LayerFormat(Protocol):
    """One way in which layers are lazily loadable."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def looked_for(self) -> str:
        """What :meth:`detect` looks for, to be named when nothing was found."""

    async def detect(self, contents: ImageContents, manifest: Manifest) -> IndexLocation | None:
        """Where the index is, or None when the image is not of this format. As few requests as possible."""

    async def open(self, contents: ImageContents, manifest: Manifest, location: IndexLocation) -> OpenedIndex:
        """The index that was detected, its trees unseen. Raises IntegrityError or UnsupportedFormat."""

    async def reject(self, manifest: Manifest) -> None:
        """Take note that what was detected is wrong, so that it is not detected again without asking."""
