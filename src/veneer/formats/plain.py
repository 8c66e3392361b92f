"""Ordinary layers: gzip, zstd or plain tar as everybody pushes them, with no index anywhere.

There is nothing to be found in the registry, so the layers are streamed once, each into its device in the
cache, and indexed on the way (:mod:`veneer.formats.streamed`). What was learnt is kept
(:mod:`veneer.formats.records`): the next time nothing is downloaded, and layers that another image brought
are not downloaded at all.

Two formats, because one is asked first and the other last: :class:`KnownFormat` takes images all of whose
layers are known and here, :class:`StreamedFormat` every other one. What has been evicted since is read again
by :mod:`veneer.formats.replayed`.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.events import Notice, Reporter
from veneer.formats.base import DeviceKeeper, ImageContents, IndexLocation, OpenedIndex
from veneer.formats.checkpoints import CheckpointFiles
from veneer.formats.records import LayerRecord, LayerRecords
from veneer.formats.replayed import ReplayedBlob
from veneer.formats.streamed import Capacity, stream_layer
from veneer.index.model import MetadataPolicy
from veneer.oci.config import IMAGE_CONFIGS, MAX_CONFIG_SIZE, ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import ANNOTATION_INDEX, LAYER_COMPRESSION
from veneer.source.base import BlobSource
from veneer.source.tasks import run_all

__all__ = ["KnownFormat", "StreamedFormat"]

_MIB = 1 << 20


class KnownFormat:
    """Images whose layers were streamed earlier, and are in the cache still.

    Args:
        directory: the local index store.
        keeper: the cache; None when it does not matter whether it has the layers.
    """

    name = "plain"
    looked_for = "an index made here earlier"

    def __init__(self, directory: Path, keeper: DeviceKeeper | None) -> None:
        self._records = LayerRecords(directory)
        self._checkpoints = CheckpointFiles(directory)
        self._keeper = keeper

    async def detect(self, contents: ImageContents, manifest: Manifest) -> IndexLocation | None:
        """Without any request but for an image config that is not known yet."""
        if ANNOTATION_INDEX in manifest.annotations or not manifest.layers:
            return None
        if not await trio.to_thread.run_sync(self._records.knows, manifest.layers[-1]):
            return None
        config = await _config(contents, manifest)
        records = await trio.to_thread.run_sync(self._load, manifest.layers, config.diff_ids)
        return IndexLocation("local") if records is not None else None

    async def open(self, contents: ImageContents, manifest: Manifest, location: IndexLocation) -> OpenedIndex:
        """The index from the records."""
        config = await _config(contents, manifest)
        records = await trio.to_thread.run_sync(self._load, manifest.layers, config.diff_ids)
        if records is None:
            raise IntegrityError(f"the index of {contents.repository.name}@{manifest.digest} has just vanished")
        return opened(records, contents, self._checkpoints)

    async def reject(self, manifest: Manifest) -> None:
        """See :class:`~veneer.formats.base.LayerFormat`: what is made here is not rejected."""

    def _load(self, layers: Sequence[Descriptor], diff_ids: Sequence[Digest]) -> list[LayerRecord] | None:
        records: list[LayerRecord] = []
        for layer, diff_id in zip(layers, diff_ids, strict=True):
            record = self._records.load(layer, diff_id)
            if record is None or (self._keeper is not None and not self._keeper.is_at_hand(record.device)):
                return None
            records.append(record)
        return records


class StreamedFormat:
    """Any image, by streaming what is not known and here.

    Args:
        directory: the local index store.
        keeper: the cache; without one, nothing is streamed.
        report: progress, and what is downloaded.
    """

    name = "plain"
    looked_for = "an index made here earlier"

    def __init__(self, directory: Path, keeper: DeviceKeeper, report: Reporter) -> None:
        self._records = LayerRecords(directory)
        self._checkpoints = CheckpointFiles(directory)
        self._keeper = keeper
        self._report = report

    async def detect(self, contents: ImageContents, manifest: Manifest) -> IndexLocation | None:
        """Always; asks for nothing."""
        return IndexLocation("streamed")

    async def open(self, contents: ImageContents, manifest: Manifest, location: IndexLocation) -> OpenedIndex:
        """Stream what is missing. Raises VeneerError; what had come as a whole until then is kept."""
        config = await _config(contents, manifest)
        pairs = list(zip(manifest.layers, config.diff_ids, strict=True))
        missing = [pair for pair in pairs if await trio.to_thread.run_sync(self._here, *pair) is None]
        size = sum({layer.digest: layer.size for layer, _ in missing}.values())
        if missing:
            name = f"{contents.repository.name}@{manifest.digest}"
            self._report(
                Notice(
                    f"{name} has no index: {len(missing)} of its {len(pairs)} layers are downloaded whole, "
                    f"{size / _MIB:.1f} MiB"
                )
            )
        capacity = Capacity(len(missing))
        records = await run_all([partial(self._layer, contents, capacity, *pair) for pair in pairs])
        return opened(records, contents, self._checkpoints)

    async def reject(self, manifest: Manifest) -> None:
        """See :class:`~veneer.formats.base.LayerFormat`: what is made here is not rejected."""

    async def _layer(
        self, contents: ImageContents, capacity: Capacity, layer: Descriptor, diff_id: Digest
    ) -> LayerRecord:
        if (record := await trio.to_thread.run_sync(self._here, layer, diff_id)) is not None:
            return record
        async with self._records.locked(layer):
            # Whoever had the lock has brought it, most likely.
            if (record := await trio.to_thread.run_sync(self._here, layer, diff_id)) is not None:
                return record
            record, checkpoints = await stream_layer(
                layer,
                diff_id,
                contents.repository.blob(layer),
                keeper=self._keeper,
                capacity=capacity,
                report=self._report,
            )
            await trio.to_thread.run_sync(self._checkpoints.save, layer, checkpoints)
            await trio.to_thread.run_sync(self._records.save, record)
            return record

    def _here(self, layer: Descriptor, diff_id: Digest) -> LayerRecord | None:
        record = self._records.load(layer, diff_id)
        return record if record is not None and self._keeper.is_at_hand(record.device) else None


def opened(
    records: Sequence[LayerRecord], contents: ImageContents, checkpoints: CheckpointFiles
) -> OpenedIndex:
    """The index of an image from what is known of its layers."""
    dropped: dict[str, int] = {}
    for record in records:
        for what, count in record.dropped.items():
            dropped[what] = dropped.get(what, 0) + count
    identity = hashlib.sha256(b"".join(record.digest for record in records)).digest()
    return OpenedIndex(
        devices=tuple(record.device for record in records),
        policy=MetadataPolicy(dropped=dropped),
        section_sizes=tuple(len(record.tree_section) for record in records),
        layers=lambda: tuple(record.index() for record in records),
        identity=Digest.from_bytes(identity),
        sources=tuple(_source(record, contents, checkpoints) for record in records),
    )


def _source(record: LayerRecord, contents: ImageContents, checkpoints: CheckpointFiles) -> BlobSource:
    device = record.device
    blob = contents.repository.blob(device.blob)
    compression = LAYER_COMPRESSION[device.blob.media_type]
    if compression == "none":
        return blob  # such a tar is its own device
    return ReplayedBlob(blob, compression, device.spans.size, partial(checkpoints.load, device.blob))


async def _config(contents: ImageContents, manifest: Manifest) -> ImageConfig:
    """The image config, which names a diffID for each layer."""
    what = f"config of {contents.repository.name}@{manifest.digest}"
    if manifest.config.media_type not in IMAGE_CONFIGS:
        raise UnsupportedFormat(f"{what}: of type {manifest.config.media_type!r}")
    config = ImageConfig.parse(await contents.fetch(manifest.config, what, MAX_CONFIG_SIZE))
    if len(config.diff_ids) != len(manifest.layers):
        raise IntegrityError(
            f"{what} names {len(config.diff_ids)} layers, but the manifest has {len(manifest.layers)}"
        )
    return config
