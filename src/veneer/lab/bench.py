"""The bench: systems x images x networks, in randomized complete blocks.

In one block every system starts one image once over one network, in an order drawn anew; blocks of the images
take turns. So whatever changes slowly on the machine meets all systems alike, and runs of one block can be
compared as pairs. Before each start its system is wiped and the page cache dropped, and then a tiny container
is started with the same system, so that programs are in memory, as on a machine that starts containers now
and then, and the image is not.

One bench at a time on a machine: images have fixed ports, and two would measure one another.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import Unavailable
from veneer.events import Progress, Reporter, silent
from veneer.lab.distance import Counters, Distance, check_network, distance
from veneer.lab.machine import processor_seconds
from veneer.lab.records import Network, NetworkEvent, ResultWriter, RunEvent
from veneer.lab.start import start
from veneer.lab.systems import Facts, Launch, System
from veneer.lab.workplace import Subject, Workplace

__all__ = ["Blocks", "run_blocks"]

#: A start hangs that takes longer than this, four times what its image takes on the line, and what unpacking
#: it takes on a slow disk (bytes a second), all together.
_DEADLINE_S = 60.0
_SLACK = 4.0
_SLOW_DISK = 4e6
#: A machine may be busy for a moment when a line is checked.
_CHECKS, _CHECK_PAUSE_S = 10, 2.0
_MAX_ARRIVALS = 200
_COMMAND_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is measured.

    Args:
        subjects: images.
        systems: all of them take part in each block.
        networks: one after the other.
        counts: blocks, by network name; large images get half of them, and at least one.
        seed: of the order.
        tools_warm: start a tiny container before each measurement.
        timed: names of images that are started once more for a timing record.
    """

    subjects: Sequence[Subject]
    systems: Sequence[System]
    networks: Sequence[Network]
    counts: Mapping[str, int]
    seed: int
    tools_warm: bool
    timed: frozenset[str] = frozenset()

    def count(self, subject: Subject, network: Network) -> int:
        """How many blocks an image gets."""
        count = self.counts[network.name]
        return max(1, count // 2) if subject.spec.large else count


class _Clock:
    """Reads what has to be read at the moment at which a start's clock stops."""

    def __init__(self, line: Distance) -> None:
        self._line = line
        self._before_s = processor_seconds()
        self.counters: Counters | None = None
        self.cpu_s = 0.0

    def stop(self) -> None:
        self.counters = self._line.counters()
        self.cpu_s = processor_seconds() - self._before_s


class _Runner:
    """Makes one run after the other."""

    def __init__(
        self,
        place: Workplace,
        blocks: Blocks,
        rehearsal: Subject,
        writer: ResultWriter,
        output: Path,
        began: float,
    ) -> None:
        self._place = place
        self._blocks = blocks
        self._rehearsal = rehearsal
        self._writer = writer
        self._output = output
        self._began = began
        self._log = place.directory / "start.log"

    def block(
        self, subject: Subject, network: Network, line: Distance, number: int, order: random.Random
    ) -> None:
        """One block: each system once."""
        systems = list(self._blocks.systems)
        order.shuffle(systems)
        for position, system in enumerate(systems):
            self._one(subject, system, network, line, number, position, timed=False)

    def timed(self, subject: Subject, network: Network, line: Distance) -> None:
        """One start of each system that can tell when what happened."""
        for position, system in enumerate(self._blocks.systems):
            if system.timed(system.launch(subject, line.port)) is not None:
                self._one(subject, system, network, line, -1, position, timed=True)

    def _one(
        self,
        subject: Subject,
        system: System,
        network: Network,
        line: Distance,
        block: int,
        position: int,
        *,
        timed: bool,
    ) -> None:
        deadline_s = _DEADLINE_S + subject.built.size / _SLOW_DISK
        if network.mbit:
            deadline_s += _SLACK * subject.built.stored * 8 / (network.mbit * 1e6)
        launch = system.launch(subject, line.port)
        launch = (system.timed(launch) or launch) if timed else launch
        self._make_cold(subject, system, line, deadline_s)
        clock = _Clock(line)
        result = start(
            launch.argv,
            subject.spec.probe,
            environment=launch.environment,
            deadline_s=deadline_s,
            log=self._log,
            stopped=clock.stop,
        )
        assert clock.counters is not None
        system.finish(subject)
        facts, outcome, error = Facts(), result.outcome, result.error
        if outcome == "ok":
            facts = system.facts(subject, clock.counters)
            broken = [name for name, held in facts.checks.items() if not held]
            if broken:
                outcome, error = "failed", f"not true: {'; '.join(broken)}"
        if outcome != "ok":
            self._keep_log(subject, system, network, block, result.output)
        arrivals = _thinned(clock.counters, result.began)
        self._writer.write(
            RunEvent(
                image=subject.name,
                system=system.name,
                network=network.name,
                block=block,
                position=position,
                outcome=outcome,
                seconds=result.seconds if outcome == "ok" else None,
                command=tuple(word[:_COMMAND_LENGTH] for word in launch.argv),
                began_s=result.began - self._began,
                first_output_s=result.first_output_s,
                exit_code=result.exit_code,
                network_bytes=clock.counters.bytes_down,
                network_bytes_up=clock.counters.bytes_up,
                connections=clock.counters.connections,
                cpu_s=clock.cpu_s,
                proxy_cpu_s=clock.counters.cpu_s,
                requests=facts.requests,
                checks=facts.checks,
                error=error,
                report=facts.report,
                timing=facts.timing,
                at_s=time.monotonic() - self._began,
                arrival_s=tuple(at for at, _ in arrivals),
                arrival_bytes=tuple(size for _, size in arrivals),
                last_output_s=result.last_output_s,
            )
        )

    def _make_cold(self, subject: Subject, system: System, line: Distance, deadline_s: float) -> None:
        system.wipe(subject)
        self._place.drop_page_cache()
        if self._blocks.tools_warm:
            self._unmeasured(system, self._rehearsal, system.rehearsal(self._rehearsal), deadline_s)
        warm_up = system.warm_up(subject, line.port)
        if warm_up is not None:
            self._unmeasured(system, subject, warm_up, deadline_s)
        line.reset()

    def _unmeasured(self, system: System, subject: Subject, launch: Launch, deadline_s: float) -> None:
        """A start whose time does not matter, but which has to work."""
        result = start(
            launch.argv,
            subject.spec.probe,
            environment=launch.environment,
            deadline_s=deadline_s,
            log=self._log,
        )
        system.finish(subject)
        if result.outcome != "ok":
            said = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise Unavailable(f"{system.name} cannot start {subject.name}: {result.error}; {'; '.join(said)}")

    def _keep_log(self, subject: Subject, system: System, network: Network, block: int, output: bytes) -> None:
        directory = self._output / "output"
        directory.mkdir(exist_ok=True)
        name = f"{subject.name}.{system.name}.{network.name}.{block}.log"
        (directory / name).write_bytes(output + self._log.read_bytes())


def run_blocks(
    place: Workplace,
    blocks: Blocks,
    rehearsal: Subject,
    writer: ResultWriter,
    output: Path,
    *,
    began: float,
    report: Reporter = silent,
) -> None:
    """Measure everything. Blocks.

    Args:
        place: with servers that run, and variants that are made.
        blocks: what.
        rehearsal: a tiny image.
        writer: takes the events.
        output: directory of the results, for logs of what failed.
        began: :func:`time.monotonic` of the beginning of the bench.
        report: progress.

    Raises:
        Unavailable: a line is not as long as it should be, or a system does not even start the tiny image.
        UsageError: a port is taken.
    """
    runner = _Runner(place, blocks, rehearsal, writer, output, began)
    order = random.Random(blocks.seed)
    pairs = [(subject, network) for network in blocks.networks for subject in blocks.subjects]
    total, done = sum(blocks.count(*pair) for pair in pairs), 0
    for network in blocks.networks:
        writer.write(_checked(network, began))
        with distance(network, place.registry) as line:
            for number in range(max(blocks.count(subject, network) for subject in blocks.subjects)):
                for subject in blocks.subjects:
                    if number < blocks.count(subject, network):
                        runner.block(subject, network, line, number, order)
                        done += 1
                        report(Progress("bench", network.name, done, total, "blocks"))
            for subject in blocks.subjects:
                if subject.name in blocks.timed:
                    runner.timed(subject, network, line)


def _checked(network: Network, began: float) -> NetworkEvent:
    for left in reversed(range(_CHECKS)):
        try:
            return check_network(network, time.monotonic() - began)
        except Unavailable:
            if not left:
                raise
            time.sleep(_CHECK_PAUSE_S)
    raise AssertionError("the last try returns or raises")


def _thinned(counters: Counters, began: float) -> list[tuple[float, int]]:
    arrivals = [(round(at - began, 4), size) for at, size in counters.arrivals]
    step = max(1, -(-len(arrivals) // _MAX_ARRIVALS))
    return arrivals[::-1][::step][::-1]
