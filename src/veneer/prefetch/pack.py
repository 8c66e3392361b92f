"""A pack: the bytes that a start reads, in the order of their first use, as one small blob; and its index.

To the store a pack is a device like a layer's. What makes it a pack is its list of *places*: which bytes of
which layer are where in it. So the same bytes can always be had from the layers, and the two can be compared.

Invariant of a :class:`PackIndex`, however it came about: places are blocks of their layers, do not overlap
there, and tile the pack without gaps. Indexes come from outside: they are bounded before anything is allocated,
and refused unless :func:`encode_pack_index` could have written them; docs/reference/pack-format.md.

Not here: whom a pack is believed (:mod:`veneer.image.packs`), and what mounts make of places
(:mod:`veneer.prefetch.placement`).
"""

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Final, NamedTuple

import zstandard

from veneer.errors import IntegrityError, UnsupportedFormat, UsageError
from veneer.index.model import Device
from veneer.index.wire_columns import Fields, join, pack, unsigned_column
from veneer.index.wire_frame import decode_zstd
from veneer.index.wire_spans import decode_spans, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import VENEER_PACK, VENEER_PACK_INDEX

__all__ = [
    "BLOCK",
    "MAX_PACK_INDEX_SIZE",
    "MAX_PACK_SIZE",
    "MAX_PACK_SPAN",
    "PackIndex",
    "Place",
    "decode_pack_index",
    "encode_pack_index",
    "in_order",
]

#: Places are whole blocks: what files in a tar are aligned to, and what EROFS maps.
BLOCK: Final = 512
#: Plain bytes of a pack. The largest start measured touches 57 MB; more than this is no start but a download.
MAX_PACK_SIZE: Final = 256 << 20
#: A span that cannot be had is put together from the layers as a whole, which bounds what that may cost.
MAX_PACK_SPAN: Final = 4 << 20
#: A pack in the smallest possible places, which do not compress, has an index of some 5 MiB.
MAX_PACK_INDEX_SIZE: Final = 8 << 20

_MAGIC: Final = b"\x89VPACK\r\n"
#: magic, version, plain length of the zstd frame that follows
_HEADER: Final = struct.Struct("<8sII")
_VERSION: Final = 1
_FIELDS: Final = 8
_MAX_PLAIN: Final = 16 << 20
_MAX_LAYERS: Final = 1_000
_LEVEL: Final = 19


class Place(NamedTuple):
    """``length`` bytes at ``offset`` of the device of ``layer`` (a diffID) are at ``at`` in the pack."""

    layer: Digest
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True, eq=False)
class PackIndex:
    """What a pack is.

    Args:
        device: its blob and how that is cut; the diffID is the digest of its plain bytes.
        places: sorted by layer and offset.
    """

    device: Device
    places: tuple[Place, ...]

    @property
    def layers(self) -> frozenset[Digest]:
        """The diffIDs of the layers whose bytes it has."""
        return frozenset(place.layer for place in self.places)

    def find(self, layer: Digest, offset: int, length: int) -> int | None:
        """Where the pack has a range of a layer, if it has all of it in one place."""
        before = bisect_right(self.places, (layer, offset), key=lambda place: (place.layer, place.offset)) - 1
        if before < 0:
            return None
        place = self.places[before]
        if place.layer != layer or offset + length > place.offset + place.length:
            return None
        return place.at + offset - place.offset


def in_order(places: Iterable[Place]) -> list[Place]:
    """Places in the order of the pack, which is that of first use."""
    return sorted(places, key=lambda place: place.at)


def encode_pack_index(index: PackIndex) -> bytes:
    """The index as a blob. Raises IntegrityError when it describes no pack."""
    _check(index)
    device = index.device
    counts = Counter(place.layer for place in index.places)
    gaps = (place.offset - before for place, before in zip(index.places, _ends(index.places), strict=False))
    plain = pack(
        [
            encode_spans(device.blob, device.diff_id, device.spans),
            len(counts),
            join(str(layer).encode() for layer in counts),
            unsigned_column(counts.values()),
            len(index.places),
            unsigned_column(gap // BLOCK for gap in gaps),
            unsigned_column(place.length // BLOCK for place in index.places),
            unsigned_column(place.at // BLOCK for place in index.places),
        ]
    )
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(plain)
    data = _HEADER.pack(_MAGIC, _VERSION, len(plain)) + frame
    if len(plain) > _MAX_PLAIN or len(data) > MAX_PACK_INDEX_SIZE:
        raise IntegrityError(f"pack index: {len(data)} bytes are more than {MAX_PACK_INDEX_SIZE}")
    return data


def decode_pack_index(data: bytes, blob: Descriptor) -> PackIndex:
    """The index that ``data`` is.

    Args:
        data: all of the blob.
        blob: its descriptor, as whoever is believed names it.

    Raises:
        IntegrityError: it is not that blob, or not what :func:`encode_pack_index` writes.
        UnsupportedFormat: a version or codec that nothing here can read.
    """
    what = "pack index"
    if blob.media_type != VENEER_PACK_INDEX:
        raise UnsupportedFormat(f"{what}: of type {blob.media_type!r}", hint="a newer veneer may have made it")
    if len(data) != blob.size or len(data) > MAX_PACK_INDEX_SIZE:
        raise IntegrityError(f"{what}: {len(data)} bytes, expected {blob.size}, at most {MAX_PACK_INDEX_SIZE}")
    blob.digest.check(data, what)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise UnsupportedFormat(f"{what}: this is not a veneer pack index")
    _, version, length = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise UnsupportedFormat.of_version(what, version, _VERSION)
    if length > _MAX_PLAIN:
        raise IntegrityError(f"{what}: {length} plain bytes, more than {_MAX_PLAIN}")
    fields = Fields(decode_zstd(memoryview(data)[_HEADER.size :], length, what), _FIELDS, what)
    device = decode_spans(fields.blob())
    index = PackIndex(device, _places(fields))
    _check(index)
    return index


def _places(fields: Fields) -> tuple[Place, ...]:
    layers = [_digest(text, fields.what) for text in fields.strings(fields.number(_MAX_LAYERS))]
    counts = fields.unsigned(len(layers))
    total = fields.number(MAX_PACK_SIZE // BLOCK)
    if sum(counts) != total or not all(counts) or len(set(layers)) != len(layers):
        raise IntegrityError(
            f"{fields.what}: places of layers are not as many as places, or a layer comes twice"
        )
    gaps, lengths, ats = fields.unsigned(total), fields.unsigned(total), fields.unsigned(total)
    if total and max(map(max, (gaps, lengths, ats))) >= 1 << 48:
        raise IntegrityError(f"{fields.what}: a place is beyond the end of any device")
    places = []
    columns = zip(gaps, lengths, ats, strict=True)
    for layer, count in zip(layers, counts, strict=True):
        end = 0
        for gap, length, at in islice(columns, count):
            places.append(Place(layer, end + gap * BLOCK, length * BLOCK, at * BLOCK))
            end += (gap + length) * BLOCK
    return tuple(places)


def _digest(text: bytes, what: str) -> Digest:
    try:
        return Digest.parse(text.decode("ascii", "replace"))
    except UsageError as error:
        raise IntegrityError(f"{what}: {error.message}") from error


def _ends(places: Sequence[Place]) -> Iterable[int]:
    """For each place, where the one before it on the same layer ends."""
    yield 0
    for place, after in pairwise(places):
        yield place.offset + place.length if place.layer == after.layer else 0


def _check(index: PackIndex) -> None:
    """Raise IntegrityError for what is no pack."""
    what, device, places = "pack index", index.device, index.places
    size = device.spans.size
    if device.blob.media_type != VENEER_PACK:
        raise IntegrityError(f"{what}: its blob is of type {device.blob.media_type!r}")
    if not 0 < size <= MAX_PACK_SIZE or size % BLOCK:
        raise IntegrityError(f"{what}: a pack of {size} bytes")
    starts = device.spans.starts
    if max(after - start for start, after in pairwise(starts)) > MAX_PACK_SPAN:
        raise IntegrityError(f"{what}: a span is longer than {MAX_PACK_SPAN} bytes")
    for place, before in zip(places, _ends(places), strict=False):
        if place.length <= 0 or place.offset < before or (place.offset | place.length | place.at) % BLOCK:
            raise IntegrityError(f"{what}: places overlap, are empty, or are not whole blocks")
    layers = [place.layer for place in places]
    if layers != sorted(layers):
        raise IntegrityError(f"{what}: layers are not in order")
    if len(set(layers)) > _MAX_LAYERS:
        raise IntegrityError(f"{what}: more than {_MAX_LAYERS} layers")
    end = 0
    last: Place | None = None
    for place in in_order(places):
        if place.at != end:
            raise IntegrityError(f"{what}: places do not tile the pack")
        if last and (last.layer, last.offset + last.length) == (place.layer, place.offset):
            raise IntegrityError(f"{what}: one place is written as two")
        end, last = place.at + place.length, place
    if end != size:
        raise IntegrityError(f"{what}: places of {end} bytes in a pack of {size}")
