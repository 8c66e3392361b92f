"""Whose request is sent next to one registry: the devices of all images behind a link take turns.

The most urgent class that anybody wants goes first. Within a class images take turns, and within an image its
devices, one request at a time; and one image never has more than half of the requests that may run. So who
reads a lot waits longer than who reads a little, and a demand of another image is sent at once.

Background work, which is what nobody asked for, may be held to so many bytes a second besides.

Not here: what a request asks for (:mod:`veneer.store.fetch`).
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Protocol

import trio

from veneer.store.link import LinkEstimate
from veneer.store.transfer import Priority

__all__ = ["LinkReport", "Queue", "Turns"]

#: What ``veneer status --json`` says of a link.
LinkReport = Mapping[str, object]

#: Of all requests that may run, so many may be running for one of this class to start: the rest is for others.
_SHARES = {
    Priority.DEMAND: 1.0,
    Priority.PROFILE: 0.75,
    Priority.STREAM: 0.75,
    Priority.READAHEAD: 0.5,
    Priority.COMPLETION: 0.5,
    Priority.BULK: 0.5,
}
#: Background work waits until no demand has been sent for so long: a start sends one every few milliseconds.
QUIET_S = 1.0
#: But it does not wait for ever.
_MOST_QUIET_S = 10.0
#: Of these, so many may be one image's.
_IMAGE_SHARE = 0.5


class Queue(Protocol):
    """What has requests to be sent. Those of one ``image`` share its turns."""

    image: str

    def head(self) -> Priority | None:
        """The class of its most urgent request that may be sent now; None if there is none."""

    def begin(self) -> None:
        """Send that request; its class goes to :meth:`Turns.ended` when it is over."""

    def queued(self) -> Mapping[Priority, int]:
        """How many spans are to be asked for, by class."""


class Turns:
    """The requests of one link. Used from one event loop only.

    Args:
        nursery: owns the task that sends them.
        most: how many may run at a time.
        background_rate: bytes a second for what nobody asked for; 0 for as many as there are.

    Attributes:
        link: what requests cost.
        bytes: received, by class.
        requests: sent, by class.
    """

    def __init__(self, nursery: trio.Nursery, *, most: int, background_rate: int = 0) -> None:
        self.link = LinkEstimate()
        self.bytes: Counter[Priority] = Counter()
        self.requests: Counter[Priority] = Counter()
        self._nursery = nursery
        self._most = most
        self._rate = background_rate
        self._running: Counter[Priority] = Counter()
        self._of_image: Counter[str] = Counter()
        #: By image: its devices that want something, in the order of their turns.
        self._waiting: dict[str, deque[Queue]] = {}
        #: When it was an image's turn last, in turns.
        self._latest: dict[str, int] = {}
        self._turn = 0
        self._sending = False
        self._background_at = 0.0
        self._demand_at = -math.inf

    @property
    def has_demand(self) -> bool:
        """Whether something that a reader waits for is still to be sent."""
        return any(queue.head() is Priority.DEMAND for queues in self._waiting.values() for queue in queues)

    def want(self, queue: Queue) -> None:
        """Tell that a queue has something to be sent; it begins in the next round of the scheduler or later."""
        queues = self._waiting.setdefault(queue.image, deque())
        if queue not in queues:
            queues.append(queue)
        if not self._sending:
            self._sending = True
            self._nursery.start_soon(self._send)

    def forget(self, queue: Queue) -> None:
        """Tell that a queue will want nothing any more."""
        queues = self._waiting.get(queue.image)
        if queues is not None and queue in queues:
            queues.remove(queue)
            if not queues:
                del self._waiting[queue.image]

    def began(self, queue: Queue, priority: Priority) -> None:
        """Count a request that is being sent."""
        self.requests[priority] += 1
        if priority is Priority.DEMAND:
            self._demand_at = trio.current_time()
        self._running[priority] += 1
        self._of_image[queue.image] += 1

    def ended(self, queue: Queue, priority: Priority) -> None:
        """Count it no longer."""
        self._running[priority] -= 1
        self._of_image[queue.image] -= 1
        if not self._of_image[queue.image]:
            del self._of_image[queue.image]
        if self._waiting and not self._sending:
            self._sending = True
            self._nursery.start_soon(self._send)

    def spend(self, length: int) -> None:
        """Count bytes of background work against what it may take."""
        if self._rate:
            self._background_at = max(self._background_at, trio.current_time()) + length / self._rate

    async def background(self, *, quiet: bool) -> None:
        """Wait until background work may ask for more; if ``quiet``, until readers wait for nothing besides."""
        if self._background_at > trio.current_time():
            await trio.sleep_until(self._background_at)
        if quiet:
            with trio.move_on_after(_MOST_QUIET_S):
                while (until := self._demand_at + QUIET_S) > trio.current_time():  # noqa: ASYNC110 - each is later
                    await trio.sleep_until(until)

    async def _send(self) -> None:
        # One round of the scheduler later, all readers that are about to ask have asked: they share ranges.
        await trio.lowlevel.checkpoint()
        while (queue := self._next()) is not None:
            queue.begin()
            # The scheduler starts tasks in any order: this way the most urgent request is the first to be sent.
            await trio.lowlevel.checkpoint()
        self._sending = False

    def _next(self) -> Queue | None:
        """Whose turn it is; None when nobody may send anything. Others keep their place."""
        chosen: tuple[tuple[Priority, int], Queue] | None = None
        running = self._running.total()
        for image, queues in list(self._waiting.items()):
            for queue in list(queues):
                if (priority := queue.head()) is None:
                    self.forget(queue)
                elif (
                    (chosen is None or (priority, self._latest.get(image, 0)) < chosen[0])
                    and running < _part(self._most, _SHARES[priority])
                    and self._of_image[image] < _part(self._most, _SHARES[priority] * _IMAGE_SHARE)
                ):
                    chosen = (priority, self._latest.get(image, 0)), queue
        if chosen is None:
            return None
        queue = chosen[1]
        queues = self._waiting[queue.image]
        queues.remove(queue)
        queues.append(queue)
        self._turn += 1
        self._latest[queue.image] = self._turn
        return queue

    def report(self, queues: "list[Queue]") -> LinkReport:
        """What is running, waiting, done and allowed; ``queues`` are all that use the link."""
        waiting: Counter[Priority] = Counter()
        for queue in queues:
            waiting.update(queue.queued())
        link = self.link
        return {
            "rtt_ms": round(1e3 * link.rtt_s, 3),
            "bytes_per_s": round(1 / link.s_per_byte),
            "classes": {
                priority.name.lower(): {
                    "running": self._running[priority],
                    "queued_spans": waiting[priority],
                    "requests": self.requests[priority],
                    "bytes": self.bytes[priority],
                }
                for priority in Priority
            },
            "most_requests": self._most,
            "background_bytes_per_s": self._rate,
        }


def _part(most: int, share: float) -> int:
    return max(1, int(most * share))
