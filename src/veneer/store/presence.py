"""The presence map: which spans of one device are on disk, and what their bytes must hash to.

A map is one small file beside the data file it speaks of. It is *read* through a shared mapping, so that
every process sees at once what another one stored or evicted, and *written* with pwrite(2): a full disk or a
read-only file system is then an :class:`OSError`, not a SIGBUS.

    header   512 bytes: what the map belongs to; generation; bytes present; when it was proven complete
    layout   16 bytes a span: offset and length in the data file (never changes, its SHA-256 is in the header)
    uses      8 bytes a span: last use, nanoseconds since the epoch
    records  40 bytes a span: SHA-256 of the bytes in the data file as they were verified, state, CRC-32

Everything is in the machine's byte order: a cache does not travel. The CRC covers span number, digest and
state, so that a torn or scribbled record is noticed when the map is opened, before it can vouch for anything.

The generation makes lock-free readers safe. Whoever takes spans away clears the records, increments it, and
only then punches the data. A reader that sees the same generation before it looked at the state and after it
read the data has read bytes that were there all the time: had the punch happened in between, it would have
seen the increment or, if that came before it began, a cleared record.

A device that is complete and was hashed as a whole is noted as such: with the generation of that moment, plus
one. So the note is worth nothing as soon as any span was taken away since, whoever did it, and a map from
before there were such notes has zeros there, which no generation matches.

Not here: the data file (:mod:`veneer.store.devicefile`), and any decision what to keep.
"""

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cache
from itertools import compress, pairwise
from pathlib import Path
from typing import Self

from veneer.index.model import Device

__all__ = [
    "EMPTY",
    "MAGIC",
    "PRESENT",
    "SUSPECT",
    "Form",
    "Layout",
    "MapMismatch",
    "PresenceMap",
    "boot_id",
    "present_bytes",
]

#: What a map begins with.
MAGIC = b"VENEERPM"
_VERSION = 1
#: magic, version, form, device key, SHA-256 of the layout, spans, data file's st_dev, st_ino and size, blob.
_IDENTITY = struct.Struct("=8sII32s32sQQQQ144s")
_BOOT = 320
_GENERATION = 336
_PRESENT_BYTES = 344
_COMPLETE = 352
_HEADER_SIZE = 512
_RECORD_BODY = struct.Struct("=32sB3x")
_RECORD_CRC = struct.Struct("=I")
_RECORD_SIZE = _RECORD_BODY.size + _RECORD_CRC.size
_STATE_IN_RECORD = 32
_LAYOUT_ROW = 16
_USE_ROW = 8
_ROW = _LAYOUT_ROW + _USE_ROW + _RECORD_SIZE
#: More spans than any index may name; bounds what a damaged header can make us map.
_MAX_SPANS = 1 << 26

# States of a span. A fresh map is zeros, so EMPTY must be 0.
EMPTY = 0
PRESENT = 1
#: On disk, but from before the machine's last boot: to be verified before first use.
SUSPECT = 2


class Form(StrEnum):
    """What the data file of a device holds."""

    #: Plain bytes at their device offsets.
    PLAIN = "plain"
    #: Stored (compressed, sealed) bytes at their blob offsets; plain bytes stay in memory.
    STORED = "stored"


class _FormNumber(IntEnum):
    PLAIN = 1
    STORED = 2


class MapMismatch(Exception):
    """The map is damaged or belongs to something else; it must be discarded with its data."""


@cache
def boot_id() -> bytes:
    """16 bytes that change whenever the machine boots."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", ""))


@dataclass(frozen=True, slots=True)
class Layout:
    """What a device's data file looks like: everything about a map that must match.

    Args:
        key: the device's key, 32 bytes.
        blob: digest of the blob, for people.
        form: what the data file holds.
        size: size of the data file.
        rows: offset and length of each span in the data file, interleaved.
    """

    key: bytes
    blob: str
    form: Form
    size: int
    rows: "array[int]"

    @classmethod
    def of(cls, device: Device, form: Form) -> Self:
        """The layout of ``device`` in the given form."""
        spans = device.spans
        rows = array("Q", bytes(_LAYOUT_ROW * len(spans)))
        if form is Form.PLAIN:
            size = spans.size
            starts = array("Q", spans.starts)
            rows[0::2] = starts[:-1]
            rows[1::2] = array("Q", [end - start for start, end in pairwise(starts)])
        else:
            size = device.blob.size
            rows[0::2] = array("Q", spans.stored_offsets)
            rows[1::2] = array("Q", spans.stored_lengths)
        return cls(device.key.raw, str(device.blob.digest), form, size, rows)


def _record(number: int, digest: bytes, state: int) -> bytes:
    body = _RECORD_BODY.pack(digest, state)
    return body + _RECORD_CRC.pack(zlib.crc32(body, number))


def present_bytes(path: Path) -> int:
    """Bytes on disk by the header of the map at ``path``. Raises OSError or MapMismatch."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.pread(fd, _HEADER_SIZE, 0)
    finally:
        os.close(fd)
    if len(header) != _HEADER_SIZE or not header.startswith(MAGIC):
        raise MapMismatch("the map has no header")
    total: int = struct.unpack_from("=Q", header, _PRESENT_BYTES)[0]
    return total


class PresenceMap:
    """An open map. Reading needs no lock; every changing method must be called inside :meth:`locked`.

    One object may be used by several threads. ``states`` and ``generation`` are live views of the shared
    mapping; ``offsets`` and ``lengths`` never change.
    """

    def __init__(self, fd: int) -> None:
        """Take over ``fd`` (open for reading and writing); raises MapMismatch, leaving ``fd`` open."""
        size = os.fstat(fd).st_size
        count, odd = divmod(size - _HEADER_SIZE, _ROW)
        if size < _HEADER_SIZE or odd or count > _MAX_SPANS:
            raise MapMismatch(f"the map has an impossible size of {size} bytes")
        identity = _IDENTITY.unpack(os.pread(fd, _IDENTITY.size, 0))
        try:
            self.form = Form[_FormNumber(identity[2]).name]
        except ValueError:
            raise MapMismatch("the map's form is unknown") from None
        self._magic = identity[:2]
        self.key: bytes = identity[3]
        self._layout_digest: bytes = identity[4]
        self._count: int = identity[5]
        self._data: tuple[int, int, int] = identity[6:9]
        self.blob = identity[9].rstrip(b"\0").decode("ascii", "replace")
        self.fd = fd
        self.count = count
        self._mutex = threading.Lock()
        self._uses_at = _HEADER_SIZE + _LAYOUT_ROW * count
        self._records_at = self._uses_at + _USE_ROW * count
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        self._view = memoryview(self._map)
        self._header = self._view[:_HEADER_SIZE].cast("Q")
        self.generation = self._header[_GENERATION // 8 : _GENERATION // 8 + 1]
        layout = self._view[_HEADER_SIZE : self._uses_at].cast("Q")
        self.offsets, self.lengths = layout[0::2], layout[1::2]
        self.uses = self._view[self._uses_at : self._records_at].cast("Q")
        self.states = (
            self._view[self._records_at + _STATE_IN_RECORD :: _RECORD_SIZE] if count else self._view[:0]
        )

    @staticmethod
    def write_new(fd: int, layout: Layout, data: os.stat_result) -> None:
        """Make the empty file ``fd`` a map without any span present. Its space is allocated at once."""
        count = len(layout.rows) // 2
        header = bytearray(_HEADER_SIZE)
        rows = layout.rows.tobytes()
        form = _FormNumber[layout.form.name]
        identity = (layout.key, hashlib.sha256(rows).digest(), count, data.st_dev, data.st_ino, layout.size)
        _IDENTITY.pack_into(header, 0, MAGIC, _VERSION, form, *identity, layout.blob.encode("ascii"))
        header[_BOOT : _BOOT + 16] = boot_id()
        os.posix_fallocate(fd, 0, _HEADER_SIZE + _ROW * count)
        _pwrite_all(fd, bytes(header) + rows, 0)

    def check(self, data: os.stat_result, layout: Layout | None = None) -> None:
        """Raise MapMismatch unless the map is whole and speaks of this data file (and this layout)."""
        rows = bytes(self._view[_HEADER_SIZE : self._uses_at])
        if self._magic != (MAGIC, _VERSION) or self._count != self.count:
            raise MapMismatch("the map's header is damaged, or from another version")
        if layout is not None:
            if (self.key, self.form) != (layout.key, layout.form):
                raise MapMismatch("the map belongs to another device")
            if self._data[2] != layout.size or rows != layout.rows.tobytes():
                raise MapMismatch("the map's layout is another")
        elif hashlib.sha256(rows).digest() != self._layout_digest:
            raise MapMismatch("the map's layout is damaged")
        dev, ino, size = self._data
        # Device numbers are compared within one boot only: those of btrfs and overlayfs change at every boot,
        # and after a boot every span is verified again anyhow.
        if (ino, size) != (data.st_ino, data.st_size) or (dev != data.st_dev and not self.stale):
            raise MapMismatch("the map speaks of another data file")
        states = self.states.tobytes()
        if states.count(EMPTY) + states.count(PRESENT) + states.count(SUSPECT) != self.count:
            raise MapMismatch("the map holds impossible states")
        records = bytes(self._view[self._records_at :])
        for number in compress(range(self.count), states):
            at = number * _RECORD_SIZE
            body, end = (
                records[at : at + _RECORD_BODY.size],
                records[at + _RECORD_BODY.size : at + _RECORD_SIZE],
            )
            if _RECORD_CRC.pack(zlib.crc32(body, number)) != end:
                raise MapMismatch(f"the map's record of span {number} is damaged")

    @property
    def stale(self) -> bool:
        """Whether the machine has booted since the map was last opened."""
        return bytes(self._view[_BOOT : _BOOT + 16]) != boot_id()

    @property
    def present_bytes(self) -> int:
        """Bytes of all spans that are on disk, suspects included."""
        return self._header[_PRESENT_BYTES // 8]

    @property
    def complete(self) -> bool:
        """Whether all of the device is on disk, trusted, and was found to have its diffID."""
        return self._header[_COMPLETE // 8] == self.generation[0] + 1

    def digest(self, number: int) -> bytes:
        """What the bytes of a span on disk must hash to."""
        at = self._records_at + number * _RECORD_SIZE
        return bytes(self._view[at : at + 32])

    @property
    def present_spans(self) -> int:
        """How many spans are present or suspect."""
        return self.count - self.states.tobytes().count(EMPTY)

    def on_disk(self) -> list[int]:
        """Numbers of the spans that are present or suspect."""
        return list(compress(range(self.count), self.states.tobytes()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other thread and process from changing the map. For local I/O only: never await inside."""
        with self._mutex:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def begin_boot(self) -> None:
        """Bring a checked map up to date: after a boot present spans become suspect; recount the bytes."""
        if self.stale:
            for number in self.on_disk():
                self._write_records(number, [self.digest(number)], SUSPECT)
            # Last: a map whose header names this boot has no span left that is trusted from before it.
            _pwrite_all(self.fd, boot_id(), _BOOT)
        if bytes(self.states).count(PRESENT) != self.count:
            self.clear_complete()
        total = sum(compress(self.lengths, self.states.tobytes()))
        if total != self.present_bytes:
            self._set_present_bytes(total)

    def mark(self, first: int, digests: Sequence[bytes], now_ns: int) -> int:
        """Make spans from ``first`` on present, whose bytes are written already. Returns the bytes gained."""
        gained = sum(
            self.lengths[number]
            for number in range(first, first + len(digests))
            if self.states[number] == EMPTY
        )
        uses = array("Q", [now_ns]) * len(digests)
        _pwrite_all(self.fd, uses.tobytes(), self._uses_at + first * _USE_ROW)
        # Counted before they are marked: dying in between overstates the usage, which is mended when reopened.
        self._set_present_bytes(self.present_bytes + gained)
        self._write_records(first, digests, PRESENT)
        return gained

    def clear(self, numbers: Iterable[int]) -> int:
        """Take spans away; their data may be punched once this returns. Returns the bytes lost."""
        lost = 0
        # First: dying before the next generation must not leave a note that the device is complete.
        self.clear_complete()
        for number in numbers:
            if self.states[number] != EMPTY:
                lost += self.lengths[number]
                _pwrite_all(self.fd, bytes(_RECORD_SIZE), self._records_at + number * _RECORD_SIZE)
        self.bump()
        self._set_present_bytes(max(0, self.present_bytes - lost))
        return lost

    def bump(self) -> None:
        """Begin another generation."""
        _pwrite_all(self.fd, struct.pack("=Q", self.generation[0] + 1), _GENERATION)

    def mark_complete(self) -> None:
        """Note that all of the device was found to be whole, in this generation."""
        _pwrite_all(self.fd, struct.pack("=Q", self.generation[0] + 1), _COMPLETE)

    def clear_complete(self) -> None:
        """Take that note back."""
        if self._header[_COMPLETE // 8]:
            _pwrite_all(self.fd, bytes(8), _COMPLETE)

    def write_uses(self, touched: "array[int]") -> None:
        """Merge last uses (0 = not used) into the map."""
        merged = array("Q", self.uses.tobytes())
        for number in compress(range(self.count), touched):
            merged[number] = max(merged[number], touched[number])
        _pwrite_all(self.fd, merged.tobytes(), self._uses_at)

    def release(self) -> None:
        """Give up the mapping; the file stays open."""
        for view in (self.generation, self.offsets, self.lengths, self.uses, self.states, self._header):
            view.release()
        self._view.release()
        self._map.close()

    def close(self) -> None:
        """Give up the mapping and the file."""
        self.release()
        os.close(self.fd)

    def _write_records(self, first: int, digests: Sequence[bytes], state: int) -> None:
        packed = b"".join(_record(first + i, digest, state) for i, digest in enumerate(digests))
        _pwrite_all(self.fd, packed, self._records_at + first * _RECORD_SIZE)

    def _set_present_bytes(self, total: int) -> None:
        _pwrite_all(self.fd, struct.pack("=Q", total), _PRESENT_BYTES)


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
