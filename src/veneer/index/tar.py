"""Push parser of tar streams: what a layer contains and where the data are, without touching the data.

Reads ustar, V7, GNU (long names, base-256 numbers, old sparse files) and PAX (extended and global headers,
extended attributes, all sparse formats). Bytes come in any pieces; only headers are ever kept, at most
:data:`MAX_EXTENDED_HEADER` bytes of one, and file data are skipped by counting.

Where tars are ambiguous, this reads what the reader of containerd (Go's archive/tar) reads:

- links, directories and special files have no data, whatever size their header states;
- a regular file of the old type NUL whose name ends in a slash is a directory;
- a tar ends with two zero blocks, or where the stream ends between two entries. Whatever follows the two zero
  blocks is counted and ignored; one zero block that is not the end is an error;
- unknown types are refused, for nobody knows whether they change what is unpacked. Type 7 is a regular file.

Two things differ: global headers apply, as POSIX and GNU tar say (Go ignores them), and what no tar writer
makes but readers take differently (two extended headers of one kind, a name said in two ways) is refused.

It does not judge paths: that is the business of :mod:`veneer.index.build`.
"""

from collections.abc import Callable
from typing import Final

from veneer.errors import IntegrityError
from veneer.index.tar_entry import MAX_PATH, MAX_SIZE, Extensions, TarEntry, display, read_entry
from veneer.index.tar_header import BLOCK, HEADER, ZERO_BLOCK, MalformedTar, c_string, check_checksum, number
from veneer.index.tar_pax import PaxRecords, global_records, parse_records
from veneer.index.tar_sparse import (
    MAX_SEGMENTS,
    SparseMapReader,
    checked_segments,
    map_in_data,
    old_real_size,
    old_segments,
    real_size,
    recorded_segments,
)

__all__ = ["MAX_ENTRIES", "MAX_EXTENDED_HEADER", "MAX_PATH", "TarEntry", "TarParser", "display"]

#: As many names as a layer may have: the index of a larger one would not fit in memory anyway.
MAX_ENTRIES: Final = 4_000_000
#: Of one extended header or GNU long name. Go's reader has the same limit.
MAX_EXTENDED_HEADER: Final = 1 << 20


class TarParser:
    """Feed it the stream, take the entries. One stream, one caller; after an error it must not be used.

    An entry is returned as soon as its headers and sparse map are complete, before its data. Every fault is an
    IntegrityError that names the entry and its offset.

    Attributes:
        position: bytes of the stream fed so far.
    """

    def __init__(self) -> None:
        self.position = 0
        self._offset = 0  # of the first byte that has not been handled or skipped
        self._pending = bytearray()  # the beginning of a unit: a header block, an extended header
        self._needed = BLOCK  # length of the unit
        self._skip = 0  # bytes of data and padding before the next unit
        self._data_end = 0  # stream offset where the data of the last entry are complete
        self._handle: Callable[[bytes], None] = self._on_header
        self._entries: list[TarEntry] = []
        self._count = 0
        self._zero_block = False
        self._ended = False
        self._extensions = Extensions()
        self._body_kind = b""
        self._body_size = 0
        self._globals: dict[bytes, bytes] = {}
        self._shown = b""  # name of the header in hand, for messages
        # A sparse file whose map is not complete.
        self._sparse: TarEntry | None = None
        self._pairs: list[tuple[int, int]] = []
        self._map = SparseMapReader()

    def feed(self, data: bytes | memoryview) -> list[TarEntry]:
        """Take the next bytes of the stream; the entries whose headers they completed."""
        entries: list[TarEntry] = []
        self._entries = entries
        at, end = 0, len(data)
        self.position += end
        pending = self._pending
        while not self._ended:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                self._offset += step
                at += step
                if self._skip:
                    return entries
            if pending or end - at < self._needed:
                taken = data[at : at + self._needed - len(pending)]
                pending += taken
                at += len(taken)
                if len(pending) < self._needed:
                    return entries
                unit = bytes(pending)
                pending.clear()
            else:
                unit = bytes(data[at : at + self._needed])
                at += self._needed
            try:
                self._handle(unit)
            except MalformedTar as error:
                raise IntegrityError(f"{self._where()}: {error}") from error
            self._offset += len(unit)
        return entries

    def finish(self) -> list[TarEntry]:
        """The stream has ended; raises IntegrityError when the tar has not."""
        inside = bool(self._pending) or self._handle != self._on_header or self._extensions.start >= 0
        if not self._ended and (inside or self.position < self._data_end):
            raise IntegrityError(f"{self._where()}: truncated, the stream has only {self.position} bytes")
        return []

    def _where(self) -> str:
        start = self._offset if self._extensions.start < 0 else self._extensions.start
        return f"tar entry {display(self._shown)}, header at offset {start}"

    def _on_header(self, block: bytes) -> None:
        if self._zero_block or block == ZERO_BLOCK:
            self._on_zero_block(block)
            return
        fields = HEADER.unpack(block)
        extensions = self._extensions
        self._shown = c_string(fields[0]) if extensions.name is None else extensions.name
        check_checksum(block, fields[6])
        kind = fields[7]
        if kind in b"xgLK":
            self._on_extension(kind, number(fields[4]))
            return
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise MalformedTar(f"more than {MAX_ENTRIES} entries")
        entry = read_entry(block, fields, self._offset, extensions, self._globals)
        self._shown = entry.path
        if kind == b"S":
            self._sparse, self._pairs = entry, []
            entry.size = old_real_size(block)
            self._on_old_map(block, first=True)
        elif extensions.records is not None and extensions.records.sparse and entry.kind == "file":
            self._on_sparse_records(entry, extensions.records)
        else:
            self._emit(entry)

    def _on_zero_block(self, block: bytes) -> None:
        if self._extensions.start >= 0:
            raise MalformedTar("an extended header is not followed by an entry")
        if block != ZERO_BLOCK:
            raise MalformedTar("a block of zeros inside the tar")
        self._ended = self._zero_block
        self._zero_block = True

    def _on_extension(self, kind: bytes, size: int) -> None:
        """A header whose body says something about the entries that follow."""
        if not 0 <= size <= MAX_EXTENDED_HEADER:
            raise MalformedTar(f"an extended header of {size} bytes")
        extensions = self._extensions
        if kind == b"g":
            if extensions.start >= 0:
                raise MalformedTar("a global header between an extended header and its entry")
        else:
            if extensions.start < 0:
                extensions.start = self._offset
            known = {b"x": extensions.records, b"L": extensions.name, b"K": extensions.link}[kind]
            if known is not None:
                raise MalformedTar("two extended headers of one kind for one entry")
        self._body_kind, self._body_size = kind, size
        self._needed, self._handle = -(-size // BLOCK) * BLOCK, self._on_body
        if not size:
            self._on_body(b"")

    def _on_body(self, padded: bytes) -> None:
        kind, body = self._body_kind, padded[: self._body_size]
        self._needed, self._handle = BLOCK, self._on_header
        if kind == b"x":
            self._extensions.records = parse_records(body)
        elif kind == b"g":
            self._globals.update(global_records(parse_records(body)))
        elif kind == b"L":
            self._extensions.name = c_string(body)
        else:
            self._extensions.link = c_string(body)

    def _on_sparse_records(self, entry: TarEntry, records: PaxRecords) -> None:
        entry.size = real_size(records)
        if map_in_data(records):
            self._sparse, self._map = entry, SparseMapReader()
            self._handle = self._on_map_block
        else:
            self._emit_sparse(entry, recorded_segments(records))

    def _on_map_block(self, block: bytes) -> None:
        """A block of the map that comes before the data in format 1.0."""
        entry = self._sparse
        assert entry is not None  # set together with this handler
        if entry.stored_size < BLOCK:
            raise MalformedTar("the sparse map is longer than the stored data")
        entry.stored_size -= BLOCK
        entry.data += BLOCK
        if self._map.feed(block):
            self._emit_sparse(entry, self._map.pairs)

    def _on_old_map(self, block: bytes, *, first: bool = False) -> None:
        """A header of the old format: the entry's own, or one that continues the map."""
        entry = self._sparse
        assert entry is not None  # set together with this handler
        pairs, more = old_segments(block, first=first)
        self._pairs += pairs
        if len(self._pairs) > MAX_SEGMENTS:
            raise MalformedTar(f"more than {MAX_SEGMENTS} sparse segments")
        if not first:
            entry.data += BLOCK
        if more:
            self._handle = self._on_old_map
        else:
            self._emit_sparse(entry, self._pairs)

    def _emit_sparse(self, entry: TarEntry, pairs: list[tuple[int, int]]) -> None:
        if not 0 <= entry.size <= MAX_SIZE:
            raise MalformedTar(f"the size {entry.size} is impossible")
        entry.segments = checked_segments(pairs, entry.size, entry.stored_size)
        self._sparse, self._pairs, self._map = None, [], SparseMapReader()
        self._handle = self._on_header
        self._emit(entry)

    def _emit(self, entry: TarEntry) -> None:
        self._entries.append(entry)
        self._skip = -(-entry.stored_size // BLOCK) * BLOCK
        self._data_end = entry.data + entry.stored_size
        if self._extensions.start >= 0:
            self._extensions = Extensions()
