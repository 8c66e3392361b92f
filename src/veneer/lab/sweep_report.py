"""A sweep as a table for a terminal, and as tables and curves for a report."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from veneer.draw.charts import Curve, draw_curves
from veneer.draw.scale import bytes_text, number_text
from veneer.draw.svg import Drawing
from veneer.lab.page import Cell, Page
from veneer.lab.sweep_record import Sweep, Trial, read_sweep

__all__ = ["add_sweep", "sweep_rows"]

#: Colour of each network's curve.
_LOOKS = (0, 1, 2, 3, 5, 8)
#: Groups whose values are bytes, and are drawn on a logarithmic axis.
_OF_BYTES = ("frame size", "small files", "pack span size", "pack grain")


def sweep_rows(sweep: Sweep, group: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one group; the first columns are words, the default is marked."""
    names = [network.name for network in sweep.networks]
    heading = [
        group,
        "spans",
        "plain MB",
        "stored MB",
        "of plain",
        "compress MB/s",
        "decode MB/s",
        *(f"{what}, {name}" for name in names[:1] for what in ("requests", "MB")),
        *(f"wait s, {name}" for name in names),
    ]
    rows = []
    for trial in sweep.groups[group]:
        start = trial.starts[names[0]] if names else {}
        speed = trial.size / 1e6 / trial.compress_s if trial.compress_s else 0.0
        decode = trial.decoded / 1e6 / trial.decode_s if trial.decode_s else 0.0
        rows.append(
            [
                f"{trial.name} (default)" if trial.default else trial.name,
                f"{trial.spans:,}",
                f"{trial.size / 1e6:.1f}",
                ("~" if trial.sampled < 1 else "") + f"{trial.stored / 1e6:.2f}",
                f"{100 * trial.stored / trial.size:.1f} %" if trial.size else "",
                number_text(speed),
                number_text(decode),
                *([number_text(start["requests"]), f"{start['bytes'] / 1e6:.2f}"] if start else []),
                *(f"{trial.starts[name]['wait_s']:.3f}" for name in names),
            ]
        )
    return heading, rows


def add_sweep(page: Page, path: Path) -> None:
    """Add a sweep that is in a file. Raises what reading it does."""
    sweep = read_sweep(path)
    page.heading(f"{sweep.image}, workload {sweep.workload}")
    page.paragraph(
        f"{sweep.uses} ranges, {bytes_text(sweep.needed)} needed of {bytes_text(sweep.size)}; the program "
        f"itself takes {number_text(sweep.think_s)} s. Sizes and processor times are measured, waits are "
        f"computed for a start that reads the recorded trace. {sweep.began}, {sweep.machine}, "
        f"commit {sweep.commit or 'none'}."
    )
    command = shlex.join(sweep.command)
    page.begin("grid")
    for group, trials in sweep.groups.items():
        if len([trial for trial in trials if trial.value is not None]) > 2:
            page.figure(_waits(sweep, group, trials), "", command)
            page.figure(_sizes(group, trials), "", command)
    page.end("grid")
    for group in sweep.groups:
        heading, rows = sweep_rows(sweep, group)
        cells: list[list[object]] = [
            [Cell(row[0], "met") if "(default)" in row[0] else row[0], *row[1:]] for row in rows
        ]
        page.table(heading, cells, fold=f"{group}: figures")


def _waits(sweep: Sweep, group: str, trials: Sequence[Trial]) -> Drawing:
    curves = [
        Curve(
            network.name,
            _LOOKS[number % len(_LOOKS)],
            tuple((t.value, t.starts[network.name]["wait_s"]) for t in trials if t.value is not None),
        )
        for number, network in enumerate(sweep.networks)
    ]
    of_bytes = group in _OF_BYTES
    title = f"{group}: seconds that a start waits"
    return draw_curves(title, curves, group, "s", log_x=of_bytes, bytes_x=of_bytes)


def _sizes(group: str, trials: Sequence[Trial]) -> Drawing:
    points = tuple((t.value, t.stored / 1e6) for t in trials if t.value is not None)
    fetched = tuple((t.value, _first(t) / 1e6) for t in trials if t.value is not None)
    curves = [Curve("stored", 7, points)]
    if fetched != points:
        curves.append(Curve("fetched by the start", 4, fetched))
    of_bytes = group in _OF_BYTES
    return draw_curves(f"{group}: megabytes", curves, group, "MB", log_x=of_bytes, bytes_x=of_bytes)


def _first(trial: Trial) -> float:
    return next((start["bytes"] for start in trial.starts.values()), 0.0)
