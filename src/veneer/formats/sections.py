"""The sections of base layers that earlier images brought, so that a large index is fetched only in part.

Images share layers, and an index holds one tree and one span table for each layer, byte for byte the same in
every image. Once some layer of a new image is known here, its index is fetched as the header and the missing
sections. What is put together is the whole index again and is checked against its digest like any other, so
sections need no trust of their own; the header is checked first, so that it cannot lead astray.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from veneer.formats.local import DigestFiles
from veneer.index.wire import IndexHeader, LayerRecord, SectionRef, header_length, parse_header
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.source.base import BlobSource
from veneer.source.tasks import run_all

__all__ = ["MIN_INDEX_SIZE", "SectionCache"]

#: Below this, the additional round trip costs more than the bytes that it saves.
MIN_INDEX_SIZE = 256 << 10
#: Fetched with the header: the policy section, which differs from image to image, follows it.
_SLACK = 256
#: Known sections up to this size between two missing ones are fetched again rather than asked around.
_BRIDGE = 32 << 10


class SectionCache:
    """Index sections by the layer that they describe. May be used by many tasks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def knows_any(self, layers: Sequence[Descriptor]) -> bool:
        """Whether sections of at least one of the layers are here."""
        stores = [self._of(layer.digest) for layer in layers]
        return await trio.to_thread.run_sync(lambda: any(store.any() for store in stores))

    async def assemble(
        self, blob: BlobSource, layers: int, header_digest: Digest, index_digest: Digest
    ) -> bytes:
        """The whole index, from the header, the sections that are here, and ranges for the rest.

        Raises IntegrityError when the pieces do not make the index.
        """
        length = header_length(layers)
        head = await blob.read(0, min(length + _SLACK, blob.size))
        header_digest.check(head[:length], f"index header of {blob.name}")
        header = parse_header(head[:length])
        index = bytearray(blob.size)
        index[: len(head)] = head
        missing = await trio.to_thread.run_sync(self._fill, header, index, len(head))

        parts = await run_all([partial(blob.read, start, end - start) for start, end in missing])
        for (start, end), part in zip(missing, parts, strict=True):
            index[start:end] = part
        data = bytes(index)
        index_digest.check(data, f"index of {blob.name}")
        return data

    async def keep(self, header: IndexHeader, index: bytes) -> None:
        """Note the sections of a checked index."""
        await trio.to_thread.run_sync(partial(self._keep, header, index))

    def _of(self, layer: Digest) -> DigestFiles:
        return DigestFiles(self._directory / f"{layer.algorithm}-{layer.hex}")

    def _fill(self, header: IndexHeader, index: bytearray, start: int) -> list[tuple[int, int]]:
        """Put known sections into place; ranges that are to be fetched, in order."""
        missing: list[tuple[int, int]] = []
        for record in header.layers:
            store = self._of(record.blob)
            for section in _sections(record):
                end = section.offset + section.stored_length
                if not start < end <= len(index):
                    continue
                known = store.load(Digest.from_bytes(section.stored_digest), section.stored_length)
                if known is None or len(known) != section.stored_length:
                    continue
                index[section.offset : end] = known
                if section.offset > start:
                    missing.append((start, section.offset))
                start = end
        if start < len(index):
            missing.append((start, len(index)))
        return _bridged(missing)

    def _keep(self, header: IndexHeader, index: bytes) -> None:
        for record in header.layers:
            store = self._of(record.blob)
            for section in _sections(record):
                data = index[section.offset : section.offset + section.stored_length]
                store.save(Digest.from_bytes(section.stored_digest), data)


def _sections(record: LayerRecord) -> list[SectionRef]:
    return sorted(
        (section for section in (record.tree, record.spans, record.aux) if section is not None),
        key=lambda section: section.offset,
    )


def _bridged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges whose distance is not worth another request."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start - joined[-1][1] <= _BRIDGE:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined
