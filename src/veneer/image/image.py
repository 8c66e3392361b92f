"""An image that can be loaded lazily: what is known of it at once, and its tree when somebody wants one.

Opening an image decodes the span tables alone. The trees of its layers, by far most of an index, are decoded
and merged on first use: what is mounted from a kept metadata image may never need them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import trio

from veneer.errors import IntegrityError
from veneer.formats.base import OpenedIndex
from veneer.image.packs import FoundPack
from veneer.index.merge import merge
from veneer.index.model import Device, ImageIndex, LayerIndex, MetadataPolicy
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.reference import LayoutReference, RegistryReference
from veneer.source.base import BlobSource, Repository, WithWindows
from veneer.transport import TransportStats

__all__ = ["Image", "LayerNote", "Reference"]

Reference = RegistryReference | LayoutReference


@dataclass(frozen=True, slots=True)
class LayerNote:
    """What is known of one layer, for people.

    Args:
        blob: as the manifest states it.
        format: of the index that covers it, "" for none.
        spans: how many ranges it can be fetched in.
        codecs: how they are stored.
        size: uncompressed, in bytes; None when only an index would tell.
        index_size: bytes that the layer takes in the index.
        reason: why it is loaded lazily, or why not.
    """

    blob: Descriptor
    format: str
    spans: int
    codecs: tuple[str, ...]
    size: int | None
    index_size: int
    reason: str

    @property
    def lazy(self) -> bool:
        """Whether the layer can be loaded on demand."""
        return bool(self.format)


class Image:
    """One opened image. Nothing of it changes; its tree may be asked for in any thread.

    Args:
        reference: what the user asked for.
        name: repository and manifest digest, for messages.
        repository: where it comes from.
        manifest: of the selected platform.
        config: what to run.
        index_origin: ``annotation``, ``referrer``, ``local`` or ``streamed``.
        index_descriptor: the index blob; None when this host made the index.
        opened: what the index says; checked to be about the manifest's layers.
        layers: notes, one for each layer.
        transport_stats: requests made so far through this image's connections.
        pack: for the start that it was opened for.
        malformed: is told, in any thread, that the trees of the index make no tree.

    Attributes:
        devices: of the layers, lowest first.
        policy: what the trees keep of the layers' metadata.
        identity: digest of all that the index says.
        blobs: of the layers.
        sources: where the devices' stored bytes are read, one for each device: mostly the layers' blobs.
        artifact: the whole index as it is stored, if it is one blob.
    """

    def __init__(
        self,
        *,
        reference: Reference,
        name: str,
        repository: Repository,
        manifest: Manifest,
        config: ImageConfig,
        index_origin: str,
        index_descriptor: Descriptor | None,
        opened: OpenedIndex,
        layers: tuple[LayerNote, ...],
        transport_stats: TransportStats,
        pack: FoundPack | None = None,
        malformed: Callable[[IntegrityError], None] | None = None,
    ) -> None:
        self.reference = reference
        self.name = name
        self.repository = repository
        self.manifest = manifest
        self.config = config
        self.index_origin = index_origin
        self.index_descriptor = index_descriptor
        self.layers = layers
        self.transport_stats = transport_stats
        self.pack = pack
        self.devices: tuple[Device, ...] = opened.devices
        self.policy: MetadataPolicy = opened.policy
        self.identity: Digest = opened.identity
        self.blobs: tuple[BlobSource, ...] = tuple(map(repository.blob, manifest.layers))
        self.sources: tuple[BlobSource, ...] = opened.sources or tuple(
            blob if windows is None else WithWindows(blob, windows)
            for blob, windows in zip(self.blobs, opened.windows or [None] * len(self.blobs), strict=True)
        )
        self.artifact: bytes | None = opened.artifact
        self._malformed = malformed
        self._decode: Callable[[], tuple[LayerIndex, ...]] = opened.layers
        self._index: ImageIndex | None = None
        self._merging = threading.Lock()

    @property
    def index(self) -> ImageIndex:
        """The tree over the devices; made by the first who asks, who should not be an event loop's task.

        Raises IntegrityError when the index holds something that is no tree.
        """
        if self._index is None:
            with self._merging:
                if self._index is None:
                    self._index = self._merge()
        return self._index

    async def load(self) -> ImageIndex:
        """The same, made in a thread unless it is there already."""
        if self._index is not None:
            await trio.lowlevel.checkpoint()
            return self._index
        return await trio.to_thread.run_sync(lambda: self.index)

    async def layer_indexes(self) -> tuple[LayerIndex, ...]:
        """What the tree is merged from, lowest layer first. Decoded anew, as few need it and it is large."""
        return await trio.to_thread.run_sync(self._layers)

    def _layers(self) -> tuple[LayerIndex, ...]:
        try:
            return self._decode()
        except IntegrityError as error:
            raise self._bad_index(error) from error

    def _merge(self) -> ImageIndex:
        layers = self._layers()
        try:
            return merge(layers, self.policy)
        except IntegrityError as error:
            raise self._bad_index(error) from error

    def _bad_index(self, error: IntegrityError) -> IntegrityError:
        if self._malformed is not None:
            self._malformed(error)
            hint = "it is not used again: try once more"
            return IntegrityError(f"index of {self.name}: {error.message}", hint=hint)
        return IntegrityError(f"index of {self.name}: {error.message}", hint=error.hint)
