"""One round: an empty cache, a fresh mount, readers; a fault at a random moment; then all must be well again.

After the fault every reader must get right bytes again, a sweep over all files must find no error at all, the
mount must go, and the cache must not vouch for a damaged span.
"""

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from crashes.content import Content
from crashes.disk import SmallDisk
from crashes.machine import Machine
from crashes.readers import Failure, Pool
from crashes.registry import SwitchedRegistry
from crashes.verdict import UNEXPLAINED, Outcome, Window, explain, window

__all__ = ["Round"]

#: Seconds that a blob request takes more, and seconds that all of the image takes on one connection (0: as fast
#: as it can be read): the slower, the longer the cache stays cold.
_PACES = ((0.0, 0.0), (0.005, 4.0), (0.02, 12.0), (0.05, 24.0))
#: Reads of each reader that show that a mount works again.
_WELL = 5
_WELL_DEADLINE_S = 60.0
#: Reads of each reader before the first fault: some faults shall meet a mount that has just begun.
_FIRST_READS = 1
#: Of errors without an explanation, so many are shown.
_EXAMPLES = 5


class Round:
    """What a scenario acts on.

    Args:
        number: of the round.
        machine: veneer and its directories.
        registry: where the image is.
        content: of the image.
        outcome: of the scenario.
        readers: how many processes read.
        allowed: causes that errors may have by the log.
        disk: what the cache is on, for scenarios that fill it.
        damaged: whether the scenario damages the cache.
    """

    def __init__(
        self,
        number: int,
        machine: Machine,
        registry: SwitchedRegistry,
        content: Content,
        outcome: Outcome,
        *,
        readers: int,
        allowed: frozenset[str],
        disk: SmallDisk | None = None,
        damaged: bool = False,
    ) -> None:
        self.rng = random.Random(f"{outcome.seed} {outcome.scenario} {outcome.backend} {number}")
        self.machine = machine
        self.registry = registry
        self.content = content
        self.outcome = outcome
        self.disk = disk
        self.windows: list[Window] = []
        self._allowed = allowed
        self._damaged = damaged
        self._name = f"{outcome.seed} {outcome.scenario} {outcome.backend} {number}"
        self._notes = machine.directory / "notes"
        self.pool = Pool(content, machine.point, self._notes, readers)
        self._starts = 0
        self._log_start = len(machine.log())

    def begin(self) -> None:
        """Mount and start to read."""
        # What an earlier mount that is still being closed has open stays until the next round.
        shutil.rmtree(self.machine.cache_dir, ignore_errors=True)
        self.registry.well()
        delay_s, all_s = self.rng.choice(_PACES)
        self.registry.pace(delay_s, all_s and self.content.size / all_s)
        self.mount()
        self.read()

    def mount(self) -> None:
        """Mount, writable or not."""
        self.machine.mount(writable=self.rng.random() < 0.3)

    def read(self) -> None:
        """Start the readers, and wait until each has read something."""
        self._starts += 1
        self.pool.start(f"{self._name} {self._starts}")
        self.pool.wait_for_reads(_FIRST_READS, _WELL_DEADLINE_S)

    def pause(self, longest_s: float = 0.8) -> None:
        """Let a random time pass, with the readers watched."""
        until = time.monotonic() + self.rng.uniform(0, longest_s)
        while time.monotonic() < until:
            self.pool.check()
            time.sleep(0.005)

    @contextmanager
    def fault(self, cause: str, *errnos: str) -> Iterator[None]:
        """Count a fault, whose errors are explained as :class:`Window` says until the block ends."""
        self.outcome.faults += 1
        with window(self.windows, cause, *errnos):
            yield

    def well_again(self, each: int = _WELL) -> None:
        """Wait until every reader gets right bytes."""
        self.pool.wait_for_reads(each, _WELL_DEADLINE_S)

    def end(self) -> None:
        """All must be well: read everything, unmount, look into the cache."""
        self.registry.well()
        self.well_again()
        self.pool.stop()
        self.registry.pace(0)
        self.pool.sweep(self._name)
        for mount in self.machine.status():
            if mount["report"]:
                self.outcome.notes["reads of the last mount that waited"] += mount["report"]["store"]["misses"]
        if not self.machine.unmount():
            raise Failure("the mount is in use, and nobody uses it")
        if self._damaged:
            # Spans from before the boot that nobody has read.
            self.machine.veneer("cache", "check")
        self.machine.check_cache()

    def account(self) -> None:
        """Add this round to the outcome; also one that failed."""
        self.pool.kill()
        outcome = self.outcome
        outcome.rounds += 1
        outcome.reads += self.pool.reads
        outcome.bytes += self.pool.bytes
        log = self.machine.log()[self._log_start :]
        for error in self.pool.errors():
            cause = explain(error, log, self.windows, self._allowed, self.content.order)
            outcome.errors[error.name, cause] += 1
            if cause.startswith(UNEXPLAINED) and len(outcome.examples) < _EXAMPLES:
                outcome.examples.append(str(error))
        shutil.rmtree(self._notes, ignore_errors=True)
