"""The index of one layer as it is: how its stored bytes can be had in pieces, without another copy of them.

- gzip: cut at checkpoints, with windows (:mod:`veneer.convert.stretches`).
- zstd: cut between the frames that are there. One frame cannot be entered, so a layer of one large frame is one
span.
- plain tar: cut as conversion cuts (:mod:`veneer.convert.cut`).

Invariant: every span has been decoded as readers decode it, and what came out has the layer's diffID. Memory is
bounded by spans. Not for: getting the layer, which is a whole local file that has been checked.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import zstandard

from veneer.convert.checkpoints import IndexingGunzip
from veneer.convert.cut import FRAME_SIZE
from veneer.convert.frames import Frame, LayerReader, SpanRecorder, TarIndexer
from veneer.convert.stretches import Stretches
from veneer.convert.work import BlobFile
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.formats.decompress import PIECE_SIZE, frame_boundaries, plain_pieces
from veneer.index.model import Codec, Device, LayerIndex
from veneer.index.wire_frame import MAX_STREAM_WINDOW
from veneer.index.wire_spans import MAX_SPAN_LENGTH, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import LAYER_COMPRESSION

__all__ = ["LARGE_SPAN", "IndexedLayer", "index_layer"]

#: Spans that are longer than this make a layer hardly lazy: people are told.
LARGE_SPAN: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class IndexedLayer:
    """A layer's index, and the metadata that its tree does not hold -> how many."""

    index: LayerIndex
    dropped: Mapping[str, int]

    @property
    def largest_span(self) -> int:
        """Plain bytes of it."""
        return max((span.length for span in self.index.device.spans), default=0)


def index_layer(
    layer: Descriptor, diff_id: Digest, devices: str, stored: Path, windows: BlobFile, what: str
) -> IndexedLayer:
    """Index one layer. Blocks.

    Args:
        layer: the blob; it has been checked that ``stored`` is it.
        diff_id: what it must unpack to.
        devices: what becomes of device nodes, ``drop`` or ``keep``.
        stored: a file of its bytes.
        windows: where its windows are written, if its spans need any.
        what: names the layer in errors.

    Raises:
        IntegrityError: the compression, the tar or the diffID is wrong.
        UnsupportedFormat: it cannot be cut into spans that are short enough.
    """
    with stored.open("rb") as file:
        match LAYER_COMPRESSION[layer.media_type]:
            case "gzip":
                return _index_gzip(layer, diff_id, devices, stored, file, windows, what)
            case "zstd":
                return _index_zstd(layer, diff_id, devices, file, what)
            case _:
                return _index_plain(layer, diff_id, devices, file, what)


def _index_gzip(
    layer: Descriptor,
    diff_id: Digest,
    devices: str,
    path: Path,
    file: IO[bytes],
    windows: BlobFile,
    what: str,
) -> IndexedLayer:
    with IndexingGunzip(path, what) as gunzip, tempfile.TemporaryFile(dir=path.parent) as exported:
        buffer = bytearray(PIECE_SIZE)
        while gunzip.readinto(buffer):
            pass
        stretches = Stretches(file, gunzip.export(exported), windows, what)
        indexer = TarIndexer(diff_id, devices, what)
        for piece in stretches.pieces():
            indexer.feed(piece)
        return _indexed(indexer, stretches.device(layer, diff_id))


def _index_zstd(layer: Descriptor, diff_id: Digest, devices: str, file: IO[bytes], what: str) -> IndexedLayer:
    indexer, spans = TarIndexer(diff_id, devices, what), SpanRecorder()
    for start, stored, plain in _groups(file, layer.size, what):
        spans.add(Frame(len(plain), stored, hashlib.sha256(stored).digest()), start)
        indexer.feed(plain)
    return _indexed(indexer, _device(layer, diff_id, spans, Codec("zstd-frames")))


def _groups(file: IO[bytes], size: int, what: str) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, stored and plain bytes of neighbouring frames that together are worth a span."""
    boundaries = frame_boundaries(file, size, what)
    start = end = next(boundaries)
    plain = b""
    for boundary in boundaries:
        plain += _decode(file, end, boundary, what)
        end = boundary
        if len(plain) >= FRAME_SIZE or (end == size and plain):
            if max(len(plain), end - start) > MAX_SPAN_LENGTH:
                raise _uncut(what, max(len(plain), end - start))
            file.seek(start)
            yield start, file.read(end - start), plain
            start, plain = end, b""


def _decode(file: IO[bytes], start: int, end: int, what: str) -> bytes:
    """The plain bytes of one frame."""
    if end - start > MAX_SPAN_LENGTH:
        raise _uncut(what, end - start)
    file.seek(start)
    frames = zstandard.ZstdDecompressor(max_window_size=MAX_STREAM_WINDOW).stream_reader(
        file.read(end - start), read_across_frames=True
    )
    pieces, length = [], 0
    try:
        while piece := frames.read(PIECE_SIZE):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_SPAN_LENGTH:
                raise _uncut(what, length)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: malformed zstd stream: {error}") from error
    return b"".join(pieces)


def _uncut(what: str, length: int) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{what}: it is one zstd frame of {length} bytes or more, which cannot be entered",
        hint="make a lazily loadable copy: veneer convert",
    )


def _index_plain(layer: Descriptor, diff_id: Digest, devices: str, file: IO[bytes], what: str) -> IndexedLayer:
    reader, spans = LayerReader(diff_id, devices, what), SpanRecorder()
    offset = 0
    for batch in reader.batches(plain_pieces(file.read, "none", what)):
        for plain in batch:
            spans.add(Frame(len(plain), plain, hashlib.sha256(plain).digest()), offset)
            offset += len(plain)
    tree, dropped = reader.finish()
    return IndexedLayer(LayerIndex(tree, _device(layer, diff_id, spans, Codec("raw"))), dropped)


def _indexed(indexer: TarIndexer, device: Device) -> IndexedLayer:
    indexer.end()
    tree, dropped = indexer.finish()
    return IndexedLayer(LayerIndex(tree, device), dropped)


def _device(layer: Descriptor, diff_id: Digest, spans: SpanRecorder, codec: Codec) -> Device:
    table = spans.table(codec)
    return Device(layer, diff_id, table, Digest.of(encode_spans(layer, diff_id, table)))
