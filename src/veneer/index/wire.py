"""The index artifact: one blob that holds the trees and span tables of all layers of an image.

A fixed header, whose length follows from the number of layers, lists where each section is and what it hashes
to. So a client reads the header, then only the sections that it does not have yet. Sections are compressed
one by one; their identity is the digest of the plain bytes, which are canonical.

Everything read here came from outside: it is bounded before it is allocated, and refused unless
:func:`pack_index` could have written it. The format is specified in docs/reference/index-format.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import zstandard

from veneer.errors import IntegrityError
from veneer.index.model import Device, LayerIndex, MetadataPolicy
from veneer.index.wire_columns import Fields, join, pack, unsigned_column
from veneer.index.wire_frame import decode_zstd
from veneer.index.wire_header import (
    MAX_LAYERS,
    MAX_PLAIN_SIZE,
    IndexHeader,
    LayerRecord,
    SectionRef,
    header_length,
    pack_header,
    parse_header,
)
from veneer.index.wire_spans import decode_spans, encode_spans
from veneer.index.wire_tree import decode_tree, encode_tree
from veneer.oci.digest import Digest

__all__ = [
    "MAX_LAYERS",
    "MAX_PLAIN_SIZE",
    "IndexHeader",
    "LayerRecord",
    "PackedIndex",
    "SectionRef",
    "decode_policy",
    "decode_section",
    "decode_spans",
    "decode_tree",
    "encode_policy",
    "encode_spans",
    "encode_tree",
    "header_length",
    "pack_index",
    "parse_header",
]
#: Decoding speed hardly depends on it; 50,000 files are encoded, checked and compressed in 0.7 s.
_LEVEL: Final = 19
_POLICY: Final = "policy section"
_POLICY_FIELDS: Final = 4
#: There are about a dozen kinds of metadata that can be left out.
_MAX_DROPPED: Final = 1_000


def pack_index(layers: Sequence[LayerIndex], policy: MetadataPolicy) -> bytes:
    """The whole artifact for an image of ``layers`` (lowest first).

    Raises IntegrityError when a layer says something that the format cannot, or the whole is too large.
    """
    if len(layers) > MAX_LAYERS:
        raise IntegrityError(f"index: {len(layers)} layers are more than {MAX_LAYERS}")
    body = bytearray()
    base = header_length(len(layers))
    compressor = zstandard.ZstdCompressor(level=_LEVEL)

    def add(plain: bytes) -> SectionRef:
        stored = compressor.compress(plain)
        offset = base + len(body)
        body.extend(stored)
        stored_digest, digest = hashlib.sha256(stored).digest(), hashlib.sha256(plain).digest()
        return SectionRef(offset, len(stored), stored_digest, len(plain), digest)

    policy_ref = add(encode_policy(policy))
    records = []
    for layer in layers:
        device = layer.device
        tree = add(encode_tree(layer.tree, device.spans.size))
        spans = add(encode_spans(device.blob, device.diff_id, device.spans, device.windows))
        records.append(LayerRecord(device.blob.digest, device.diff_id, tree, spans, None))
    for number, layer in enumerate(layers):
        if (windows := layer.device.windows) is not None:
            aux = add(encode_spans(windows.blob, windows.diff_id, windows.spans))
            if aux.digest != windows.key.raw:
                raise IntegrityError("index: the key of a device with windows is wrong")
            records[number] = replace(records[number], aux=aux)
    header = pack_header(records, policy_ref)
    parse_header(header)  # what readers would refuse is not written
    return b"".join((header, body))


def decode_section(ref: SectionRef, stored: bytes) -> bytes:
    """The plain bytes of a section, verified as stored and as plain bytes."""
    what = f"index section at {ref.offset}"
    if len(stored) != ref.stored_length:
        raise IntegrityError(f"{what}: expected {ref.stored_length} bytes, got {len(stored)}")
    Digest.from_bytes(ref.stored_digest).check(stored, what)
    if ref.length > MAX_PLAIN_SIZE:
        raise IntegrityError(f"{what}: {ref.length} bytes are more than {MAX_PLAIN_SIZE}")
    plain = decode_zstd(stored, ref.length, what)
    Digest.from_bytes(ref.digest).check(plain, f"plain {what}")
    return plain


@dataclass(frozen=True, slots=True, eq=False)
class PackedIndex:
    """A whole artifact of which everything but the trees has been decoded and checked.

    Trees are most of an index, and what has a metadata image already needs none of them.

    Args:
        header: where the sections are.
        devices: one a layer, lowest first.
        policy: the metadata policy.
        data: the artifact.
    """

    header: IndexHeader
    devices: tuple[Device, ...]
    policy: MetadataPolicy
    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The index in ``data``. Raises IntegrityError or UnsupportedFormat; the trees have a say later."""
        header = parse_header(data)
        if len(data) != header.artifact_length:
            raise IntegrityError(f"index: expected {header.artifact_length} bytes, got {len(data)}")
        devices = tuple(_decode_device(data, record) for record in header.layers)
        return cls(header, devices, decode_policy(_section(data, header.policy)), data)

    def layers(self) -> tuple[LayerIndex, ...]:
        """The layers with their trees, decoded anew by every call. Raises IntegrityError."""
        return tuple(
            LayerIndex(decode_tree(_section(self.data, record.tree), device.spans.size), device)
            for record, device in zip(self.header.layers, self.devices, strict=True)
        )


def _section(data: bytes, ref: SectionRef) -> bytes:
    return decode_section(ref, data[ref.offset : ref.offset + ref.stored_length])


def _decode_device(data: bytes, record: LayerRecord) -> Device:
    windows = decode_spans(_section(data, record.aux)) if record.aux is not None else None
    device = decode_spans(_section(data, record.spans), windows)
    if (device.blob.digest, device.diff_id) != (record.blob, record.diff_id):
        raise IntegrityError("index: header and spans section name different layers")
    return device


def encode_policy(policy: MetadataPolicy) -> bytes:
    """The plain section of a metadata policy."""
    dropped = sorted((what.encode(), count) for what, count in policy.dropped.items())
    try:
        counts = unsigned_column(count for _, count in dropped)
    except (OverflowError, ValueError) as error:
        raise IntegrityError(f"{_POLICY}: a count is out of range") from error
    data = pack([policy.devices, len(dropped), join(what for what, _ in dropped), counts])
    if decode_policy(data) != policy:
        raise IntegrityError(f"{_POLICY}: it says what the format cannot")
    return data


def decode_policy(data: bytes) -> MetadataPolicy:
    """The metadata policy of a plain section."""
    fields = Fields(data, _POLICY_FIELDS, _POLICY)
    devices = fields.text()
    if devices not in ("drop", "keep"):
        raise IntegrityError(f"{_POLICY}: device nodes are neither dropped nor kept")
    count = fields.number(_MAX_DROPPED)
    keys, counts = fields.strings(count), fields.unsigned(count)
    if keys != sorted(set(keys)):
        raise IntegrityError(f"{_POLICY}: what was dropped is not sorted, or twice there")
    try:
        return MetadataPolicy(devices, {key.decode(): number for key, number in zip(keys, counts, strict=True)})
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{_POLICY}: what was dropped is not UTF-8") from error
