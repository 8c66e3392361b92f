"""One layer's plain bytes to spans, trees and frames: the synchronous half of a conversion.

Memory: one piece, what the cutter has not decided (less than a span and a header), and one batch.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import zstandard

from veneer.convert.cut import SpanCutter
from veneer.errors import IntegrityError
from veneer.index.build import TreeBuilder
from veneer.index.model import Codec, LayerTree, SpanTable
from veneer.index.tar import TarEntry, TarParser
from veneer.oci.digest import Digest

__all__ = [
    "BATCH_SIZE",
    "EMPTY_FRAME",
    "LEVEL",
    "Frame",
    "LayerReader",
    "SpanRecorder",
    "TarIndexer",
    "compress",
]

#: zstd level, chosen by measurement: docs/decisions/0003-native-layer-frames.md.
LEVEL = 6
#: Plain bytes that are compressed in one go: some 10 ms, which makes the hop to a thread cheap.
BATCH_SIZE = 1 << 20

ZSTD = Codec("zstd")

Frames = list[bytes]


class Frame(NamedTuple):
    """A compressed span: its plain length, its stored bytes and their SHA-256."""

    length: int
    stored: bytes
    digest: bytes


def compress(spans: Sequence[bytes], level: int = LEVEL) -> list[Frame]:
    """One zstd frame for each span, which states its content size and has no checksum of its own."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    frames = []
    for plain in spans:
        stored = compressor.compress(plain)
        frames.append(Frame(len(plain), stored, hashlib.sha256(stored).digest()))
    return frames


#: What a stream of no spans is stored as: other tools expect at least one frame.
EMPTY_FRAME = zstandard.ZstdCompressor(level=LEVEL).compress(b"")


class TarIndexer:
    """Reads a layer's tar once: hash and tree. For one thread.

    Args:
        diff_id: what the tar must hash to.
        devices: what becomes of device nodes, ``drop`` or ``keep``.
        what: names the layer in errors.
    """

    def __init__(self, diff_id: Digest, devices: str, what: str) -> None:
        self._diff_id = diff_id
        self._what = what
        self._hasher = diff_id.hasher()
        self._parser = TarParser()
        self._builder = TreeBuilder(devices)

    def feed(self, piece: bytes) -> list[TarEntry]:
        """Take the next bytes; the entries that they complete."""
        self._hasher.update(piece)
        return self._entries(piece)

    def end(self) -> list[TarEntry]:
        """There are no more bytes; the entries that this completes."""
        return self._entries(None)

    def finish(self) -> tuple[LayerTree, dict[str, int]]:
        """The tree and what it does not hold, once the end has come. Checks the diffID."""
        self._diff_id.check_hash(self._hasher, f"{self._what}: uncompressed bytes (diffID)")
        try:
            return self._builder.finish(), dict(self._builder.dropped)
        except IntegrityError as error:
            raise IntegrityError(f"{self._what}: {error.message}") from error

    def _entries(self, piece: bytes | None) -> list[TarEntry]:
        try:
            entries = self._parser.finish() if piece is None else self._parser.feed(piece)
            for entry in entries:
                self._builder.add(entry)
        except IntegrityError as error:
            raise IntegrityError(f"{self._what}: {error.message}") from error
        return entries


class LayerReader:
    """Reads a layer's tar once: hash, tree and cuts. Takes what :class:`TarIndexer` takes. For one thread."""

    def __init__(self, diff_id: Digest, devices: str, what: str) -> None:
        self._indexer = TarIndexer(diff_id, devices, what)
        self._cutter = SpanCutter()
        self._buffer = bytearray()
        self._base = 0  # stream offset of the buffer

    def batches(self, pieces: Iterator[bytes]) -> Iterator[Frames]:
        """The spans of the whole stream in order, some :data:`BATCH_SIZE` bytes at a time."""
        batch: Frames = []
        size = total = 0
        for piece in pieces:
            self._buffer += piece
            total += len(piece)
            spans = self._take(self._cutter.advance(self._indexer.feed(piece), total))
            batch += spans
            size += sum(map(len, spans))
            if size >= BATCH_SIZE:
                yield batch
                batch, size = [], 0
        cuts = self._cutter.advance(self._indexer.end(), total)
        batch += self._take([*cuts, *self._cutter.finish(total)])
        if batch:
            yield batch

    def finish(self) -> tuple[LayerTree, dict[str, int]]:
        """The tree and what it does not hold, once all batches have been taken. Checks the diffID."""
        return self._indexer.finish()

    def _take(self, cuts: Sequence[int]) -> Frames:
        """Cut the beginning of the buffer off at ``cuts``."""
        if not cuts:
            return []
        ends = [cut - self._base for cut in cuts]
        starts = [0, *ends[:-1]]
        spans = [bytes(self._buffer[start:end]) for start, end in zip(starts, ends, strict=True) if end > start]
        del self._buffer[: ends[-1]]
        self._base = cuts[-1]
        return spans


@dataclass(slots=True)
class SpanRecorder:
    """Collects the span table while frames are written one after the other."""

    _starts: "array[int]" = field(default_factory=lambda: array("q", [0]))
    _offsets: "array[int]" = field(default_factory=lambda: array("q"))
    _lengths: "array[int]" = field(default_factory=lambda: array("q"))
    _digests: bytearray = field(default_factory=bytearray)
    _carries: bytearray = field(default_factory=bytearray)

    def add(self, frame: Frame, stored_offset: int, carry: int = 0) -> None:
        """Note the next frame, which is at ``stored_offset``."""
        self._carries.append(carry)
        self._starts.append(self._starts[-1] + frame.length)
        self._offsets.append(stored_offset)
        self._lengths.append(len(frame.stored))
        self._digests += frame.digest

    def table(self, codec: Codec = ZSTD) -> SpanTable:
        """The spans so far, all of one codec."""
        return SpanTable(
            self._starts,
            self._offsets,
            self._lengths,
            bytes(self._digests),
            (codec,) if self._lengths else (),
            carries=bytes(self._carries) if any(self._carries) else b"",
        )
