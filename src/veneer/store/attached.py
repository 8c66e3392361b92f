"""A device in use: where its spans may be found without a fetch, and what is done with fetched ones.

Bytes of a span are, in this order: on disk and trusted; in memory; on disk but to be verified (after a boot) or
decoded (stored form); on disk in an identical span of another device; at the source. All but the first two
are a job's work, so that they too are done once however many readers wait.

The ``*_now`` methods do CPU work and local I/O and touch no state of the store: they may run in any thread.
"""

import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from veneer.codec import check_and_decode
from veneer.errors import IntegrityError, VeneerError
from veneer.index.model import DEFLATE, Codec, Device, Span
from veneer.oci.digest import Digest
from veneer.source.base import BlobSource
from veneer.store.bulk import Bulk
from veneer.store.cache import DeviceCache
from veneer.store.devicefile import DeviceFile, Fill
from veneer.store.fetch import FetchQueue, Priority
from veneer.store.hashing import HashAhead
from veneer.store.memory import MemoryCache
from veneer.store.presence import EMPTY, PRESENT, SUSPECT, Form

__all__ = ["AttachedDevice", "Decode", "Local", "Original", "Outcome", "ReadWindow"]

_log = logging.getLogger(__name__)

#: Verifies and decodes the stored bytes of a span: :func:`veneer.codec.check_and_decode`, or one with a key.
Decode = Callable[[Span, bytes | memoryview, str], bytes]

#: Reads a range (offset, length) of a device from those that it is a copy of; the bytes are verified there.
Original = Callable[[int, int, Priority], Awaitable[bytes]]

#: Gets the number of a span: its window, verified. Raises VeneerError.
ReadWindow = Callable[[int, Priority], Awaitable[bytes]]

#: State of a span -> whether the disk has it.
_HELD = bytes(state == PRESENT for state in range(256))
_RAW = Codec("raw")
_NO_WINDOWS: Mapping[int, bytes] = {}


@dataclass(slots=True)
class Outcome:
    """What became of the bytes of one span: ``plain``, or ``error``; ``kept`` says they are on disk too."""

    number: int
    plain: bytes | None = None
    error: VeneerError | None = None
    kept: bool = False


@dataclass(slots=True)
class Local:
    """What local sources gave: spans by number, and what happened on the way."""

    plain: dict[int, bytes] = field(default_factory=dict)
    unkept: set[int] = field(default_factory=set)
    decoded: int = 0
    copied: int = 0
    reverified: int = 0
    dropped: int = 0


class AttachedDevice:
    """One device, its source and its place in the cache. Made by :meth:`SpanStore.attach`.

    Args:
        device: what it is.
        source: where its blob is read.
        form: what the disk holds.
        cache: where it is kept.
        file: its file there; None when the disk would not have it.
        memory: plain bytes that the disk does not hold.
        decode: verifies and decodes stored bytes.
        original: where the bytes are too, if they are.
    """

    def __init__(
        self,
        device: Device,
        source: BlobSource,
        form: Form,
        *,
        cache: DeviceCache,
        file: DeviceFile | None,
        memory: MemoryCache,
        decode: Decode,
        original: Original | None = None,
    ) -> None:
        self.device = device
        self.source = source
        self.form = form
        self.spans = device.spans
        self.size = device.spans.size
        self.file = file
        self.original = original
        #: The device with the windows of its spans, and what reads them; set by the store if they have any.
        self.windows: AttachedDevice | None = None
        self.read_window: ReadWindow | None = None
        #: The jobs for it, and what makes jobs of the rest; set by the store, which answers them.
        self.queue: FetchQueue
        self.bulk: Bulk
        #: The hash of what has come of it so far, if it is being made.
        self.ahead: HashAhead | None = None
        self.twins: dict[int, list[tuple[AttachedDevice, int]]] = {}
        self._cache = cache
        self._memory = memory
        self._decode = decode
        self._key = device.key.raw
        self._direct = file if form is Form.PLAIN else None
        #: Why it is not what its diffID promises, once that is known: nothing is read of it any more.
        self.refuted: IntegrityError | None = None
        #: By the index that it is of: called in a thread when that is found out.
        self.on_refuted: dict[Digest, Callable[[IntegrityError], None]] = {}
        self._remembers = False
        self.detached = False

    @property
    def data_fd(self) -> int | None:
        """The file with the plain bytes; None if the disk has none. The number stays until :meth:`detach`."""
        return None if self._direct is None else self._direct.fd

    @property
    def cached(self) -> int:
        """Bytes on disk, be they trusted or not."""
        return 0 if self.file is None else self.file.map.present_bytes

    @property
    def all_present(self) -> bool:
        """Whether every byte is on disk, be it trusted or not."""
        return self._direct is not None and self._direct.map.present_bytes == self.size

    @property
    def complete(self) -> bool:
        """Whether every byte is on disk and trusted, and the whole was found to have its diffID."""
        return self._direct is not None and not self._direct.abandoned and self._direct.map.complete

    def holds(self, offset: int, length: int) -> bool:
        """Whether the data file has the range, and may be read without us. Notes the use."""
        return self._direct is not None and self.refuted is None and self._direct.holds(offset, length)

    def missing(self, offset: int, length: int) -> list[int]:
        """The spans of a range that the data file does not have, or that are not trusted."""
        numbers = self.spans.covering(offset, length)
        return [n for n in numbers if self._direct is None or self._direct.states[n] != PRESENT]

    def remembered(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Those of the spans that are in memory."""
        if not self._remembers:
            return {}
        found = ((number, self._memory.get(self._key, number)) for number in numbers)
        return {number: plain for number, plain in found if plain is not None}

    def forget_hash(self) -> None:
        """Hash no more of it ahead."""
        if self.ahead is not None:
            self.ahead.give_up()
            self.ahead = None

    def detach(self) -> DeviceFile | None:
        """Have nothing more to do with the disk. Returns what to close as soon as no thread uses it."""
        self.forget_hash()
        file, self.file, self._direct = self.file, None, None
        self.detached, self._remembers = True, False
        self._memory.forget(self._key)
        if file is not None:
            self._cache.release(file)
        return file

    def check(self) -> None:
        """Raise IntegrityError if it is known not to be what its diffID promises."""
        if self.refuted is not None:
            raise IntegrityError(self.refuted.message)

    def peek(self, offset: int, length: int) -> bytes | None:
        """The bytes, if they can be had at once."""
        if self.refuted is not None:
            return None
        if self._direct is not None and (data := self._direct.read(offset, length)) is not None:
            return data
        if not self._remembers:
            return None
        pieces = []
        for number in self.spans.covering(offset, length):
            if (piece := self.peek_span(number, offset, offset + length)) is None:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    def peek_span(self, number: int, begin: int, end: int) -> bytes | None:
        """What lies in the range ``begin`` to ``end`` of one span, if it can be had at once."""
        start = self.spans.starts[number]
        low, high = max(start, begin), min(self.spans.starts[number + 1], end)
        if self._remembers and (data := self._memory.get(self._key, number)) is not None:
            return data[low - start : high - start]
        return self._direct.read(low, high - low) if self._direct is not None else None

    def remember(self, number: int, plain: bytes) -> None:
        """Keep plain bytes that the disk does not hold."""
        if self.detached:
            return
        self._remembers = True
        self._memory.put(self._key, number, plain)

    def is_local(self, number: int) -> bool:
        """Whether a span that is not trusted on disk may be had without the source."""
        return (
            (self.file is not None and self.file.states[number] != EMPTY)
            or (self._remembers and self._memory.get(self._key, number) is not None)
            or self._twin(number) is not None
        )

    def has_twin(self, numbers: Iterable[int]) -> bool:
        """Whether some of the spans may be copied from another device.

        Its file may be about to be mounted, and reading it then waits for the event loop to say yes.
        """
        return any(self._twin(number) is not None for number in numbers)

    def is_missing(self, number: int) -> bool:
        """Whether only the source can have the span."""
        return not self.is_local(number)

    def is_ready(self, number: int) -> bool:
        """Whether reading the span ahead would be for nothing."""
        if self._direct is not None and self._direct.states[number] == PRESENT:
            return True
        return self._remembers and self._memory.get(self._key, number) is not None

    def held(self) -> bytearray:
        """One byte a span: 0 if the disk is to have it and does not, or not trusted."""
        if self.file is None:
            return bytearray(b"\x01" * len(self.spans))
        return bytearray(bytes(self.file.states).translate(_HELD))

    def is_held(self, number: int) -> bool:
        """The same of one span."""
        return self.file is None or self.file.states[number] == PRESENT

    def has_room(self, length: int) -> bool:
        """Whether so many bytes can be written to disk without evicting others first."""
        return self.file is None or self._cache.has_room(length)

    def decode_now(
        self, spans: Sequence[Span], base: int, data: bytes, windows: Mapping[int, bytes] = _NO_WINDOWS
    ) -> list[Outcome]:
        """Verify, decode and write spans; ``data`` is what the blob has from ``base`` on.

        ``windows`` are those of the spans, by number, if they have any.
        """
        view = memoryview(data)
        outcomes: list[Outcome] = []
        fills: list[Fill] = []
        for span in spans:
            at = span.stored_offset - base
            stored = view[at : at + span.stored_length]
            try:
                if span.codec.name == DEFLATE:
                    window = windows.get(span.number, b"")
                    plain = check_and_decode(span, stored, self._what(span), window)
                else:
                    plain = self._decode(span, stored, self._what(span))
            except VeneerError as error:
                outcomes.append(Outcome(span.number, error=error))
                continue
            outcomes.append(Outcome(span.number, plain))
            if self.form is Form.STORED:
                fills.append(Fill(span.number, stored, span.digest))
            else:
                digest = span.digest if span.codec == _RAW else hashlib.sha256(plain).digest()
                fills.append(Fill(span.number, plain, digest))
        file = self.file
        if fills and file is not None and self._cache.put(file, fills):
            for outcome in outcomes:
                outcome.kept = outcome.plain is not None and self.form is Form.PLAIN
        return outcomes

    @property
    def entrustable(self) -> DeviceFile | None:
        """The data file, if others may verify, decode and write spans: that takes neither key nor window."""
        return self._direct if self._decode is check_and_decode and self.windows is None else None

    def entrust(self, length: int) -> int | None:
        """:meth:`DeviceCache.entrust`."""
        return None if self._direct is None else self._cache.entrust(self._direct, length)

    def take_over(self, file: DeviceFile, length: int, generation: int, digests: Mapping[int, bytes]) -> bool:
        """:meth:`DeviceCache.take_over`; the device may have been detached meanwhile."""
        return self._cache.take_over(file, length, generation, digests)

    def find_now(self, numbers: Iterable[int], remembered: Mapping[int, bytes]) -> Local:
        """Look for spans on the disk, and put those there that were remembered only.

        Those not in the answer have to be fetched.
        """
        local = Local()
        for number in numbers:
            plain = self._from_disk(number, local)
            if plain is None and (plain := remembered.get(number)) is not None:
                self._keep(number, plain, hashlib.sha256(plain).digest(), local)
            if plain is None:
                plain = self._from_twin(number, local)
            if plain is not None:
                local.plain[number] = plain
        return local

    def _from_disk(self, number: int, local: Local) -> bytes | None:
        file = self.file
        if file is None or file.states[number] == EMPTY:
            return None
        if file.states[number] == SUSPECT:
            try:
                verified = self._cache.verify(file, [number])
            except OSError:
                # It stays suspect: never used, and overwritten by the fetch.
                return None
            local.reverified += verified.right
            if verified.dropped:
                local.dropped += 1
                _log.warning("%s was damaged on disk since the last boot", self._what(self.spans[number]))
        data = file.read_span(number)
        if data is None or self.form is Form.PLAIN:
            return data
        span = self.spans[number]
        local.unkept.add(number)
        try:
            plain = self._decode(span, data, self._what(span))
        except IntegrityError as error:
            local.dropped += 1
            _log.warning("damaged on disk: %s", error)
            with suppress(OSError):
                self._cache.evict(file, [number])
            return None
        local.decoded += 1
        return plain

    def _from_twin(self, number: int, local: Local) -> bytes | None:
        if self.form is Form.STORED or (twin := self._twin(number)) is None:
            return None
        other, there = twin
        # It may be detached any moment; its file is not closed before this thread is done.
        file = other.file
        if file is None or (data := file.read_span(there)) is None:
            return None
        # The other file may have been altered: what is copied is held to the record it was verified by.
        digest = hashlib.sha256(data).digest()
        if digest != file.map.digest(there):
            return None
        local.copied += 1
        self._keep(number, data, digest, local)
        return data

    def _keep(self, number: int, plain: bytes, digest: bytes, local: Local) -> None:
        file = self.file if self.form is Form.PLAIN else None
        if file is None or not self._cache.put(file, [Fill(number, plain, digest)]):
            local.unkept.add(number)

    def _twin(self, number: int) -> "tuple[AttachedDevice, int] | None":
        for other, there in self.twins.get(number, ()):
            file = other.file
            if (
                (other is not self or there != number)
                and other.form is self.form is Form.PLAIN
                and file is not None
                and file.states[there] == PRESENT
                # Reading it would wait for whoever has it mounted: after a restart, for ourselves.
                and not file.pinned_elsewhere
            ):
                return other, there
        return None

    def _what(self, span: Span) -> str:
        return f"span {span.number} (bytes {span.stored_offset}+{span.stored_length}) of {self.source.name}"
