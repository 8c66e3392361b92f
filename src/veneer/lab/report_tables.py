"""The parts of a report that are tables of what the bench noted, without anything computed."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from veneer.draw.scale import bytes_text, number_text
from veneer.lab import report_text
from veneer.lab.page import Page
from veneer.lab.records import (
    Environment,
    Event,
    ImageEvent,
    LimitEvent,
    RunEvent,
    SetupEvent,
    SystemEvent,
    read_environment,
    read_events,
)
from veneer.lab.summary import Summary, summarize

__all__ = ["Results", "add_environment", "add_failures", "add_images", "add_limits", "known"]

#: Runs that failed that are listed one by one.
_MOST_FAILURES = 50


@dataclass(frozen=True, slots=True)
class Results:
    """A result directory.

    Args:
        directory: where it is.
        environment: of the bench.
        events: all of them.
        summary: computed from them.
    """

    directory: Path
    environment: Environment
    events: Sequence[Event]
    summary: Summary

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read one. Raises NotFound, IntegrityError, UnsupportedFormat."""
        return cls(directory, read_environment(directory), [*read_events(directory)], summarize(directory))

    @property
    def runs(self) -> list[RunEvent]:
        """All starts."""
        return [event for event in self.events if isinstance(event, RunEvent)]


def known(value: float | None) -> str | None:
    """A number for a cell, if it is known."""
    return None if value is None else number_text(value)


def add_limits(page: Page, results: Results) -> None:
    """What the model says that starts take at least."""
    limits = [event for event in results.events if isinstance(event, LimitEvent)]
    if not limits:
        return
    page.section("limits", "The limit of the model", report_text.LIMITS)
    by = {(row.image, row.network): row for row in results.summary.rows if row.system == "veneer-recorded"}
    page.table(
        ["image", "distance", "round trips", "needed", "warm run s", "limit s", "recorded / limit"],
        [
            [
                limit.image,
                limit.network,
                limit.round_trips,
                bytes_text(limit.needed_bytes),
                number_text(limit.warm_run_s),
                number_text(limit.seconds),
                known(found.to_limit) if (found := by.get((limit.image, limit.network))) is not None else None,
            ]
            for limit in limits
        ],
        words=2,
    )


def add_images(page: Page, results: Results) -> None:
    """The images, and what was made of them."""
    images = [event for event in results.events if isinstance(event, ImageEvent)]
    setups = [event for event in results.events if isinstance(event, SetupEvent)]
    page.section("images", "Images, and what was made of them")
    page.table(
        ["image", "command", "ready", "layers", "stored", "size"],
        [
            [
                one.name,
                _short(shlex.join(one.command)),
                one.probe,
                one.layers,
                bytes_text(one.stored),
                bytes_text(one.size),
            ]
            for one in images
        ],
        words=3,
    )
    page.table(
        ["image", "step", "facts", "seconds"],
        [[one.image, one.step, _facts_text(one.facts), number_text(one.seconds)] for one in setups],
        words=3,
        fold="what was made, once and before anything was measured",
    )


def add_failures(page: Page, results: Results) -> None:
    """Runs that have no time."""
    failed = [run for run in results.runs if run.outcome != "ok"]
    if not failed:
        return
    page.section("failures", "Starts that failed", report_text.FAILURES)
    page.table(
        ["image", "system", "distance", "block", "outcome", "why"],
        [
            [run.image, run.system, run.network, str(run.block), run.outcome, _short(run.error or "")]
            for run in failed[:_MOST_FAILURES]
        ],
        words=6,
    )


def add_environment(page: Page, results: Results) -> None:
    """How to repeat it, and where it was measured."""
    environment, machine = results.environment, results.environment.machine
    page.section("repeat", "Repeat it", report_text.REPEAT)
    directory = str(results.directory)
    page.commands(
        shlex.join(environment.command),
        shlex.join(["veneer", "lab", "bench", "--again", directory, "-o", "again"]),
        shlex.join(["veneer", "lab", "report", directory, "-o", "report.html"]),
    )
    settings: Mapping[str, str] = {
        **machine.settings,
        "read_ahead_kb": str(machine.read_ahead_kb),
        "working directory": environment.working_directory,
        **environment.variables,
    }
    page.table(["program", "version"], [*environment.versions.items()], words=2, fold="versions")
    page.table(["setting", "value"], [*settings.items()], words=2, fold="settings and variables")
    page.table(
        ["system", "what it is", "command"],
        [[one.name, one.about, one.command] for one in results.events if isinstance(one, SystemEvent)],
        words=3,
        fold="systems",
    )


def _facts_text(facts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,.15g}" for name, value in facts.items())


def _short(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
