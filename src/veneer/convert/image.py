"""The image of one platform: all its layers converted and pushed, one index, one manifest.

The uncompressed tars stay as they are, hence so do diffIDs and the config, byte for byte. Layers go to the
destination as soon as each is done.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import trio

from veneer.convert.layer import Capacity, LayerTask, convert_layer
from veneer.convert.packing import PackedImage, Packer
from veneer.convert.push import Pusher
from veneer.convert.result import ConvertedImage, ConvertedLayer
from veneer.convert.work import Job, StoredLayer, WorkDirectory
from veneer.errors import NotFound, UnsupportedFormat
from veneer.events import Notice, Reporter
from veneer.formats.native import ANNOTATION_HEADER
from veneer.image.image import Image
from veneer.image.open import ResolvedImage, load_config, load_image
from veneer.index.merge import merge
from veneer.index.model import MetadataPolicy
from veneer.index.wire import header_length, pack_index
from veneer.oci.canonical import canonical_json
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import (
    ANNOTATION_INDEX,
    ANNOTATION_PACK,
    OCI_CONFIG,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    VENEER_INDEX,
)
from veneer.settings import Settings
from veneer.source.layout_file import FileBlob
from veneer.source.tasks import run_all
from veneer.transport import TransportStats

__all__ = ["ImageConverter", "NewImage"]

#: Layers converted or pushed at once: one may wait for the network while the other computes.
LAYERS_AT_ONCE = 2
#: Annotations that say something about the bytes of the blob that a conversion replaces.
_STALE_ANNOTATIONS = ("containerd.io/snapshot/", "io.github.containers.zstd-chunked.", "io.containers.estargz.")


@dataclass(frozen=True, slots=True)
class NewImage:
    """A manifest whose blobs are in the destination; it is not there itself yet."""

    data: bytes
    descriptor: Descriptor
    converted: ConvertedImage


class ImageConverter:
    """Converts the images of one source into one destination.

    Args:
        work: where unfinished work is kept.
        devices: what becomes of device nodes in the index: ``drop`` or ``keep``.
        packer: makes and copies packs.

    ``finish`` must be called at the end, with whether everything was pushed.
    """

    def __init__(
        self,
        pusher: Pusher,
        work: WorkDirectory,
        settings: Settings,
        stats: TransportStats,
        *,
        cores: int,
        devices: str,
        packer: Packer,
        report: Reporter,
    ) -> None:
        self._pusher = pusher
        self._packer = packer
        self._work = work
        self._settings = settings
        self._stats = stats
        self._capacity = Capacity(cores)
        self._devices = devices
        self._report = report
        self._jobs: list[Job] = []

    async def convert(self, resolved: ResolvedImage) -> NewImage:
        """Convert one image, or copy it when it is lazily loadable already."""
        if (image := await self._native(resolved)) is not None:
            return await self._copy(resolved, image)
        config = await load_config(resolved)
        layers = zip(resolved.manifest.layers, config.diff_ids, strict=True)
        stored = await run_all(
            [partial(self._layer, resolved, *layer) for layer in layers], at_once=LAYERS_AT_ONCE
        )
        return await self._assemble(resolved, config, stored)

    def finish(self, *, pushed: bool) -> None:
        """Give up the work directory; what has been pushed is deleted there."""
        for job in self._jobs:
            job.release(pushed=pushed)
        self._jobs.clear()

    async def _layer(self, resolved: ResolvedImage, layer: Descriptor, diff_id: Digest) -> StoredLayer:
        task = LayerTask(layer, diff_id, self._devices)
        job = self._work.job(task.key, OCI_LAYER_ZSTD)
        self._jobs.append(job)
        source = resolved.contents.repository.blob(layer)
        stored = await convert_layer(task, source, job, self._capacity, self._report)
        await self._pusher.file(stored.blob, stored.path)
        return stored

    async def _assemble(
        self, resolved: ResolvedImage, config: ImageConfig, stored: list[StoredLayer]
    ) -> NewImage:
        manifest = resolved.manifest
        dropped: Counter[str] = Counter()
        for layer in stored:
            dropped.update(layer.dropped)
        policy = MetadataPolicy(self._devices, dict(sorted(dropped.items())))
        data = await trio.to_thread.run_sync(pack_index, [layer.index for layer in stored], policy)
        header = Digest.of(data[: header_length(len(stored))])
        index = Descriptor(VENEER_INDEX, Digest.of(data), len(data), {ANNOTATION_HEADER: str(header)})
        new_config = Descriptor(OCI_CONFIG, manifest.config.digest, manifest.config.size)
        await self._pusher.data(new_config, config.raw)
        await self._pusher.data(index, data)
        new_layers = [
            Descriptor(OCI_LAYER_ZSTD, new.blob.digest, new.blob.size, _kept(old.annotations))
            for old, new in zip(manifest.layers, stored, strict=True)
        ]
        sources = [FileBlob(layer.path, f"layer {layer.blob.digest}", layer.blob.size) for layer in stored]
        indexes = [layer.index for layer in stored]
        devices = [index.device for index in indexes]
        packed = await self._packer.pack(resolved, devices, partial(merge, indexes, policy), sources, config)
        annotations = _with_packs(manifest.annotations, packed)
        annotations[ANNOTATION_INDEX] = canonical_json(index.to_json()).decode()
        raw = build_manifest(new_config, new_layers, annotations=annotations, subject=manifest.subject)
        descriptor = Descriptor(OCI_MANIFEST, Digest.of(raw), len(raw))
        await self._pusher.artifact([index], descriptor)
        await self._packer.refer(packed, descriptor)
        layers = tuple(
            ConvertedLayer(old, new.blob, new.index.device.spans.size, len(new.index.device.spans), new.reused)
            for old, new in zip(manifest.layers, stored, strict=True)
        )
        converted = ConvertedImage(
            config.platform,
            manifest.digest,
            descriptor.digest,
            index,
            layers,
            policy.dropped,
            copied=False,
            packs=packed.packs,
        )
        return NewImage(raw, descriptor, converted)

    async def _native(self, resolved: ResolvedImage) -> Image | None:
        """The opened image, when it is native, names its index itself, and keeps what was asked for."""
        if ANNOTATION_INDEX not in resolved.manifest.annotations:
            return None
        try:
            image = await load_image(resolved, self._settings, self._stats)
            await image.load()  # what is not whole is not copied
        except NotFound as error:  # copied by a tool that left the index behind: it is made again
            self._report(Notice(error.message))
            return None
        except UnsupportedFormat as error:
            self._report(Notice(f"{error.message}; converting it again"))
            return None
        return image if image.policy.devices == self._devices else None

    async def _copy(self, resolved: ResolvedImage, image: Image) -> NewImage:
        """Copy a native image and its index."""
        self._report(Notice(f"{resolved.reference} is lazily loadable already: copied as it is"))
        manifest, index = resolved.manifest, image.index_descriptor
        if index is None:
            raise ValueError("a native image names its index")
        blobs = {layer.digest: layer for layer in (*manifest.layers, manifest.config, index)}
        await run_all([partial(self._pusher.copy, blob) for blob in blobs.values()], at_once=LAYERS_AT_ONCE)
        packed = await self._packer.pack(resolved, image.devices, lambda: image.index, image.sources)
        raw, descriptor = manifest.raw, manifest.descriptor
        if packed.new:
            raw = build_manifest(
                manifest.config,
                manifest.layers,
                annotations=_with_packs(manifest.annotations, packed),
                subject=manifest.subject,
                artifact_type=manifest.artifact_type,
                media_type=manifest.media_type,
            )
            descriptor = Descriptor(manifest.media_type, Digest.of(raw), len(raw))
        await self._pusher.artifact([index], descriptor)
        await self._packer.refer(packed, descriptor)
        layers = tuple(
            ConvertedLayer(layer, layer, note.size or 0, note.spans, reused=False)
            for layer, note in zip(manifest.layers, image.layers, strict=True)
        )
        converted = ConvertedImage(
            image.config.platform,
            manifest.digest,
            descriptor.digest,
            index,
            layers,
            image.policy.dropped,
            copied=True,
            packs=packed.packs,
        )
        return NewImage(raw, descriptor, converted)


def _with_packs(annotations: Mapping[str, str], packed: PackedImage) -> dict[str, str]:
    """Annotations that name these packs and no others."""
    others = {key: value for key, value in annotations.items() if key != ANNOTATION_PACK}
    return others | ({ANNOTATION_PACK: packed.annotation} if packed.annotation else {})


def _kept(annotations: Mapping[str, str]) -> dict[str, str]:
    """A layer's annotations that are still true."""
    return {key: value for key, value in annotations.items() if not key.startswith(_STALE_ANNOTATIONS)}
