"""The report of a result directory: one page with everything that a reader needs to judge and to repeat it.

Every number on the page comes from the events; figures that are computed come from
:mod:`veneer.lab.summary`, as the bench itself prints them. Nothing is left out: runs that failed are listed.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from veneer.draw.scale import bytes_text, number_text
from veneer.lab import report_text
from veneer.lab.page import Cell, Page
from veneer.lab.records import NetworkEvent, SystemEvent
from veneer.lab.report_figures import Figures
from veneer.lab.report_tables import (
    Results,
    add_environment,
    add_failures,
    add_images,
    add_limits,
    known,
)
from veneer.lab.statistics import Ratio
from veneer.lab.summary import AGAIN_AIM, Again, Row
from veneer.lab.sweep_report import add_sweep

__all__ = ["make_report"]


def make_report(directory: Path, *, sweeps: Sequence[Path] = ()) -> str:
    """The page, as HTML.

    Args:
        directory: results of ``veneer lab bench``.
        sweeps: results of ``veneer lab sweep`` to show as well.

    Raises:
        NotFound: there are no results.
        IntegrityError: they are damaged.
        UnsupportedFormat: they are of another version.
    """
    return _Report(directory, sweeps).make()


class _Report:
    def __init__(self, directory: Path, sweeps: Sequence[Path]) -> None:
        results = self.results = Results.read(directory)
        self.environment, self.events, self.summary = results.environment, results.events, results.summary
        self.sweeps = sweeps
        self.figures = Figures(results.environment, results.events, results.summary)
        images, networks = len(self.environment.images), len(self.environment.networks)
        self.page = Page(
            "Cold starts, measured",
            f"{_count(images, 'image')}, {_count(len(self.environment.systems), 'system')}, "
            f"{_count(networks, 'distance')} to the registry; "
            f"{_count(sum(run.block >= 0 for run in self.results.runs), 'start')}, "
            f"of which {self.summary.failures} failed.",
        )

    def make(self) -> str:
        self._facts()
        self._short()
        for network in self.environment.networks:
            self._network(network.name)
        self._distance()
        self._bytes()
        self._starts()
        add_limits(self.page, self.results)
        add_images(self.page, self.results)
        self._sweeps()
        add_failures(self.page, self.results)
        add_environment(self.page, self.results)
        return self.page.render()

    def _facts(self) -> None:
        environment, machine = self.environment, self.environment.machine
        blocks = ", ".join(f"{name}: {count}" for name, count in environment.blocks.items())
        commit = environment.commit or "not from a checkout"
        self.page.facts(
            [
                ("measured", environment.began),
                ("commit", commit + (", with changes on top" if environment.modified else "")),
                ("machine", f"{machine.cpu}, {_count(machine.cpus, 'CPU')}, {bytes_text(machine.memory)}"),
                ("kernel", f"{machine.kernel} ({machine.architecture})"),
                ("file system", machine.file_system),
                ("blocks, randomized and complete", f"{blocks}; seed {environment.seed}"),
            ]
        )

    # In short

    def _short(self) -> None:
        page, reference = self.page, self.summary.reference
        page.section("short", "In short", report_text.SHORT)
        aimed = [row for row in self.summary.rows if row.aim is not None and row.ratio is not None]
        if aimed:
            page.heading(f"Aims, as a part of {reference}")
            page.table(
                ["system", "image", "distance", "ratio", "95 %", "pairs", "aim", ""],
                [self._aim(row) for row in sorted(aimed, key=self._place)],
                words=3,
            )
        if self.summary.again:
            page.heading("Started again, as a part of local-warm")
            page.paragraph(report_text.AGAIN)
            page.table(
                ["system", "image", "distance", "ratio", "95 %", "pairs", "with cleaning up", "aim", ""],
                [self._again(one) for one in self.summary.again],
                words=3,
            )
        if self.summary.overall:
            networks = [network.name for network in self.environment.networks]
            by = {(network, system): ratio for network, system, ratio in self.summary.overall}
            systems = [one for one in self.environment.systems if any((n, one) in by for n in networks)]
            page.heading(f"All images together: geometric mean of the ratios to {reference}")
            page.table(
                ["system", *networks],
                [[self._name(one), *(known(by.get((n, one))) for n in networks)] for one in systems],
            )
        worst = [row for row in self.summary.rows if row.ratio is not None and row.system != reference]
        for row in sorted(worst, key=lambda one: -_median(one))[:1]:
            page.paragraph(
                f"Slowest of all against {reference}: {row.system} on {row.image} at {row.network}, "
                f"ratio {number_text(_median(row))}."
            )

    def _aim(self, row: Row) -> list[object]:
        assert row.ratio is not None
        assert row.aim is not None
        return [
            self._name(row.system),
            row.image,
            row.network,
            number_text(row.ratio.median),
            _interval(row.ratio.count, *row.ratio.median_interval),
            row.ratio.count,
            number_text(row.aim),
            _verdict(row.ratio, row.aim),
        ]

    def _again(self, again: Again) -> list[object]:
        return [
            self._name(again.system),
            again.image,
            again.network,
            number_text(again.ready.median),
            _interval(again.ready.count, *again.ready.median_interval),
            again.ready.count,
            again.command and number_text(again.command.median),
            number_text(AGAIN_AIM),
            _verdict(again.ready, AGAIN_AIM),
        ]

    def _place(self, row: Row) -> tuple[int, int, int]:
        environment = self.environment
        networks = [network.name for network in environment.networks]
        return (
            environment.systems.index(row.system),
            environment.images.index(row.image),
            networks.index(row.network),
        )

    def _name(self, system: str) -> Cell:
        return Cell(system, f"s{self.figures.looks[system]}")

    # By network

    def _network(self, network: str) -> None:
        rows = [row for row in self.summary.rows if row.network == network]
        if not rows:
            return
        page = self.page
        page.section(f"network-{network}", f"At {network}", self._distance_text(network))
        if any(row.ratio for row in rows):
            page.figure(
                self.figures.ratios(network),
                "Median of the paired ratios with its 95 % interval.",
                self._repeat(networks=[network]),
                wide=True,
            )
        page.begin("grid")
        for image in self.environment.images:
            if (drawing := self.figures.distribution(image, network)) is not None:
                page.figure(drawing, "", self._repeat([image], [network]))
        page.end("grid")
        page.table(
            [
                "image",
                "system",
                "starts",
                "median s",
                "95 %",
                "p90",
                "ratio",
                "95 %",
                "limit x",
                "MB",
                "requests",
            ],
            [self._row(row) for row in rows],
            words=2,
            fold=f"all figures at {network}",
        )

    def _distance_text(self, network: str) -> str:
        for event in self.events:
            if isinstance(event, NetworkEvent) and event.name == network:
                return (
                    f"Emulated in user space; measured before use: {number_text(event.rtt_ms)} ms for a "
                    f"request on an open connection, {number_text(event.mbit)} Mb/s for one connection and "
                    f"{number_text(event.mbit_shared)} Mb/s for four together."
                )
        return ""

    def _row(self, row: Row) -> list[object]:
        seconds, ratio = row.seconds, row.ratio
        failed = f", {row.failures} failed" if row.failures else ""
        return [
            row.image,
            self._name(row.system),
            f"{seconds.count if seconds else 0}{failed}",
            seconds and number_text(seconds.median),
            seconds and _interval(seconds.count, seconds.low, seconds.high),
            seconds and number_text(seconds.p90),
            ratio and number_text(ratio.median),
            ratio and _interval(ratio.count, *ratio.median_interval),
            row.to_limit and number_text(row.to_limit),
            number_text(row.network_bytes / 1e6),
            None if row.requests is None else number_text(row.requests),
        ]

    def _repeat(self, images: Sequence[str] = (), networks: Sequence[str] = ()) -> str:
        """The command that measures a part again, and makes a report of it."""
        environment = self.environment
        names = list(networks) or [network.name for network in environment.networks]
        blocks = ",".join(str(environment.blocks[name]) for name in names)
        given = [
            (event.name, event.command)
            for event in self.events
            if isinstance(event, SystemEvent) and event.command is not None
        ]
        words = ["veneer", "lab", "bench", *(images or environment.images)]
        words += ["--systems", ",".join(environment.systems), "--networks", ",".join(names), "--blocks", blocks]
        words += ["--seed", str(environment.seed)]
        for name, command in given:
            words += ["--system", f"{name}={command}"]
        typed = environment.command
        for option in ("--tools", "--reset", "--timing"):
            words += [
                word for at, one in enumerate(typed[:-1]) if one == option for word in (option, typed[at + 1])
            ]
        words += ["-o", "again"]
        return f"{shlex.join(words)} && veneer lab report again -o again.html"

    # Across networks

    def _distance(self) -> None:
        images = [image for image in self.environment.images if self.figures.can_compare_distances(image)]
        if not images:
            return
        self.page.section("distance", "Time against distance", report_text.DISTANCE)
        self.page.begin("grid")
        for image in images:
            self.page.figure(self.figures.over_distance(image), "", self._repeat([image]))
        self.page.end("grid")

    def _bytes(self) -> None:
        pairs = [
            (image, network.name)
            for network in self.environment.networks
            for image in self.environment.images
            if self.figures.has_arrivals(image, network.name)
        ]
        if not pairs:
            return
        self.page.section("bytes", "Bytes over time", report_text.BYTES)
        self.page.begin("grid")
        for image, network in pairs:
            self.page.figure(
                self.figures.arrivals(image, network),
                self.figures.arrivals_text(image, network),
                self._repeat([image], [network]),
            )
        self.page.end("grid")

    # Single starts

    def _starts(self) -> None:
        starts = self.figures.timed
        if not starts:
            return
        self.page.section("starts", "Starts up close", report_text.STARTS)
        for number, (run, record) in enumerate(starts):
            title = f"{run.image}, {run.system}, {run.network}"
            seconds = f": {number_text(run.seconds)} s" if run.seconds is not None else ""
            self.page.begin("start", f"{title}{seconds}", shown=number == 0)
            again = self._repeat([run.image], [run.network])
            self.page.figure(self.figures.waterfall(title, record), "", again, wide=True)
            self.page.begin("grid")
            for drawing in self.figures.close_up(record):
                self.page.figure(drawing)
            self.page.end("grid")
            self.page.end("start")

    def _sweeps(self) -> None:
        if not self.sweeps:
            return
        self.page.section("sweep", "Sweeps")
        for path in self.sweeps:
            add_sweep(self.page, path)


def _verdict(ratio: Ratio, aim: float) -> Cell:
    word = "met" if ratio.median <= aim else "missed"
    return Cell(word, word)


def _interval(count: int, low: float, high: float) -> str | None:
    """An interval; one value has none."""
    return f"[{number_text(low)}, {number_text(high)}]" if count > 1 else None


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _median(row: Row) -> float:
    return row.ratio.median if row.ratio else 0.0
