"""Running, timing and printing: what all sections share.

Figures that are compared come from runs that take turns within a minute or so, each contender first once in a
while, and are medians; ratios are medians of the ratios of each turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from servers import VENEER

__all__ = ["MIN_TURNS", "Bench", "Usage", "drop_page_cache", "timed", "turns", "usage"]

#: Turns of short measurements, which differ by a few percent only.
MIN_TURNS = 7


@dataclass(frozen=True)
class Row:
    """One figure; the ratio to what it is compared with, if it is; and what it or the ratio should be."""

    section: str
    measure: str
    subject: str
    value: float
    unit: str
    ratio: float | None = None
    aim: str = ""
    met: bool | None = None


@dataclass
class Bench:
    """Where the measuring happens, and what came out.

    Args:
        directory: for everything that is made; on a local file system.
        runs: of each long measurement.
        backends: that are measured.
        stack: what is to be ended when all is measured.
    """

    directory: Path
    runs: int
    backends: tuple[str, ...]
    stack: ExitStack
    rows: list[Row] = field(default_factory=list)

    def report(
        self,
        section: str,
        measure: str,
        value: float,
        unit: str,
        *,
        subject: str = "",
        ratio: float | None = None,
        most: float | None = None,
        least: float | None = None,
    ) -> None:
        """Print one figure and keep it. An aim is meant for the ratio when there is one."""
        judged = value if ratio is None else ratio
        aim, met = "", None
        if most is not None:
            aim, met = f"<= {most:g}", judged <= most
        elif least is not None:
            aim, met = f">= {least:g}", judged >= least
        self.rows.append(Row(section, measure, subject, value, unit, ratio, aim, met))
        digits = 0 if value >= 100 else 1 if value >= 10 else 3
        compared = "" if ratio is None else f"{ratio:.3f} x"
        verdict = f"{aim} {'met' if met else 'NOT MET'}" if aim else ""
        line = f"{section:8} {measure:58} {subject:20} {value:11,.{digits}f} {unit:5} {compared:>9}  {verdict}"
        print(line.rstrip(), flush=True)

    def to_json(self) -> str:
        """All figures."""
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    def environment(self, cache: str) -> dict[str, str]:
        """Of a veneer command with a cache of its own."""
        # Modules are compiled once, as they are where veneer is installed.
        own = {
            "PYTHONDONTWRITEBYTECODE": "",
            "VENEER_CACHE_DIR": f"{self.directory}/{cache}",
            "VENEER_RUN_DIR": f"{self.directory}/run",
        }
        return os.environ | own

    def veneer(self, *arguments: str | Path, cache: str) -> "Usage":
        """Run a veneer command to its end."""
        return usage([VENEER, *arguments], self.environment(cache))

    def json(self, *arguments: str | Path, cache: str) -> Any:
        """What a veneer command with ``--json`` printed."""
        return json.loads(self.veneer(*arguments, cache=cache).output)


@dataclass(frozen=True)
class Usage:
    """What a process gave and took: its output, seconds of wall clock, and peak memory in MiB."""

    output: str
    seconds: float
    peak_mib: float


def usage(argv: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a process to its end; it must succeed."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(argv, stdout=output, stderr=errors, env=environment)
        _, status, resources = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{[*map(str, argv)]} failed: {errors.read().decode()}")
        output.seek(0)
        return Usage(output.read().decode(), seconds, resources.ru_maxrss / 1024)


def timed(function: Callable[[], object], runs: int) -> float:
    """Median seconds of a call."""
    return statistics.median(_seconds(function) for _ in range(runs))


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def turns(
    functions: Mapping[str, Callable[[], object]], count: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of calls that take turns, by name. Another one is first in each turn; ``before`` is not timed."""
    figures: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(count):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before()
            figures[name].append(_seconds(functions[name]))
    return figures


def drop_page_cache() -> None:
    """Forget all file contents and names that the kernel has cached."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
