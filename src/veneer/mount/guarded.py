"""One device that the kernel reads by itself: whether its reads ask, and who still needs that.

A part of :mod:`veneer.mount.precontent`, which says what it is about.
"""

import logging
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVarTuple

import trio

from veneer.errors import MountError, UnsupportedFormat, VeneerError
from veneer.mount import fanotify
from veneer.mount.failures import FailureLog
from veneer.mount.filetable import FileTable
from veneer.mount.readahead import MIN_WINDOW
from veneer.prefetch.recorder import Recorder
from veneer.store.presence import Form
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["Guarded", "Noted", "PreContentStats", "check_guardable"]

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

#: First uses of a range: who noted it, as what, and when.
Noted = Sequence[tuple[Recorder, int, float]]


@dataclass(slots=True)
class PreContentStats:
    """What became of events, and how many devices are held.

    Args:
        events: read from the group.
        ready: let through at once.
        waited: let through when their bytes had come.
        denied: answered with an error.
        refused: denied by the kernel, which had no descriptor for them.
        unknown: of files that are not held, which counts as denied too.
        adopted: own descriptors that asked, and were replaced.
        pending: waiting now.
        most_pending: waiting at a time, at most.
        held: devices held now.
        marked: those of them whose reads ask.
        unmarked_complete: times that a mark went because the device was complete.
        remarked: times that it came back.
    """

    events: int = 0
    ready: int = 0
    waited: int = 0
    denied: int = 0
    refused: int = 0
    unknown: int = 0
    adopted: int = 0
    pending: int = 0
    most_pending: int = 0
    held: int = 0
    marked: int = 0
    unmarked_complete: int = 0
    remarked: int = 0

    def to_json(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)


def check_guardable(attached: AttachedDevice) -> int:
    """The descriptor of a device's data file.

    Raises UnsupportedFormat or MountError when there is none that the kernel may read.
    """
    name = attached.device.blob.digest
    if attached.form is not Form.PLAIN:
        raise UnsupportedFormat(
            f"layer {name} is encrypted, and its plain bytes must not reach the disk that erofs-fanotify reads",
            hint="use --backend erofs-fuse",
        )
    if (fd := attached.data_fd) is None:
        raise MountError(
            f"the cache has no file for layer {name}, which erofs-fanotify reads",
            hint="make room for the cache directory, or use --backend erofs-fuse",
        )
    return fd


class Guarded:
    """One device that is held. Belongs to one event loop, but for :meth:`mark`."""

    def __init__(self, group: int, store: SpanStore, attached: AttachedDevice, stats: PreContentStats) -> None:
        self.store = store
        self.attached = attached
        self.key = attached.device.key
        #: Whether events may be served: there is a mark, and our own descriptor does not ask.
        self.ready = False
        #: How many times it is held, and how many of these mounts have yet to be made.
        self.holders = self.opening = 0
        #: One hold or release at a time.
        self.changing = trio.Lock()
        #: Thread of the trial read.
        self.probe: int | None = None
        self.adopted = False
        #: The proof is under way, or has failed and will not be tried again.
        self.proving = self.refuted = False
        #: When the kernel last asked, on trio's clock.
        self.asked = -math.inf
        #: How often it has asked.
        self.questions = 0
        #: Who notes what is read of it. While anybody does, it stays marked.
        self.recorders: list[Recorder] = []
        #: Owner of its tasks.
        self.nursery: trio.Nursery | None = None
        self.ended = trio.Event()
        #: Of the mount that came last; others with this device differ in little.
        self._files: FileTable | None = None
        self._image = ""
        self._failures: FailureLog | None = None
        self._preparing = False
        self._group = group
        self._stats = stats
        self._marked = False
        # The store marks from its threads.
        self._marking = threading.Lock()

    def start(self, function: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
        """Start a task that ends when the device is not held any more, at the latest."""
        if self.nursery is None:
            raise RuntimeError("the device is not served yet")
        self.nursery.start_soon(function, *args)

    def mark(self) -> None:
        """Have every read ask that comes after this. Called from any thread; raises OSError."""
        with self._marking:
            if not self._marked:
                fanotify.mark(self._group, check_guardable(self.attached))
                self._marked = True
                self._stats.marked += 1
                self._stats.remarked += self.ready

    def unmark(self, *, only_if_complete: bool) -> None:
        """Have reads ask no more; for a complete device, unless somebody records them.

        The store clears the device's completeness before it marks to evict, so that under this lock a device
        that is complete is not about to lose anything without a mark.
        """
        with self._marking:
            if not self._marked or (only_if_complete and (self.recorders or not self.attached.complete)):
                return
            if (fd := self.attached.data_fd) is not None:
                fanotify.unmark(self._group, fd)
            self._marked = False
            self._stats.marked -= 1
            self._stats.unmarked_complete += only_if_complete

    def leave(self) -> None:
        """Leave reads asking, if they do, whoever answers."""
        with self._marking:
            self._stats.marked -= self._marked
            self._marked = False

    @property
    def may_be_complete(self) -> bool:
        """Whether it is worth a proof, or only the mark has to go."""
        return (
            self._marked
            and not self.opening
            and not self.proving
            and not self.refuted
            and self.attached.all_present
        )

    def note(self, offset: int, length: int) -> Noted:
        """Tell whoever records that a range is read now."""
        now, attached = trio.current_time(), self.attached
        layer, size = attached.device.diff_id, attached.size
        uses = ((recorder, recorder.note(layer, size, offset, length, now)) for recorder in self.recorders)
        return [(recorder, use, now) for recorder, use in uses if use is not None]

    # Files

    def describe(self, files: FileTable | None, image: str) -> None:
        """Say what is on the device, and for whom; a pack has no files of its own."""
        self._files, self._image, self._failures = files, image, None

    def window(self, offset: int, length: int) -> tuple[int, int]:
        """What to fetch with a miss; a first one is not kept waiting until the tree is known."""
        files = self._files
        if files is not None and files.is_prepared(self.key):
            return files.window(self.key, offset, length)
        if files is not None and not self._preparing:
            self._preparing = True
            self.start(self._prepare, files)
        return offset, min(self.attached.size, offset + max(length, MIN_WINDOW))

    async def _prepare(self, files: FileTable) -> bool:
        try:
            await trio.to_thread.run_sync(files.prepare, self.key)
        except VeneerError as error:
            log.warning("image=%s nothing is fetched ahead cause=%r", self._image, error.message)
            return False
        self._preparing = False
        return True

    async def tell(self, offset: int, length: int, error: VeneerError) -> None:
        """Log that a read failed."""
        spans = self.attached.spans.covering(offset, length)
        where = f"device={self.key.hex[:12]} spans={spans[0]}..{spans[-1]}"
        files = self._files
        if files is None or (not files.is_prepared(self.key) and not await self._prepare(files)):
            log.error("read failed image=%s %s cause=%r", self._image, where, error.message)
            return
        if self._failures is None:
            self._failures = FailureLog(self._image, files.index)
        node, start = files.at(self.key, offset, length)
        self._failures.record(node, offset - start, length, error, where)

    def tell_refuted(self, error: VeneerError) -> None:
        """Log that the device as a whole is not what it should be."""
        log.error("image=%s device=%s cause=%r", self._image, self.key.hex[:12], error.message)
