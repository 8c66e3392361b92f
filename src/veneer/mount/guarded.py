"""One device that the kernel reads by itself: whether its reads ask, and who still needs that.

A part of :mod:`veneer.mount.precontent`, which says what it is about.
"""

import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TypeVarTuple

import trio

from veneer.errors import MountError, UnsupportedFormat
from veneer.mount import fanotify
from veneer.mount.failures import FailureLog
from veneer.mount.filetable import FileTable
from veneer.store.presence import Form
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["Guarded", "PreContentStats", "check_guardable"]

Ts = TypeVarTuple("Ts")


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
        #: Of the mount that came last; others with this device differ in little.
        self.files: FileTable
        self.failures: FailureLog | None = None
        self.image = ""
        self.preparing = False
        #: The proof is under way, or has failed and will not be tried again.
        self.proving = self.refuted = False
        #: Owner of its tasks.
        self.nursery: trio.Nursery | None = None
        self.ended = trio.Event()
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
        """Have reads ask no more.

        The store clears the device's completeness before it marks to evict, so that under this lock a device
        that is complete is not about to lose anything without a mark.
        """
        with self._marking:
            if not self._marked or (only_if_complete and not self.attached.complete):
                return
            if (fd := self.attached.data_fd) is not None:
                fanotify.unmark(self._group, fd)
            self._marked = False
            self._stats.marked -= 1
            self._stats.unmarked_complete += only_if_complete

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
