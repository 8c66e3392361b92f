"""Read any range of any device: from the cache when it is there, else fetched once, verified and kept.

Invariant: no byte that has not been verified against its span's digest reaches a reader or the disk. A reader
gets exactly the bytes it asked for, or an error; errors are not remembered, the next read tries again.

A fetch belongs to the store: a cancelled reader cancels nobody else. All methods are for tasks of the trio
loop that the store was opened in. Hashing, decoding and writing of more than a little is done in threads.

Longer than other modules here: it is the one interface of the store; the work itself is in modules beside it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import trio

from veneer.codec import check_and_decode
from veneer.errors import CacheError, IntegrityError, VeneerError
from veneer.index.model import Device
from veneer.oci.descriptor import Descriptor
from veneer.settings import DEFAULT_MOST_REQUESTS, Settings
from veneer.source.base import BlobSource, WithWindows
from veneer.store.attached import AttachedDevice, Decode, Original
from veneer.store.cache import DeviceCache
from veneer.store.decoder import Decoder
from veneer.store.fetch import FetchQueue, Priority
from veneer.store.incoming import IncomingBlob
from veneer.store.intake import Intake
from veneer.store.jobs import Jobs
from veneer.store.memory import MemoryCache
from veneer.store.owned import BeforePunch
from veneer.store.pin import Freeze
from veneer.store.presence import Form
from veneer.store.proof import prove
from veneer.store.stats import StoreStats
from veneer.store.turns import LinkReport, Queue, Turns
from veneer.store.wanted import Range, bring
from veneer.store.windows import Windows
from veneer.timing import RangeLog

__all__ = ["AttachedDevice", "Form", "OnAccess", "Priority", "SpanStore", "open_store"]

#: Called for every answered read: device key (hex), offset, length, seconds that the reader waited.
OnAccess = Callable[[str, int, int, float], None]

#: Plain bytes kept in memory of what the disk does not hold.
_MEMORY = 64 << 20
#: Longest stretch that one read makes us read ahead.
_MOST_WINDOW = 32 << 20
#: A span can be lost between its arrival and our looking, to whoever may evict; not again and again.
_FILL_TRIES = 2


class SpanStore:
    """The spans of all attached devices. Use :func:`open_store`.

    Args:
        cache: the devices on disk.
        nursery: owns the fetches.
        read_deadline_s: how long one read waits before it fails with Unavailable.
        on_access: told of every answered read, in place of :attr:`log`; must be quick.
        most_requests: how many may run at one registry.
        background_rate: bytes a second that may be fetched for nobody; 0 for any number.
        decoder: a process that takes work off this one's threads; None for none.

    Attributes:
        log: the latest requests, and reads, by device key.
    """

    def __init__(
        self,
        cache: DeviceCache,
        *,
        nursery: trio.Nursery,
        read_deadline_s: float,
        on_access: OnAccess | None = None,
        most_requests: int = DEFAULT_MOST_REQUESTS,
        background_rate: int = 0,
        decoder: Decoder | None = None,
    ) -> None:
        self.stats: StoreStats = cache.stats
        self.log = RangeLog()
        self.on_access: OnAccess = on_access or self.log.read
        self._cache = cache
        self._nursery = nursery
        self._deadline_s = read_deadline_s
        self._memory = MemoryCache(_MEMORY)
        self._jobs = Jobs(self.stats, nursery=nursery, deadline_s=read_deadline_s, decoder=decoder)
        self._attached: dict[bytes, AttachedDevice] = {}
        self._incoming: set[IncomingBlob] = set()
        self._links: dict[str, Turns] = {}
        self._new_turns = partial(Turns, nursery, most=most_requests, background_rate=background_rate)

    def attach(
        self,
        device: Device,
        source: BlobSource,
        *,
        form: Form | None = None,
        decode: Decode = check_and_decode,
        original: Original | None = None,
        of_spans: bool = False,
    ) -> AttachedDevice:
        """Make a device readable. A device that is attached already stays as it is, with its first source.

        Args:
            device: what it is.
            source: where its blob is read; one :class:`~veneer.source.base.WithWindows` if its spans have any.
            form: what the disk holds: plain bytes unless a codec is sealed, whose plain bytes stay in memory.
            decode: verifies and decodes stored bytes; another one than the default brings a key.
            original: for a device that is a copy of parts of others: reads them there. What the source does not
                have, or has wrong, or does not bring in time, is then had from there, as it was verified there.
            of_spans: these are the windows of another device's spans.
        """
        if attached := self._attached.get(device.key.raw):
            return attached
        sealed = any(codec.seal for codec in device.spans.codecs)
        if sealed and form is Form.PLAIN:
            raise ValueError("plain bytes of sealed spans must not reach the disk")
        form = form or (Form.STORED if sealed else Form.PLAIN)
        windows = self._attach_windows(device, source, form)
        file = self._cache.open(device, form)
        attached = AttachedDevice(
            device,
            source,
            form,
            cache=self._cache,
            file=file,
            memory=self._memory,
            decode=decode,
            original=original,
        )
        # Blobs of one registry share its link; what goes before the first slash names it. Requests for spans
        # are not over before their windows are here: those must not wait for a turn behind them.
        turns = self._turns_of(source.name.partition("/")[0] + (" (windows)" if of_spans else ""))
        attached.queue = FetchQueue(
            source,
            device.spans,
            self._nursery,
            turns=turns,
            stats=self.stats,
            deadline_s=self._deadline_s,
            settle=partial(self._jobs.settle, attached),
            adopt=attached.is_missing,
            ranges=self.log.of(device.key.hex),
            replace=None if original is None else partial(self._jobs.replace, attached),
            besides=None if windows is None else windows.want,
        )
        if windows is not None:
            attached.windows, attached.read_window = windows.attached, windows.read
        self._attached[device.key.raw] = attached
        self._jobs.add(attached)
        return attached

    def _turns_of(self, link: str) -> Turns:
        if (turns := self._links.get(link)) is None:
            turns = self._links[link] = self._new_turns()
        return turns

    @contextmanager
    def incoming(self, blob: BlobSource, layer: Descriptor) -> Iterator[IncomingBlob]:
        """A layer that is about to be downloaded whole, as a source that takes turns with all else."""
        ranges = self.log.of(str(layer.digest))
        incoming = IncomingBlob(blob, self._turns_of(blob.name.partition("/")[0]), ranges)
        self._incoming.add(incoming)
        try:
            yield incoming
        finally:
            self._incoming.discard(incoming)
            incoming.turns.forget(incoming)

    def is_at_hand(self, device: Device) -> bool:
        """Whether a device need not be brought: :meth:`DeviceCache.is_at_hand`. Blocks; any thread."""
        return self._cache.is_at_hand(device)

    def intake(self, what: str) -> Intake:
        """Begin to write a device that arrives as a whole: :meth:`DeviceCache.intake`. Blocks; any thread."""
        return self._cache.intake(what)

    def _attach_windows(self, device: Device, source: BlobSource, form: Form) -> Windows | None:
        if device.windows is None:
            return None
        if not isinstance(source, WithWindows) or form is not Form.PLAIN:
            raise ValueError(f"{source.name}: its spans need windows, and are kept decoded")
        attached = self.attach(device.windows, source.windows, form=Form.STORED, of_spans=True)
        return Windows(attached, self._jobs)

    def cached(self, attached: AttachedDevice, offset: int, length: int) -> bytes | None:
        """The bytes if they are here and trusted, else None. Never waits, never fetches."""
        if attached.bulk.watching:
            attached.bulk.note(offset, length)
        data = attached.peek(offset, length)
        if data is not None:
            self._note_hit(attached, offset, length)
        return data

    def _note_hit(self, attached: AttachedDevice, offset: int, length: int) -> None:
        stats = self.stats
        stats.reads += 1
        stats.hits += 1
        stats.bytes_read += length
        self.on_access(attached.device.key.hex, offset, length, 0.0)

    async def read(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        *,
        window: tuple[int, int] | None = None,
        priority: Priority = Priority.DEMAND,
    ) -> bytes:
        """Exactly ``length`` verified bytes from ``offset`` of the device.

        Args:
            attached: which device.
            offset: in the device.
            length: in bytes; the range must lie in the device.
            window: device range (start, end) that is worth fetching too if this read has to fetch.
            priority: whom the read may overtake.

        Raises:
            IntegrityError: the source keeps sending other bytes than the digest promises.
            Unavailable: nothing usable came within the deadline.
            VeneerError: what else the source or the codec reported.
        """
        if (data := self.cached(attached, offset, length)) is not None:
            await trio.lowlevel.checkpoint()
            return data
        stats, started = self.stats, trio.current_time()
        stats.reads += 1
        stats.misses += 1
        try:
            attached.check()
            data = await self._gather(attached, offset, length, window, priority)
        except VeneerError:
            stats.errors += 1
            raise
        stats.bytes_read += length
        self.on_access(attached.device.key.hex, offset, length, trio.current_time() - started)
        return data

    def holds(self, attached: AttachedDevice, offset: int, length: int) -> bool:
        """Whether the range is in the data file, trusted, so that the kernel may read it. Notes the use.

        For a device that this store has pinned, the range then stays there for as long as a read can take.
        """
        if attached.bulk.watching:
            attached.bulk.note(offset, length)
        held = attached.holds(offset, length)
        if held:
            self._note_hit(attached, offset, length)
        return held

    async def fill(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        *,
        window: tuple[int, int] | None = None,
        priority: Priority = Priority.DEMAND,
    ) -> None:
        """Like :meth:`read`, but the bytes end up in the data file, so that the range :meth:`holds`.

        Raises:
            CacheError: the disk did not take the bytes; its ``errno`` is ENOSPC. The next call tries again.
            VeneerError: as for :meth:`read`.
        """
        stats, started = self.stats, trio.current_time()
        stats.reads += 1
        stats.misses += 1
        try:
            attached.check()
            await self._fill(attached, offset, length, window, priority)
        except VeneerError:
            stats.errors += 1
            raise
        stats.bytes_read += length
        self.on_access(attached.device.key.hex, offset, length, trio.current_time() - started)

    async def prove(self, attached: AttachedDevice) -> bool:
        """Whether the disk has all of a device, and it is what its diffID promises. Then it is ``complete``.

        Whoever stops asking for permission because of that has to look at ``attached.complete`` once more
        *afterwards*, and to start again if it is not any more: eviction may have begun meanwhile.

        Raises:
            IntegrityError: every span is what it should be, but the whole is not. All of it is dropped, unless
                it is pinned, and it is not read any more.
            CacheError: what was found cannot be noted on the disk.
        """
        try:
            return await prove(attached, self._cache, self._jobs.threads)
        except IntegrityError as error:
            attached.refuted = error
            for note in list(attached.on_refuted.values()):
                await trio.to_thread.run_sync(note, error)
            raise
        except OSError as error:
            raise CacheError(f"{attached.source.name} cannot be noted as complete: {error.strerror}") from error

    def pin(self, attached: AttachedDevice, before_punch: BeforePunch) -> None:
        """Answer for what the kernel reads of the device's file: nobody else changes it from now on.

        The file has to be marked while it is mounted, even if it is complete: only then can it be marked again.

        Args:
            attached: which device.
            before_punch: is called, maybe from a thread, before anything is punched out of the file. It makes
                sure that the kernel asks before every later read, or raises OSError: nothing is punched then.

        Raises:
            CacheError: the disk does not have the device in plain form, or another process has pinned it.
        """
        file = attached.file
        if attached.data_fd is None or file is None:
            raise CacheError(
                f"{attached.source.name} cannot be mounted: the cache has no file for its plain bytes"
            )
        try:
            self._cache.pin(file, before_punch)
        except OSError as error:
            raise CacheError(f"{attached.source.name} cannot be mounted: {error}") from error

    def unpin(self, attached: AttachedDevice) -> None:
        """The kernel has given up the file: the superblock is gone."""
        if attached.file is not None:
            self._cache.unpin(attached.file)

    def leave(self, attached: AttachedDevice) -> None:
        """Answer no more for what the kernel may go on reading: nobody changes it until somebody pins it."""
        if attached.file is not None:
            attached.file.leave()

    def on_futility(self, help_out: Callable[[], None]) -> None:
        """Have somebody called, in any thread, when the quota cannot be kept because too much is mounted."""
        self._cache.on_futility = help_out

    def freeze(self, attached: AttachedDevice) -> Freeze | None:
        """Keep a complete device as it is, for the kernel to read without us. None: it is not complete.

        Blocks. What comes of it has to be released once the kernel does not read the device any more.

        Raises:
            CacheError: that cannot be noted on the disk.
        """
        if not attached.complete or attached.file is None:
            return None
        try:
            return attached.file.freeze()
        except OSError as error:
            raise CacheError(f"{attached.source.name} cannot be kept as it is: {error.strerror}") from error

    def detach(self, attached: AttachedDevice) -> None:
        """Close a device that nothing uses any more, and forget it, its memory and its queued fetches."""
        if attached.file is not None and attached.file.pinned:
            raise ValueError(f"the device {attached.device.key} is pinned")
        if self._attached.get(attached.device.key.raw) is not attached:
            return
        del self._attached[attached.device.key.raw]
        self._jobs.remove(attached)
        windows = attached.windows
        if windows is not None and all(other.windows is not windows for other in self._attached.values()):
            self.detach(windows)

    def prefetch(
        self,
        attached: AttachedDevice,
        start: int,
        end: int,
        *,
        priority: Priority = Priority.READAHEAD,
    ) -> None:
        """Queue what is missing of the device from ``start`` to ``end`` (clipped), and wait for nothing."""
        start = max(0, start)
        end = min(end, attached.size, start + _MOST_WINDOW)
        if start < end:
            numbers = attached.spans.covering(start, end - start)
            jobs = attached.queue.jobs
            wanted = (n for n in numbers if n not in jobs and not attached.is_ready(n))
            self._jobs.start(attached, wanted, priority)

    async def bring(self, ranges: Iterable[Range], *, priority: Priority) -> None:
        """Fetch what is missing of ranges while this is waited for: :func:`veneer.store.wanted.bring`."""
        await bring(self._jobs, ranges, priority)

    async def fetch_rest(self, attached: AttachedDevice) -> bool:
        """Fetch what is missing of a device in the background, in nobody's way; whether all is there then.

        Nothing is evicted for it, and it ends with the first request that fails.
        """
        if 0 in attached.held():
            await attached.bulk.whole()
        return 0 not in attached.held()

    def links(self) -> dict[str, LinkReport]:
        """What is going on between this store and each registry, by host."""
        queues: dict[Turns, list[Queue]] = {turns: [] for turns in self._links.values()}
        for attached in self._attached.values():
            queues[attached.queue.turns].append(attached.queue)
        for incoming in self._incoming:
            queues[incoming.turns].append(incoming)
        return {host: turns.report(queues[turns]) for host, turns in self._links.items()}

    def close(self) -> None:
        """Close the devices; called when no task uses the store any more."""
        self._jobs.threads.close()
        self._cache.close()

    async def _fill(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        window: tuple[int, int] | None,
        priority: Priority,
    ) -> None:
        for _ in range(_FILL_TRIES):
            jobs = self._jobs.start(attached, attached.missing(offset, length), priority)
            if window is not None:
                self.prefetch(attached, *window, priority=max(priority, Priority.READAHEAD))
            await self._jobs.wait(attached, jobs, offset, length)
            if error := next((job.error for job in jobs if job.error is not None), None):
                raise error
            if attached.holds(offset, length):
                return
        raise self._cache.refused(f"{attached.source.name}: bytes {offset}+{length} of the device")

    async def _gather(
        self,
        attached: AttachedDevice,
        offset: int,
        length: int,
        window: tuple[int, int] | None,
        priority: Priority,
    ) -> bytes:
        end = offset + length
        pieces: dict[int, bytes] = {}
        absent: list[int] = []
        numbers = attached.spans.covering(offset, length)
        for number in numbers:
            if (piece := attached.peek_span(number, offset, end)) is not None:
                pieces[number] = piece
            else:
                absent.append(number)
        jobs = self._jobs.start(attached, absent, priority)
        if window is not None:
            self.prefetch(attached, *window, priority=max(priority, Priority.READAHEAD))
        await self._jobs.wait(attached, jobs, offset, length)
        starts = attached.spans.starts
        for job in jobs:
            if job.plain is None:
                raise job.error or AssertionError("a job ended with neither bytes nor an error")
            start = starts[job.number]
            pieces[job.number] = job.plain[max(0, offset - start) : end - start]
        return b"".join(pieces[number] for number in numbers) if len(numbers) != 1 else pieces[numbers[0]]


class open_store:  # noqa: N801 - reads and is used like a function: async with open_store(...) as store
    """The store of these settings, for the time of an ``async with``.

    An error of the body leaves as it is, not in the exception group that a nursery would make of it. Fetches
    that nobody waits for are dropped at the end.

    Raises:
        CacheError: the cache directory cannot be used at all.
    """

    def __init__(
        self, settings: Settings, *, on_access: OnAccess | None = None, decoder: Decoder | None = None
    ) -> None:
        self._settings = settings
        self._on_access = on_access
        self._decoder = decoder

    async def __aenter__(self) -> SpanStore:
        settings = self._settings
        cache = await trio.to_thread.run_sync(DeviceCache, settings.cache_dir, settings.cache_quota)
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._store = SpanStore(
            cache,
            nursery=self._nursery,
            read_deadline_s=settings.read_deadline_s,
            on_access=self._on_access,
            most_requests=settings.most_requests,
            background_rate=settings.background_rate,
            decoder=self._decoder,
        )
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._nursery.cancel_scope.cancel()
        try:
            # Only a cancellation may be the nursery's own, and must be shown to it.
            grouped = isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None
            if grouped or isinstance(error, trio.Cancelled):
                return bool(await self._manager.__aexit__(kind, error, trace))
            await self._manager.__aexit__(None, None, None)
            return False
        finally:
            self._store.close()
