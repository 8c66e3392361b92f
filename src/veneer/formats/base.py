"""What a format of lazily loadable images has to offer, and what it may ask for.

A format finds layer indexes; it decides nothing about trust. Whoever opens an image checks that what a format
returns is about exactly the layers that the manifest and the config name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from veneer.index.model import Device, LayerIndex, MetadataPolicy
from veneer.oci.descriptor import Descriptor
from veneer.oci.manifest import Manifest
from veneer.source.base import Repository

__all__ = ["ImageContents", "IndexLocation", "LayerFormat", "OpenedIndex"]


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


@dataclass(frozen=True, slots=True)
class IndexLocation:
    """Where an image's index is and how that became known.

    Args:
        origin: ``annotation`` (the manifest names it) or ``referrer`` (it names the manifest).
        descriptor: of the index blob.
    """

    origin: str
    descriptor: Descriptor


@dataclass(frozen=True, slots=True, eq=False)
class OpenedIndex:
    """The indexes of all layers, lowest first, as some format gave them.

    Args:
        devices: of the layers.
        policy: what the trees keep of the layers' metadata.
        section_sizes: stored bytes that each layer takes in the index.
        layers: decodes the trees, over the same devices. Blocks; raises IntegrityError.
    """

    devices: tuple[Device, ...]
    policy: MetadataPolicy
    section_sizes: tuple[int, ...]
    layers: Callable[[], tuple[LayerIndex, ...]]


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
