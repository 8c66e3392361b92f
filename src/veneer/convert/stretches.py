"""The span table and the windows of a gzip layer, made of checkpoints and proven by decoding every span.

Invariant: what the plain bytes that leave here hash to is what readers of the spans will get, for the same
codec has decoded the same stored bytes with the same window. So an index is right if its diffID is.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import IO, Final

from veneer.codec.deflate import Checkpoint, decode_stretch
from veneer.convert.checkpoints import Checkpoints
from veneer.convert.frames import Frame, SpanRecorder, compress
from veneer.convert.work import BlobFile
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.model import DEFLATE, Codec, Device
from veneer.index.wire_spans import MAX_SPAN_LENGTH, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["Stretches"]

#: Windows in one frame. Neighbours are alike, and are needed together as often as their spans are.
WINDOWS_PER_FRAME: Final = 4
#: Of zstd. Level 19 saves a twentieth and takes ten times as long.
_LEVEL: Final = 9


class Stretches:
    """Cuts one gzip layer at checkpoints. Call :meth:`pieces` to its end, then :meth:`device`. For one thread.

    Args:
        stored: the layer, a local file that can be sought.
        checkpoints: where it can be cut.
        windows: where the windows are written.
        what: names the layer in errors.
    """

    def __init__(self, stored: IO[bytes], checkpoints: Checkpoints, windows: BlobFile, what: str) -> None:
        self._stored = stored
        self._checkpoints = checkpoints
        self._spans = SpanRecorder()
        self._windows = _WindowWriter(windows)
        self._what = what

    def pieces(self) -> Iterator[bytes]:
        """The plain bytes of each span, in order. Raises IntegrityError, or UnsupportedFormat."""
        points = self._checkpoints
        end = Checkpoint(points.stored_size, points.size, 0, b"")
        for number, (start, stop) in enumerate(pairwise(_chain(points.walk(self._stored), end))):
            stored_length, length = stop.stored_offset - start.stored_offset, stop.offset - start.offset
            what = f"{self._what}: span {number}"
            if max(stored_length, length) > MAX_SPAN_LENGTH:
                raise UnsupportedFormat(
                    f"{what}: {length} bytes of the gzip stream cannot be cut",
                    hint="make a lazily loadable copy: veneer convert",
                )
            self._stored.seek(start.stored_offset)
            stored = self._stored.read(stored_length)
            plain = decode_stretch(stored, length, start.carry, start.window, what)
            self._spans.add(
                Frame(length, stored, hashlib.sha256(stored).digest()), start.stored_offset, start.carry
            )
            self._windows.add(start.window)
            yield plain

    def device(self, blob: Descriptor, diff_id: Digest) -> Device:
        """The device of the layer ``blob``, and with it that of its windows."""
        if self._checkpoints.stored_size != blob.size:
            raise IntegrityError(
                f"{self._what}: expected {blob.size} bytes, got {self._checkpoints.stored_size}"
            )
        if not self._checkpoints.size:
            spans = self._spans.table()
            return Device(blob, diff_id, spans, Digest.of(encode_spans(blob, diff_id, spans)))
        windows = self._windows.device()
        spans = self._spans.table(Codec(DEFLATE, parameters=windows.key.raw))
        return Device(blob, diff_id, spans, Digest.of(encode_spans(blob, diff_id, spans, windows)), windows)


def _chain(points: Iterable[Checkpoint], end: Checkpoint) -> Iterator[Checkpoint]:
    found = False
    for point in points:
        found = True
        yield point
    if found:
        yield end


class _WindowWriter:
    """Writes the device with the windows, frame by frame."""

    def __init__(self, file: BlobFile) -> None:
        self._file = file
        self._spans = SpanRecorder()
        self._hasher = hashlib.sha256()
        self._held: list[bytes] = []

    def add(self, window: bytes) -> None:
        self._hasher.update(window)
        self._held.append(window)
        if len(self._held) == WINDOWS_PER_FRAME:
            self._flush()

    def device(self) -> Device:
        self._flush()
        blob, diff_id = self._file.descriptor(), Digest("sha256", self._hasher.hexdigest())
        spans = self._spans.table()
        return Device(blob, diff_id, spans, Digest.of(encode_spans(blob, diff_id, spans)))

    def _flush(self) -> None:
        if self._held:
            for frame in compress([b"".join(self._held)], _LEVEL):
                self._spans.add(frame, self._file.append(frame.stored))
            self._held = []
