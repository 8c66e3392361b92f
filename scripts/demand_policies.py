"""Play recorded starts against choices of what a miss fetches; prints the table of decision 0017.

usage: demand_policies.py IMAGE PROFILE...      profiles are written by `veneer profile record -o`

The model: a request takes a round trip and processor time; what is under way shares the bandwidth; bytes that
came are verified one after the other. Reads come one after the other, as in a program that does not prefetch.
It leaves out what the kernel reads ahead, other readers, and the time that the program itself takes.
"""

import heapq
import itertools
import stat
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from veneer.image import open_image
from veneer.index.model import SpanTable
from veneer.prefetch.profile import Profile
from veneer.settings import Settings

#: Round trip in seconds, and bytes a second.
NETWORKS = {"0 ms": (0.0015, 400e6), "10 ms, 1 Gb/s": (0.0115, 125e6), "50 ms, 100 Mb/s": (0.0515, 12.5e6)}
#: Processor seconds of a request on both sides, and of a plain byte that is verified, decoded and written.
REQUEST_S, PLAIN_BYTE_S = 0.002, 4e-9
#: How much of a request shares the line in one piece.
PIECE = 32 << 10
SMALL, MEDIUM, LONGEST, SLOTS = 1 << 20, 8 << 20, 4 << 20, 8


@dataclass(frozen=True)
class Layout:
    """A layer: its spans, and where its files are: offset, length and directory, in order."""

    spans: SpanTable
    files: list[tuple[int, int, bytes]]

    def file_at(self, offset: int, length: int) -> int:
        """The file that has most of a range."""
        first = max(0, bisect_right(self.files, (offset, 1 << 62, b"")) - 1)
        best, most = first, -1
        for number in range(first, len(self.files)):
            start, size, _ = self.files[number]
            if start >= offset + length:
                break
            within = min(start + size, offset + length) - max(start, offset)
            if within > most:
                best, most = number, within
        return best

    def end_of(self, number: int) -> int:
        """Where a span ends in the blob."""
        return self.spans.stored_offsets[number] + self.spans.stored_lengths[number]


@dataclass
class Link:
    """Requests under way, and the spans that have come. Time is simulated."""

    layout: Layout
    rtt_s: float
    rate: float
    now: float = 0.0
    requests: int = 0
    bytes: int = 0
    ready: dict[int, float] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    _events: list[tuple[float, int, str, int, int, int, int]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _waiting: list[tuple[int, int, int, int]] = field(default_factory=list)
    _line_free: float = 0.0
    _processor_free: float = 0.0
    _running: int = 0

    def is_free(self, number: int) -> bool:
        """Whether a span has neither come nor been asked for."""
        return 0 <= number < len(self.layout.spans) and number not in self.ready and number not in self.asked

    def ask(self, first: int, last: int, *, urgent: bool) -> None:
        """Request neighbouring spans."""
        self.asked.update(range(first, last + 1))
        heapq.heappush(self._waiting, (not urgent, next(self._order), first, last))
        self._send()

    def wait(self, done: Callable[[], bool]) -> None:
        """Let time pass until ``done``."""
        while not done():
            time, _, kind, first, last, begin, end = heapq.heappop(self._events)
            self.now = max(self.now, time)
            if kind == "send":
                end = min(self.layout.end_of(last), begin + PIECE)
                self._line_free = max(time, self._line_free) + (end - begin) / self.rate
                self._push(self._line_free, "come", first, last, begin, end)
            elif kind == "come":
                self._take(first, last, begin, end)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        self._push(until, "pause", 0, 0, 0, 0)
        self.wait(lambda: self.now >= until)

    def has(self, number: int) -> bool:
        """Whether a span can be read."""
        return self.ready.get(number, float("inf")) <= self.now

    def _push(self, time: float, kind: str, *place: int) -> None:
        first, last, begin, end = place
        heapq.heappush(self._events, (time, next(self._order), kind, first, last, begin, end))

    def _send(self) -> None:
        while self._waiting and self._running < (SLOTS // 2 if self._waiting[0][0] else SLOTS):
            _, _, first, last = heapq.heappop(self._waiting)
            begin = self.layout.spans.stored_offsets[first]
            self._running += 1
            self.requests += 1
            self.bytes += self.layout.end_of(last) - begin
            self._processor_free = max(self.now, self._processor_free) + REQUEST_S
            self._push(self._processor_free + self.rtt_s, "send", first, last, begin, begin)

    def _take(self, first: int, last: int, begin: int, end: int) -> None:
        starts = self.layout.spans.starts
        for number in range(first, last + 1):
            if begin < self.layout.end_of(number) <= end and number not in self.ready:
                seconds = (starts[number + 1] - starts[number]) * PLAIN_BYTE_S
                self._processor_free = max(self.now, self._processor_free) + seconds
                self.ready[number] = self._processor_free
                self._push(self._processor_free, "pause", 0, 0, 0, 0)
        if end < self.layout.end_of(last):
            self._push(self.now, "send", first, last, end, 0)
        else:
            self._running -= 1
            self._send()


@dataclass(frozen=True)
class Choice:
    """What a miss fetches besides the spans that were asked for.

    Args:
        products: how many bandwidth-delay products behind it; 0 for nothing, also no whole files.
        fixed: so many bytes behind it in place of that.
        before: the part of that which is fetched before it.
        whole_at: the miss from which on files of medium size are fetched whole.
        inside: not beyond the directory.
        grow: doubles with each miss in the directory, up to so many times.
        elsewhere: half as much as well where the miss before was.
        verified: what can be verified in that time, if that is less.
    """

    products: float = 1.0
    fixed: int = 0
    before: float = 0.0
    whole_at: int = 1 << 30
    inside: bool = False
    grow: int = 1
    elsewhere: bool = False
    verified: bool = False


CHOICES = {
    "what was asked for": Choice(products=0),
    "whole small files, 256 KiB behind": Choice(fixed=256 << 10),
    "the same, 1 MiB": Choice(fixed=1 << 20),
    "the same, 2 MiB": Choice(fixed=2 << 20),
    "one product behind (0006)": Choice(),
    "half a product": Choice(products=0.5),
    "two products": Choice(products=2),
    "one, inside the directory": Choice(inside=True),
    "half, doubled with misses in the directory": Choice(products=0.5, grow=8),
    "one, and half where it was before": Choice(elsewhere=True),
    "one, half before": Choice(before=0.5),
    "one, an eighth before": Choice(before=0.125),
    "one, whole files at the second miss": Choice(whole_at=2),
    "both": Choice(before=0.125, whole_at=2),
    "both, as much as can be verified": Choice(before=0.125, whole_at=2, verified=True),
}


class Policy:
    """A choice at work for one start."""

    def __init__(self, choice: Choice, link: Link) -> None:
        self._choice = choice
        self._link = link
        self._layout = link.layout
        self._misses: defaultdict[int, int] = defaultdict(int)
        self._in_directory: defaultdict[bytes, int] = defaultdict(int)
        self._followed: dict[int, tuple[int, int]] = {}
        self._earlier: int | None = None
        spans = self._layout.spans
        #: Plain bytes of a stored one.
        self._ratio = spans.size / sum(spans.stored_lengths)

    def miss(self, offset: int, length: int, needed: list[int]) -> None:
        """Ask for what a read has to wait for, and what goes with it."""
        link, choice, layout = self._link, self._choice, self._layout
        file = layout.file_at(offset, length)
        wanted = {number for number in needed if link.is_free(number)}
        product = link.rate * (link.rtt_s + REQUEST_S)
        if choice.products or choice.fixed:
            begin, end = self._window(file, offset, length)
            wanted |= {n for n in layout.spans.covering(begin, end - begin) if link.is_free(n)}
        behind = choice.fixed or self._behind(file, product)
        gap = max(4096, min(1 << 20, product / 2))
        ranges = list(self._ranges(wanted, max(256 << 10, behind), gap))
        for first, last in sorted(ranges, key=lambda one: not set(needed) & set(range(one[0], one[1] + 1))):
            urgent = bool(set(needed) & set(range(first, last + 1)))
            low, high = self._reach(first, last, behind, file) if urgent else (first, last)
            link.ask(low, high, urgent=urgent)
        if choice.elsewhere and self._earlier is not None:
            self._go_on(self._earlier, behind / 2)
        self._earlier = needed[0]

    def _behind(self, file: int, product: float) -> float:
        choice = self._choice
        directory = self._layout.files[file][2]
        self._in_directory[directory] += 1
        behind = choice.products * product * min(choice.grow, 1 << (self._in_directory[directory] - 1))
        if choice.verified:
            behind = min(behind, (self._link.rtt_s + REQUEST_S) / (PLAIN_BYTE_S * self._ratio))
        return min(LONGEST, behind)

    def _window(self, file: int, offset: int, length: int) -> tuple[int, int]:
        start, size, _ = self._layout.files[file]
        self._misses[file] += 1
        if size <= SMALL or (size <= MEDIUM and self._misses[file] >= self._choice.whole_at):
            return start, start + size
        reached, window = self._followed.get(file, (start, 128 << 10))
        window = min(2 * window, MEDIUM) if abs(offset - reached) <= 256 << 10 else 256 << 10
        end = min(start + size, offset + max(length, window))
        self._followed[file] = (end, window)
        return offset, max(end, offset + 1)

    def _ranges(self, numbers: set[int], limit: float, gap: float) -> Iterator[tuple[int, int]]:
        offsets, run = self._layout.spans.stored_offsets, list[int]()
        for number in sorted(numbers):
            if run and (
                offsets[number] - self._layout.end_of(run[-1]) > gap
                or self._layout.end_of(number) - offsets[run[0]] > limit
            ):
                yield run[0], run[-1]
                run = []
            run.append(number)
        if run:
            yield run[0], run[-1]

    def _reach(self, first: int, last: int, behind: float, file: int) -> tuple[int, int]:
        offsets, link = self._layout.spans.stored_offsets, self._link
        begin, end = offsets[first] - self._choice.before * behind, offsets[first] + behind
        while link.is_free(last + 1) and self._layout.end_of(last + 1) <= end and self._fits(file, last + 1):
            last += 1
        while link.is_free(first - 1) and offsets[first - 1] >= begin:
            first -= 1
        return first, last

    def _fits(self, file: int, number: int) -> bool:
        if not self._choice.inside:
            return True
        there = self._layout.file_at(self._layout.spans.starts[number], 1)
        return self._layout.files[there][2] == self._layout.files[file][2]

    def _go_on(self, number: int, most: float) -> None:
        while number in self._link.ready or number in self._link.asked:
            number += 1
        last, end = number, self._layout.spans.stored_offsets[min(number, len(self._layout.spans) - 1)] + most
        while self._link.is_free(last + 1) and self._layout.end_of(last + 1) <= end:
            last += 1
        if self._link.is_free(number):
            self._link.ask(number, last, urgent=False)


def play(layout: Layout, uses: list[tuple[int, int]], choice: Choice, network: str) -> Link:
    """One start."""
    link = Link(layout, *NETWORKS[network])
    policy = Policy(choice, link)
    for offset, length in uses:
        numbers = list(layout.spans.covering(offset, length))
        needed = [number for number in numbers if not link.has(number)]
        if needed:
            policy.miss(offset, length, needed)
            link.wait(lambda numbers=needed: all(link.has(number) for number in numbers))  # type: ignore[misc]
    return link


async def layouts(reference: str) -> dict[str, Layout]:
    """The layers of an image, by diffID."""
    async with open_image(reference, Settings.from_environment()) as image:
        index = image.index
        files: dict[int, set[tuple[int, int, bytes]]] = defaultdict(set)
        for path, node in index.walk():
            if stat.S_ISREG(index.mode[node]) and index.size[node]:
                place = index.data[node], index.size[node], path.rpartition(b"/")[0]
                files[index.device_of(node)].add(place)
        return {
            str(device.diff_id): Layout(device.spans, sorted(files[number]))
            for number, device in enumerate(index.devices)
        }


def main() -> None:
    """Print the table."""
    reference, *paths = sys.argv[1:]
    of_layer = trio.run(layouts, reference)
    starts = []
    for path in paths:
        uses = Profile.parse(Path(path).read_bytes()).uses
        # The layer that most of it is of: one link, one order.
        layer = max({str(use.layer) for use in uses}, key=lambda one: sum(str(u.layer) == one for u in uses))
        starts.append((of_layer[layer], [(u.offset, u.length) for u in uses if str(u.layer) == layer]))
    print(f"| | {' | '.join(NETWORKS)} |")
    print(f"|---|{'---|' * len(NETWORKS)}")
    for name, choice in CHOICES.items():
        cells = []
        for network in NETWORKS:
            links = [play(layout, uses, choice, network) for layout, uses in starts]
            seconds, sizes = sum(link.now for link in links), sum(link.bytes for link in links)
            cells.append(f"{seconds:.2f} s, {sum(link.requests for link in links)}, {sizes / 1e6:.0f} MB")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
