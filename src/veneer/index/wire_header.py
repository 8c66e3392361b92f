"""The header of the index artifact: which sections there are, where, and what they hash to.

Its length follows from the number of layers, so it can be asked for in one range request. It is checked as a
whole: sections follow it and each other without gaps, and together are of bounded size. The layout is
specified in docs/reference/index-format.md, "Header".
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.oci.digest import Digest

__all__ = [
    "MAX_LAYERS",
    "MAX_PLAIN_SIZE",
    "IndexHeader",
    "LayerRecord",
    "SectionRef",
    "header_length",
    "pack_header",
    "parse_header",
]

#: As many layers as a manifest may have.
MAX_LAYERS: Final = 1_000
#: Plain bytes of all sections together. An image of 5 million files and 2 million spans needs about half.
MAX_PLAIN_SIZE: Final = 512 << 20
#: Real sections shrink to a tenth at best; only what is larger than any of them can be is suspected of being
#: a bomb: small to fetch, and minutes to decode.
MAX_RATIO: Final = 1_000
UNSUSPECTED_SIZE: Final = 64 << 20

_MAGIC: Final = b"\x89VENEER\n"
_VERSION: Final = 1
#: Required features that this reader knows: none yet. A reader refuses every other bit.
_KNOWN_FEATURES: Final = 0

#: magic, version, layers, header length, required features, optional features, reserved
_PROLOGUE: Final = struct.Struct("<8sHHIQQ32s")
#: offset, stored length, plain length, seal, compression, digest algorithm, reserved, two SHA-256
_SECTION: Final = struct.Struct("<QQQHHHH32s32s")
#: digest algorithm, reserved, digest (short ones padded with zeros)
_DIGEST: Final = struct.Struct("<H6s64s")
_DIGESTS_SIZE: Final = 2 * _DIGEST.size
_RECORD_SIZE: Final = _DIGESTS_SIZE + 3 * _SECTION.size
_FIXED_SIZE: Final = _PROLOGUE.size + _SECTION.size

_SEAL_NONE: Final = 0
_COMPRESSION_ZSTD: Final = 1
_ALGORITHMS: Final = {"sha256": (1, 32), "sha512": (2, 64)}
_SHA256: Final = _ALGORITHMS["sha256"][0]

_NEWER: Final = "a newer veneer may read it"


@dataclass(frozen=True, slots=True)
class SectionRef:
    """Where a section is in the artifact, and what it hashes to as stored and as plain bytes.

    Args:
        offset: from the start of the artifact.
        stored_length: bytes in the artifact, at least 1.
        stored_digest: SHA-256 of those.
        length: plain bytes, at least 1.
        digest: SHA-256 of those: the identity of the section.
    """

    offset: int
    stored_length: int
    stored_digest: bytes
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer's entry in the header. ``aux`` says where the windows of its spans are, if they have any."""

    blob: Digest
    diff_id: Digest
    tree: SectionRef
    spans: SectionRef
    aux: SectionRef | None


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The header of an artifact.

    Args:
        layers: lowest first.
        policy: the section of the metadata policy.
        required: feature bits that a reader must know.
        optional: feature bits that a reader may ignore.
        length: bytes of the header itself; the first section follows.
    """

    layers: tuple[LayerRecord, ...]
    policy: SectionRef
    required: int
    optional: int
    length: int

    @property
    def artifact_length(self) -> int:
        """Bytes of the whole artifact."""
        return max(ref.offset + ref.stored_length for ref in self.sections())

    def sections(self) -> Iterator[SectionRef]:
        """Every section, in the order in which they follow each other in the artifact."""
        yield self.policy
        for layer in self.layers:
            yield layer.tree
            yield layer.spans
        yield from (layer.aux for layer in self.layers if layer.aux is not None)


def header_length(layer_count: int) -> int:
    """Bytes of the header of an index of so many layers: what to ask for first."""
    return _FIXED_SIZE + layer_count * _RECORD_SIZE


def pack_header(layers: Sequence[LayerRecord], policy: SectionRef) -> bytes:
    """The header of an artifact with these sections."""
    length = header_length(len(layers))
    parts = [
        _PROLOGUE.pack(_MAGIC, _VERSION, len(layers), length, _KNOWN_FEATURES, 0, b""),
        _pack_section(policy),
    ]
    for layer in layers:
        parts += (_pack_digest(layer.blob), _pack_digest(layer.diff_id))
        parts += (_pack_section(layer.tree), _pack_section(layer.spans))
        parts.append(bytes(_SECTION.size) if layer.aux is None else _pack_section(layer.aux))
    return b"".join(parts)


def _pack_digest(digest: Digest) -> bytes:
    return _DIGEST.pack(_ALGORITHMS[digest.algorithm][0], b"", digest.raw)


def _pack_section(ref: SectionRef) -> bytes:
    return _SECTION.pack(
        ref.offset,
        ref.stored_length,
        ref.length,
        _SEAL_NONE,
        _COMPRESSION_ZSTD,
        _SHA256,
        0,
        ref.stored_digest,
        ref.digest,
    )


def parse_header(data: bytes) -> IndexHeader:
    """The header at the beginning of ``data``, which may hold more of the artifact, or all of it.

    Raises UnsupportedFormat for versions, features, seals and compressions that this reader does not know, and
    IntegrityError for everything else that :func:`pack_index` would not have written.
    """
    if len(data) < _FIXED_SIZE:
        raise IntegrityError(f"index header: {len(data)} bytes are not a whole header")
    magic, version, count, length, required, optional, reserved = _PROLOGUE.unpack_from(data)
    if magic != _MAGIC:
        raise UnsupportedFormat("index header: this is not a veneer index")
    if version != _VERSION:
        raise UnsupportedFormat.of_version("index header", version, _VERSION)
    if unknown := required & ~_KNOWN_FEATURES:
        raise UnsupportedFormat(f"index header: unknown features {unknown:#x} are required", hint=_NEWER)
    if count > MAX_LAYERS or length != header_length(count) or any(reserved):
        raise IntegrityError("index header: its length, number of layers or reserved bytes are wrong")
    if len(data) < length:
        raise IntegrityError(f"index header: {len(data)} bytes of {length}")
    policy = _parse_section(data, _PROLOGUE.size)
    header = IndexHeader(
        tuple(_parse_record(data, header_length(number)) for number in range(count)),
        policy,
        required,
        optional,
        length,
    )
    offset, plain = length, 0
    for ref in header.sections():
        if ref.offset != offset or not ref.stored_length or not ref.length:
            raise IntegrityError("index header: sections are empty, or do not follow each other")
        if ref.length > UNSUSPECTED_SIZE + MAX_RATIO * ref.stored_length:
            raise IntegrityError(
                f"index header: a section of {ref.length} bytes is stored in {ref.stored_length}"
            )
        offset += ref.stored_length
        plain += ref.length
    if plain > MAX_PLAIN_SIZE:
        raise IntegrityError(f"index header: sections of {plain} bytes together are more than {MAX_PLAIN_SIZE}")
    return header


def _parse_record(data: bytes, offset: int) -> LayerRecord:
    sections = offset + _DIGESTS_SIZE
    aux = sections + 2 * _SECTION.size
    return LayerRecord(
        blob=_parse_digest(data, offset),
        diff_id=_parse_digest(data, offset + _DIGEST.size),
        tree=_parse_section(data, sections),
        spans=_parse_section(data, sections + _SECTION.size),
        aux=_parse_section(data, aux) if any(data[aux : aux + _SECTION.size]) else None,
    )


def _parse_section(data: bytes, offset: int) -> SectionRef:
    start, stored_length, length, seal, compression, algorithm, reserved, stored_digest, digest = (
        _SECTION.unpack_from(data, offset)
    )
    if seal != _SEAL_NONE:
        raise UnsupportedFormat(f"index header: a section is sealed with method {seal}", hint=_NEWER)
    if compression != _COMPRESSION_ZSTD or algorithm != _SHA256:
        raise UnsupportedFormat(
            f"index header: compression {compression} or digest algorithm {algorithm} of a section", hint=_NEWER
        )
    if reserved:
        raise IntegrityError("index header: reserved bytes of a section are in use")
    return SectionRef(start, stored_length, stored_digest, length, digest)


def _parse_digest(data: bytes, offset: int) -> Digest:
    number, reserved, padded = _DIGEST.unpack_from(data, offset)
    for algorithm, (known, size) in _ALGORITHMS.items():
        if number == known:
            if any(reserved) or any(padded[size:]):
                raise IntegrityError("index header: a digest is followed by something else")
            return Digest(algorithm, padded[:size].hex())
    raise UnsupportedFormat(f"index header: digest algorithm {number}", hint=_NEWER)
