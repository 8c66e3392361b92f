"""Second starts next to local ones: what is compared is the same event for both."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.test_records import ENVIRONMENT, RUN
from veneer.cli.lab_bench import summary_text
from veneer.lab.records import Network, ResultWriter, RunEvent
from veneer.lab.report import make_report
from veneer.lab.summary import Summary, summarize

LINE = Network("0ms", 0, 0)
SYSTEMS = ("veneer-recorded", "veneer-warm", "veneer-warm-always", "local-warm")


def run(
    image: str, system: str, block: int, seconds: float | None, last_output_s: float | None = None
) -> RunEvent:
    outcome = "failed" if seconds is None else "ok"
    named = replace(RUN, image=image, system=system, network=LINE.name, block=block)
    return replace(named, seconds=seconds, outcome=outcome, last_output_s=last_output_s)


def results(directory: Path) -> Path:
    environment = replace(
        ENVIRONMENT, networks=(LINE,), images=("base", "redis"), systems=SYSTEMS, blocks={LINE.name: 3}
    )
    with ResultWriter(directory, environment) as writer:
        for block, slow in enumerate((1.0, 2.0, 1.5)):
            writer.write(run("base", "local-warm", block, 0.10 * slow, 0.05 * slow))
            # It writes last when 10 % more have passed, and takes as long again to clean up.
            writer.write(run("base", "veneer-warm", block, 0.20 * slow, 0.055 * slow))
            writer.write(run("base", "veneer-recorded", block, 0.50 * slow, 0.45 * slow))
            writer.write(run("redis", "local-warm", block, 0.10 * slow))
            writer.write(run("redis", "veneer-warm-always", block, 0.13 * slow))
        # What failed has no time, however much it wrote.
        writer.write(run("base", "local-warm", 3, 0.1, 0.05))
        writer.write(run("base", "veneer-warm", 3, None, 0.5))
    return directory


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return summarize(results(tmp_path / "r"))


def test_a_program_is_compared_at_its_end_and_a_server_at_its_first_answer(summary: Summary) -> None:
    found = {(one.image, one.system): one for one in summary.again}
    assert set(found) == {("base", "veneer-warm"), ("redis", "veneer-warm-always")}
    program, server = found["base", "veneer-warm"], found["redis", "veneer-warm-always"]
    assert program.ready.count == 3
    assert program.ready.median == pytest.approx(1.1)
    assert program.command is not None
    assert program.command.median == pytest.approx(2.0)
    assert server.ready.median == pytest.approx(1.3)
    assert server.command is None


def test_the_table_and_the_report_say_which_starts_were_within_the_aim(
    summary: Summary, tmp_path: Path
) -> None:
    rows = [line.split() for line in summary_text(summary).splitlines()]
    again = ["0ms", "veneer-warm", "3", "1.100", "1.100-1.100", "2.000", "1.15"]
    assert ["base", *again] in rows
    page = make_report(tmp_path / "r")
    shown = page[page.index("Started again") :]
    assert shown.index(">met<") < shown.index(">missed<")
