"""Devices in sparse files that the kernel reads by itself: bytes are there before it is let through to them.

The kernel mounts EROFS over the data files of the device cache. Each of them is marked in a fanotify group, so
that it asks before every read of one; a read is let through once the store says that all its spans are in the
file, and fails with an error otherwise. A device whose bytes are all there and proven needs no questions: its
mark goes, and from then on no process of ours is in the path of its reads.

Invariants:

- **No hole is ever read.** A file is marked before anybody mounts it, which :meth:`GuardedDevices.hold` waits
  for: a file that is open without a mark never asks, whatever is marked later. So even a complete device is
  marked while it is being mounted, and unmarked (:meth:`GuardedDevices.opened`) after that: it must ask again
  once some of it has been evicted. The store marks it, by a callback, before it punches anything.
- **Every event is answered exactly once**, then its descriptor is closed; what ends the serving answers EIO.
- What may be a device of a mount that nobody serves, one that an earlier process made, stays marked though
  everybody else has released it: its reads fail.
- The store's own descriptor of a data file must not ask: it would wait for itself. One opened before the mark
  does not. After a restart of this process the marks are there already and it does, which a trial read shows;
  its place is then taken by the descriptor of the event that the trial read raised.

Not here: who mounts what and when; keeping the group open when this process dies.

Longer than other modules here: that each event gets exactly one answer is to be seen in one place.
"""

import errno
import logging
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from veneer.errors import MountError, VeneerError
from veneer.mount import fanotify
from veneer.mount.fanotify import Event
from veneer.mount.filetable import FileTable
from veneer.mount.guarded import Guarded, Noted, PreContentStats, check_guardable
from veneer.prefetch.recorder import Recorder
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["GuardedDevices", "PreContentStats", "check_guardable"]

log = logging.getLogger(__name__)

#: Events taken from the group at a time: few enough that other tasks get their turn.
_BATCH = 64
#: Bounds of how many readers may wait in this process, each of which costs a descriptor and a task; the kernel
#: keeps the rest. Half of the descriptors are for everything else.
_FEWEST_PENDING, _MOST_PENDING = 32, 16384
#: Devices that are taken or given up at a time, in a few system calls.
_THREADS = 4


class GuardedDevices:
    """Answers the events of one group for the devices that are held. Belongs to one event loop.

    Nobody reads or writes a device's data file through the store between attaching and holding it: after a
    restart such an access would ask, and wait for a device that is not served yet.

    Args:
        group: of :func:`veneer.mount.fanotify.open_group`; stays the caller's.
        restoring: mounts of an earlier process are still there: events of files that are not held wait until
            they are, or :meth:`restored` says that nothing more is to be expected.
        most_pending: bounds the readers that wait in this process; follows the limit of descriptors by default.
    """

    def __init__(self, group: int, *, restoring: bool = False, most_pending: int | None = None) -> None:
        self.stats = PreContentStats()
        self._group = group
        self._restoring = restoring
        #: Mounts of an earlier process that are not served.
        self._unserved = 0
        #: Data files that may have marks and may be theirs.
        self._strays: set[Path] = set()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most_pending or min(_MOST_PENDING, max(_FEWEST_PENDING, limit // 2))
        self._devices: dict[tuple[int, int], Guarded] = {}
        #: Events of files that are not served yet.
        self._parked: dict[tuple[int, int], list[Event]] = {}
        self._probing = 0
        self._draining = False
        #: Our own: all others may be waiting for what these do.
        self._threads = trio.CapacityLimiter(_THREADS)
        #: Who waits for events to be answered.
        self._waiting = trio.lowlevel.ParkingLot()
        #: Where to wait for the end of a proof.
        self._proved = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer events until cancelled; events that wait then are answered with EIO."""
        if self._nursery is not None:
            raise RuntimeError("events are being served already")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    room = await self._room()
                    events = fanotify.read_events(self._group, room)
                    for event in events:
                        self._take(event)
                    # A reader that has its answer is likely to ask again: looking whether it has already costs
                    # as much as to be told. What is in the queue by then is told at once.
                    if len(events) < room:
                        await trio.lowlevel.wait_readable(self._group)
                    else:
                        await trio.lowlevel.checkpoint()
        finally:
            self._nursery = None
            self._dismiss()

    async def hold(
        self, store: SpanStore, attached: AttachedDevice, files: FileTable | None, image: str
    ) -> None:
        """Keep a device from being read before its bytes are there; to be done before it is mounted.

        To be followed by one :meth:`opened` and one :meth:`release`. :meth:`serve` must be running.

        Args:
            store: fills the device.
            attached: the device.
            files: the image's files, which say what is worth fetching with a miss; None for a pack.
            image: names it in the log.

        Raises:
            UnsupportedFormat: its bytes may not be on the disk.
            MountError: there is no file, or it cannot be marked.
        """
        status = os.fstat(check_guardable(attached))
        inode = status.st_dev, status.st_ino
        while True:
            guarded = self._devices.get(inode)
            if guarded is None:
                guarded = self._devices[inode] = Guarded(self._group, store, attached, self.stats)
                self.stats.held += 1
            if guarded.attached is not attached:
                raise ValueError("one file is attached twice; there must be one store for a cache directory")
            async with guarded.changing:
                if self._devices.get(inode) is not guarded:
                    continue  # Its last holder has just released it.
                guarded.describe(files, image)
                try:
                    if not guarded.ready:
                        await self._begin(guarded)
                    guarded.mark()
                except BaseException as error:
                    if not guarded.holders:
                        with trio.CancelScope(shield=True):
                            await self._end(inode, guarded)
                    if isinstance(error, OSError):
                        raise MountError(
                            f"cannot watch {attached.device.key.hex} in the cache: {error.strerror}"
                        ) from error
                    raise
                guarded.holders += 1
                guarded.opening += 1
                for recorder in guarded.recorders:
                    recorder.shared = True
                break
        for event in self._parked.pop(inode, ()):
            self._decide_and_answer(event)

    @asynccontextmanager
    async def holding(
        self, store: SpanStore, attached: Sequence[AttachedDevice], files: FileTable | None, image: str
    ) -> AsyncIterator[Callable[[], None]]:
        """:meth:`hold` all devices of an image; what it yields is to be called when they have been mounted."""
        held, unopened = list[AttachedDevice](), list[AttachedDevice]()

        def opened() -> None:
            while unopened:
                self.opened(unopened.pop())

        try:
            for device in attached:
                await self.hold(store, device, files, image)
                held.append(device)
                unopened.append(device)
            yield opened
        finally:
            opened()
            for device in held:
                await self.release(device)

    @contextmanager
    def recording(self, attached: Sequence[AttachedDevice], recorder: Recorder) -> Iterator[None]:
        """Have every read of devices that are held noted, also when they are complete, as long as this lasts.

        To be entered before the devices are :meth:`opened`, so that they are marked, and left before they are
        released, which unmarks complete ones. Events do not say which mount they are for: reads of all mounts
        with the device are noted.
        """
        devices = [self._of(one) for one in dict.fromkeys(attached)]
        for guarded in devices:
            recorder.shared |= guarded.holders > attached.count(guarded.attached)
            guarded.recorders.append(recorder)
        try:
            yield
        finally:
            for guarded in devices:
                guarded.recorders.remove(recorder)

    def opened(self, attached: AttachedDevice) -> None:
        """Tell that the mount for which the device was held has been made, or will not be.

        A complete device is unmarked after that.
        """
        guarded = self._of(attached)
        guarded.opening -= 1
        self._consider(guarded)

    def asked(self, attached: Iterable[AttachedDevice]) -> float:
        """When the kernel last asked about one of the devices, on trio's clock."""
        return max(self._of(one).asked for one in attached)

    def questions(self, attached: Iterable[AttachedDevice]) -> int:
        """How often the kernel has asked about these devices."""
        return sum(self._of(one).questions for one in attached)

    def consider(self, attached: AttachedDevice) -> None:
        """Look whether a device has become complete otherwise than by being read, and unmark it then."""
        self._consider(self._of(attached))

    async def considered(self, attached: AttachedDevice) -> None:
        """The same, and wait for the proof that it takes."""
        guarded = self._of(attached)
        self._consider(guarded)
        while guarded.proving:
            await self._proved.park()

    async def release(self, attached: AttachedDevice) -> None:
        """Undo one :meth:`hold`; to be done when the file system that reads the device is gone.

        After the last one nothing here uses the device any more.
        """
        guarded = self._of(attached)
        with trio.CancelScope(shield=True):
            async with guarded.changing:
                guarded.holders -= 1
                if guarded.holders:
                    # A recording that has ended with this one kept it marked.
                    self._consider(guarded)
                    return
                inode = next(inode for inode, one in self._devices.items() if one is guarded)
                await self._end(inode, guarded)

    async def drain(self) -> None:
        """Take no event any more, and wait until those that were taken have been answered.

        The kernel keeps the others for whoever reads from the group next.
        """
        self._draining = True
        while self.stats.pending:
            await self._waiting.park()

    def guard(self, data: Path) -> None:
        """Have reads of a data file ask that nobody may hold. Blocks, briefly. Raises OSError."""
        try:
            fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fanotify.mark(self._group, fd)
        finally:
            os.close(fd)

    def expect(self, unserved: int, strays: Iterable[Path] = ()) -> None:
        """Tell how many mounts of an earlier process are not served, and which data files may be theirs.

        What nobody holds of these is unmarked once all are served and :meth:`restored` was called: whoever
        reads it would get errors.
        """
        self._unserved = unserved
        self._strays.update(strays)
        self._forget_strays()

    def _forget(self, data: Path) -> None:
        try:
            fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) not in self._devices:
                fanotify.unmark(self._group, fd)
        finally:
            os.close(fd)

    def restored(self) -> None:
        """Tell that every device which was held before a restart is held again, or :meth:`expect` was told."""
        self._restoring = False
        self._forget_strays()
        for inode in [inode for inode in self._parked if inode not in self._devices]:
            for event in self._parked.pop(inode):
                self._unknown(event)
                self._finish(event, errno.EIO)

    # Holding

    async def _begin(self, guarded: Guarded) -> None:
        """Mark a device for the first time, and see to it that our own descriptor does not ask."""
        if self._nursery is None:
            raise RuntimeError("a device is held only while events are served")
        await self._nursery.start(self._keep, guarded)
        # In a thread: who has the lock that this takes may be waiting for an answer of ours.
        await trio.to_thread.run_sync(guarded.store.pin, guarded.attached, guarded.mark, limiter=self._threads)
        guarded.mark()
        self._probing += 1
        self._waiting.unpark_all()
        try:
            # Abandoned when nobody answers any more.
            await trio.to_thread.run_sync(_probe, guarded, abandon_on_cancel=True, limiter=self._threads)
        finally:
            self._probing -= 1
            guarded.probe = None
        guarded.ready = True

    async def _keep(self, guarded: Guarded, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                guarded.nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            guarded.ready = False
            guarded.ended.set()

    async def _end(self, inode: tuple[int, int], guarded: Guarded) -> None:
        """Undo :meth:`_begin`. Whoever wants to hold the device again waits until all of this is done."""
        guarded.ready = False
        if guarded.nursery is not None:
            guarded.nursery.cancel_scope.cancel()
            await guarded.ended.wait()
        store, attached = guarded.store, guarded.attached
        try:
            if self._restoring or self._unserved:
                guarded.leave()
                await trio.to_thread.run_sync(store.leave, attached, limiter=self._threads)
                if attached.file is not None:
                    self._strays.add(attached.file.directory / "data")
            else:
                guarded.unmark(only_if_complete=False)
                await trio.to_thread.run_sync(store.unpin, attached, limiter=self._threads)
        finally:
            del self._devices[inode]
            self.stats.held -= 1
            self._forget_strays()
            if not self._restoring:
                for event in self._parked.pop(inode, ()):
                    self._finish(event, errno.EIO)

    def _forget_strays(self) -> None:
        if not self._restoring and not self._unserved:
            while self._strays:
                self._forget(self._strays.pop())

    def _of(self, attached: AttachedDevice) -> Guarded:
        for guarded in self._devices.values():
            if guarded.attached is attached:
                return guarded
        raise ValueError(f"the device {attached.device.key.hex} is not held")

    # Events

    async def _room(self) -> int:
        """Wait until events may be taken, and say how many; a trial read is not kept waiting."""
        while self._draining or ((room := self._most - self.stats.pending) <= 0 and not self._probing):
            await self._waiting.park()
        return min(max(1, room), _BATCH)

    def _take(self, event: Event) -> None:
        stats = self.stats
        stats.events += 1
        if event.fd < 0:
            stats.refused += 1
            # Floods come by thousands: the first one tells, and then each doubling.
            if stats.refused & (stats.refused - 1) == 0:
                why = os.strerror(-event.fd)
                log.error("the kernel failed reads because of: %s; so far %d", why, stats.refused)
            return
        stats.pending += 1
        stats.most_pending = max(stats.most_pending, stats.pending)
        self._decide_and_answer(event)

    def _decide_and_answer(self, event: Event) -> None:
        try:
            error = self._decide(event)
        except Exception:
            log.exception("failed an event because of a bug")
            error = errno.EIO
        if error is not None:
            self._finish(event, error)

    def _decide(self, event: Event) -> int | None:
        """The answer, or None when somebody else has become responsible for it."""
        status = os.fstat(event.fd)
        inode = status.st_dev, status.st_ino
        guarded = self._devices.get(inode)
        if guarded is None or not guarded.ready:
            if guarded is not None and event.pid == guarded.probe:
                os.dup2(event.fd, check_guardable(guarded.attached), inheritable=False)
                self.stats.adopted += 1
                return 0
            # What is parked may not use up the room that the trial read needs.
            if (guarded is not None or self._restoring) and self.stats.pending < self._most:
                self._parked.setdefault(inode, []).append(event)
                return None
            self._unknown(event)
            return errno.EIO
        guarded.asked = trio.current_time()
        guarded.questions += 1
        attached = guarded.attached
        offset = event.offset
        length = min(event.length or attached.size, attached.size - offset)
        # Who maps or changes a file is asked about all of it, and reads nothing.
        noted = guarded.note(offset, length) if guarded.recorders and event.length and length > 0 else ()
        if length <= 0 or guarded.store.holds(attached, offset, length):
            self.stats.ready += 1
            if guarded.may_be_complete:
                self._consider(guarded)
            return 0
        guarded.start(self._wait, guarded, event, offset, length, noted)
        return None

    async def _wait(self, guarded: Guarded, event: Event, offset: int, length: int, noted: Noted) -> None:
        """Answer one event when its bytes have come."""
        store, attached = guarded.store, guarded.attached
        error, cause = errno.EIO, None
        try:
            await store.fill(attached, offset, length, window=guarded.window(offset, length))
            if store.holds(attached, offset, length):
                error = 0
                self.stats.waited += 1
            else:
                log.error("%s %d+%d was filled and is not there", attached.device.key.hex, offset, length)
        except VeneerError as failure:
            error, cause = failure.errno, failure
        except Exception:
            log.exception("failed an event because of a bug")
        finally:
            self._finish(event, error)
            for recorder, use, came in noted:
                recorder.waited(use, trio.current_time() - came)
        if cause is not None:
            await guarded.tell(offset, length, cause)
        else:
            self._consider(guarded)

    def _finish(self, event: Event, error: int) -> None:
        """Answer an event; nothing else does, and nobody uses its descriptor after this."""
        self.stats.denied += error != 0
        try:
            fanotify.answer(self._group, event.fd, error)
        except OSError:
            # There is no group any more, or not ours: nobody can answer.
            log.exception("cannot answer an event")
        finally:
            os.close(event.fd)
            self.stats.pending -= 1
            self._waiting.unpark_all()

    def _unknown(self, event: Event) -> None:
        self.stats.unknown += 1
        if self.stats.unknown & (self.stats.unknown - 1) == 0:
            path = os.readlink(f"/proc/self/fd/{event.fd}")
            log.error("failed a read of %r, which is not held; so far %d", path, self.stats.unknown)

    def _dismiss(self) -> None:
        for events in self._parked.values():
            for event in events:
                self._finish(event, errno.EIO)
        self._parked.clear()

    # Completeness

    def _consider(self, guarded: Guarded) -> None:
        """Unmark a device that has all of its bytes, after the proof that they are right."""
        if guarded.ready and guarded.may_be_complete:
            if guarded.attached.complete:
                guarded.unmark(only_if_complete=True)
            else:
                guarded.proving = True
                guarded.start(self._prove, guarded)

    async def _prove(self, guarded: Guarded) -> None:
        try:
            await guarded.store.prove(guarded.attached)
        except VeneerError as error:
            guarded.refuted = True
            guarded.tell_refuted(error)
        finally:
            guarded.proving = False
            self._proved.unpark_all()
        if not guarded.opening:
            guarded.unmark(only_if_complete=True)


def _probe(guarded: Guarded) -> None:
    """Read through the store's descriptor: an event of this thread shows that it asks. Raises OSError."""
    guarded.probe = threading.get_native_id()
    os.pread(check_guardable(guarded.attached), 1, 0)
