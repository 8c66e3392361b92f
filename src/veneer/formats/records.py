"""Indexes that this host made of layers without one: the local index store.

One file a layer, ``ALGORITHM-HEX``: SHA-256 of the rest, then the device section and the tree. A layer's
device is cut into equal spans of plain bytes, whose digests were taken when the whole was found to be what
the image's config promises. So they can vouch for every byte that comes again later, whatever way it comes.

Invariant: what is loaded is what was saved; a file that is not whole is dropped. Writes are atomic. The
section of a device is canonical, and its SHA-256 is the device's key: the same layer gives the same device
again.

Not for: indexes that somebody publishes (:mod:`veneer.index.wire`); these here say nothing of how stored
bytes are to be found, and are believed by nobody else.
"""

import fcntl
import hashlib
import logging
import os
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio
import zstandard

from veneer.errors import CacheError, IntegrityError, UsageError
from veneer.formats.local import read_file, replace_file
from veneer.index.model import Codec, Device, LayerIndex, LayerTree, SpanTable
from veneer.index.wire import MAX_PLAIN_SIZE, decode_tree, encode_tree
from veneer.index.wire_columns import Fields, pack, unsigned_column
from veneer.index.wire_frame import decode_zstd
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["SPAN_SIZE", "LayerRecord", "LayerRecords", "plain_device"]

_log = logging.getLogger(__name__)

#: Plain bytes of a span: what one read of an evicted device brings back, and one record of the cache's map.
SPAN_SIZE = 1 << 20
#: Raised whenever the same layer may give another device or another tree.
_VERSION = 1
_MAX_DEVICE_SIZE = 1 << 50
_DIGEST_SIZE = 32
#: The tree of four million files.
_MAX_FILE = 1 << 30
_DEVICE_FIELDS, _RECORD_FIELDS = 8, 6
_MAX_DROPPED = 1_000
#: zstd level of the tree: it is written while somebody waits.
_LEVEL = 1
_RAW = Codec("raw")
#: Another process is at work on the layer: look again after this long.
_LOCK_POLL_S = 0.02


def plain_device(layer: Descriptor, diff_id: Digest, size: int, digests: Sequence[bytes]) -> Device:
    """The device of a layer that unpacks to ``size`` bytes, whose spans of plain bytes have these digests."""
    return _device(_section(layer, diff_id, size, b"".join(digests)))


def _section(layer: Descriptor, diff_id: Digest, size: int, digests: bytes) -> bytes:
    blob = [layer.media_type, str(layer.digest), layer.size]
    return pack([_VERSION, *blob, str(diff_id), size, SPAN_SIZE, digests])


def _device(section: bytes) -> Device:
    what = "device of a plain layer"
    fields = Fields(section, _DEVICE_FIELDS, what)
    if fields.number(_VERSION) != _VERSION:
        raise IntegrityError(f"{what}: from another version")
    media_type, digest, stored_size = fields.text(), fields.text(), fields.number(_MAX_DEVICE_SIZE)
    blob = Descriptor.from_json({"mediaType": media_type, "digest": digest, "size": stored_size}, what)
    diff_id, size, span_size = (
        Digest.parse(fields.text()),
        fields.number(_MAX_DEVICE_SIZE),
        fields.number(1 << 30),
    )
    digests = fields.blob()
    if span_size != SPAN_SIZE or len(digests) != _DIGEST_SIZE * -(-size // SPAN_SIZE):
        raise IntegrityError(f"{what}: spans of another size")
    starts = array("q", range(0, size, SPAN_SIZE))
    lengths = array("q", (min(SPAN_SIZE, size - start) for start in starts))
    ends = array("q", [*starts, size]) if size else array("q", [0])
    spans = SpanTable(ends, starts, lengths, digests, (_RAW,) if size else ())
    return Device(blob, diff_id, spans, Digest.of(section))


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """What is known of one layer.

    Args:
        device: its spans are plain bytes.
        tree_section: its tree, encoded.
        dropped: metadata that the tree does not hold -> how many.
    """

    device: Device
    tree_section: bytes
    dropped: Mapping[str, int]

    @classmethod
    def create(cls, device: Device, tree: LayerTree, dropped: Mapping[str, int]) -> Self:
        """The record of a layer that has just been read."""
        return cls(device, encode_tree(tree, device.spans.size), dict(dropped))

    @property
    def digest(self) -> bytes:
        """32 bytes that change with anything that the record says."""
        return hashlib.sha256(self.device.key.raw + self.tree_section).digest()

    def index(self) -> LayerIndex:
        """Tree and device. Raises IntegrityError."""
        return LayerIndex(decode_tree(self.tree_section, self.device.spans.size), self.device)


class LayerRecords:
    """The records of one cache directory. Any thread, and several processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, layer: Descriptor, diff_id: Digest) -> LayerRecord | None:
        """What is known of a layer, or None. Blocks."""
        path = self._path(layer)
        if (data := read_file(path, _MAX_FILE)) is None:
            return None
        try:
            record = _decode(data)
        except (IntegrityError, UsageError) as error:
            _log.warning("dropped %s: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        blob = record.device.blob
        same = (blob.media_type, blob.digest, blob.size) == (layer.media_type, layer.digest, layer.size)
        return record if same and record.device.diff_id == diff_id else None

    def knows(self, layer: Descriptor) -> bool:
        """Whether there may be a record of a layer. Blocks."""
        return self._path(layer).exists()

    def save(self, record: LayerRecord) -> None:
        """Keep a record. Blocks; raises CacheError."""
        try:
            replace_file(self._path(record.device.blob), _encode(record))
        except OSError as error:
            raise self._refused(error) from error

    @asynccontextmanager
    async def locked(self, layer: Descriptor) -> AsyncIterator[None]:
        """Work on a layer alone: whoever wants it meanwhile, in any process, waits for what comes of it."""
        path = self._directory / ".locks" / self._path(layer).name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._refused(error) from error
        try:
            while not _try_lock(lock):  # noqa: ASYNC110 - a file lock tells no event loop
                await trio.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(lock)

    def _path(self, layer: Descriptor) -> Path:
        return self._directory / f"{layer.digest.algorithm}-{layer.digest.hex}"

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot keep the index of a layer in {self._directory}: {error.strerror}",
            hint="make room on the disk of the cache, or choose another with --cache-dir or VENEER_CACHE_DIR",
        )


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _encode(record: LayerRecord) -> bytes:
    device, spans = record.device, record.device.spans
    dropped = sorted(record.dropped.items())
    stored = zstandard.ZstdCompressor(level=_LEVEL).compress(record.tree_section)
    body = pack(
        [
            _section(device.blob, device.diff_id, spans.size, spans.digests),
            len(record.tree_section),
            stored,
            len(dropped),
            "\0".join(what for what, _ in dropped).encode(),
            unsigned_column(count for _, count in dropped),
        ]
    )
    return hashlib.sha256(body).digest() + body


def _decode(data: bytes) -> LayerRecord:
    body = data[_DIGEST_SIZE:]
    what = "record of a plain layer"
    if hashlib.sha256(body).digest() != data[:_DIGEST_SIZE]:
        raise IntegrityError(f"{what}: it is damaged")
    fields = Fields(body, _RECORD_FIELDS, what)
    device = _device(fields.blob())
    length = fields.number(MAX_PLAIN_SIZE)
    tree = decode_zstd(fields.blob(), length, what)
    count = fields.number(_MAX_DROPPED)
    names, counts = fields.strings(count), fields.unsigned(count)
    return LayerRecord(
        device, tree, {name.decode(): number for name, number in zip(names, counts, strict=True)}
    )
