"""The spans section of the index format: where one layer is stored and how its blob is cut.

The section names the blob and the diffID, so its SHA-256 stands for the device and everything that can be
read from it (:attr:`Device.key`). The layout is specified in docs/reference/index-format.md, "Spans section".
"""

from array import array
from itertools import accumulate
from operator import add, sub
from typing import Final

from veneer.errors import IntegrityError, UnsupportedFormat, UsageError
from veneer.index.model import DEFLATE, WINDOW_SIZE, Codec, Device, SpanTable
from veneer.index.wire_columns import Fields, pack, unsigned_column
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["MAX_DEVICE_SIZE", "MAX_SPAN_LENGTH", "decode_spans", "encode_spans"]

#: A span is fetched, held and decoded whole: this bounds what one read may cost in memory, stored and plain.
MAX_SPAN_LENGTH: Final = 256 << 20
#: Larger devices are refused: offsets, and sums of offsets and lengths, must fit 63 bits everywhere.
MAX_DEVICE_SIZE: Final = 1 << 50

_FIELDS: Final = 12
_DIGEST_SIZE: Final = 32
#: The codecs that version 1 of the format defines. Others come with a required feature bit.
_CODECS: Final = frozenset({"raw", "zstd", "zstd-frames", "gzip", DEFLATE})
#: The least carry that holds a bit: one bit below the mark.
_LEAST_CARRY: Final = 2


def encode_spans(
    device_blob: Descriptor, diff_id: Digest, spans: SpanTable, windows: Device | None = None
) -> bytes:
    """The plain section of one device; its SHA-256 is the device's key.

    ``windows`` is the device with the windows of spans that have some, and None for others. Raises
    IntegrityError when the table does not describe a device, UnsupportedFormat when it names a codec or seal
    that the format does not define.
    """
    ends = map(add, spans.stored_offsets, spans.stored_lengths)
    data = pack(
        [
            device_blob.media_type,
            str(device_blob.digest),
            device_blob.size,
            str(diff_id),
            len(spans),
            _column(map(sub, spans.starts[1:], spans.starts)),
            _column(map(sub, spans.stored_offsets, (0, *ends))),
            _column(spans.stored_lengths),
            spans.digests,
            [[codec.name, codec.seal, codec.parameters] for codec in spans.codecs],
            spans.codec_of,
            spans.carries,
        ]
    )
    # The decoder is the one place that knows what is allowed, so what it would refuse is never written.
    written = decode_spans(data, windows).spans
    if any(getattr(written, name) != getattr(spans, name) for name in SpanTable.__slots__):
        raise IntegrityError("span table: its columns contradict each other")
    return data


def _column(values: "map[int] | array[int]") -> bytes:
    try:
        return unsigned_column(values)
    except (OverflowError, ValueError) as error:
        raise IntegrityError("span table: offsets are not ascending, or spans overlap") from error


def decode_spans(data: bytes, windows: Device | None = None) -> Device:
    """The device that a plain section describes; ``windows`` is the one with its windows, if it has some.

    Raises IntegrityError for anything that :func:`encode_spans` would not have written, UnsupportedFormat for
    codecs and seals that nothing here can decode.
    """
    what = "spans section"
    fields = Fields(data, _FIELDS, what)
    media_type, digest, size = fields.text(), fields.text(), fields.number(MAX_DEVICE_SIZE)
    blob = Descriptor.from_json({"mediaType": media_type, "digest": digest, "size": size}, f"blob of {what}")
    try:
        diff_id = Digest.parse(fields.text())
    except UsageError as error:
        raise IntegrityError(f"diffID of {what}: {error.message}") from error

    # The digests are the only column that cannot be left out, so they prove the count before it is used.
    count = fields.number(len(data) // _DIGEST_SIZE)
    lengths, gaps, stored_lengths = fields.unsigned(count), fields.unsigned(count), fields.unsigned(count)
    digests = fields.blob()
    if len(digests) != _DIGEST_SIZE * count:
        raise IntegrityError(f"{what}: {len(digests)} bytes of digests for {count} spans")
    for column in (lengths, stored_lengths):
        if count and not 1 <= min(column) <= max(column) <= MAX_SPAN_LENGTH:
            raise IntegrityError(f"{what}: a span is empty or longer than {MAX_SPAN_LENGTH} bytes")
    starts = list(accumulate(lengths, initial=0))
    ends = list(accumulate(map(add, gaps, stored_lengths)))
    if starts[-1] > MAX_DEVICE_SIZE or (ends and ends[-1] > blob.size):
        raise IntegrityError(f"{what}: spans reach beyond their blob of {blob.size} bytes, or are too many")
    codecs, codec_of = _codecs(fields, count)
    table = SpanTable(
        starts=array("q", starts),
        stored_offsets=array("q", map(sub, ends, stored_lengths)),
        stored_lengths=stored_lengths,
        digests=digests,
        codecs=codecs,
        codec_of=codec_of,
        carries=_carries(fields, count, codecs),
    )
    _check_windows(codecs, count, windows, what)
    return Device(blob, diff_id, table, Digest.of(data), windows)


def _carries(fields: Fields, count: int, codecs: tuple[Codec, ...]) -> bytes:
    carries = fields.blob()
    if carries and (
        len(carries) != count
        or not any(carries)
        or carries.count(_LEAST_CARRY - 1)
        or any(codec.name != DEFLATE for codec in codecs)
    ):
        raise IntegrityError(f"{fields.what}: the bits before its spans make no sense")
    return carries


def _check_windows(codecs: tuple[Codec, ...], count: int, windows: Device | None, what: str) -> None:
    """Raise unless exactly the spans that need windows have them: all spans of a device, or none."""
    needed = [codec.parameters for codec in codecs if codec.name == DEFLATE]
    if windows is None:
        if needed:
            raise IntegrityError(f"{what}: its spans have no windows")
    elif (
        windows.windows is not None
        or needed != [windows.key.raw]
        or len(codecs) != 1
        or windows.spans.size != WINDOW_SIZE * count
    ):
        raise IntegrityError(f"{what}: the windows are not those of its spans")


def _codecs(fields: Fields, count: int) -> tuple[tuple[Codec, ...], bytes]:
    """The table of codecs, in order of first use, and each span's index into it."""
    codecs = tuple(_codec(item, fields.what) for item in fields.items())
    codec_of = fields.blob()
    used = list(dict.fromkeys(codec_of)) if codec_of else [0] * min(count, 1)
    if used != list(range(len(codecs))) or len(set(codecs)) != len(codecs):
        raise IntegrityError(f"{fields.what}: codecs are not in order of first use")
    if len(codec_of) != (count if len(codecs) > 1 else 0):
        raise IntegrityError(f"{fields.what}: {len(codec_of)} codec numbers for {count} spans")
    return codecs, codec_of


def _codec(item: object, what: str) -> Codec:
    match item:
        case [str(name), str(seal), bytes(parameters)]:
            pass
        case _:
            raise IntegrityError(f"{what}: a codec is not a name, a seal and its parameters")
    if seal:
        raise UnsupportedFormat(f"{what}: sealed with {seal[:64]!r}, which this version cannot open")
    if name not in _CODECS or (parameters and name != DEFLATE):
        raise UnsupportedFormat(f"{what}: unknown codec {name[:64]!r}, or unknown parameters of it")
    return Codec(name, parameters=parameters)
