"""The report of made-up results: well-formed, self-contained, and with the figures that the events have."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.cli.invoking import invoke
from tests.lab.results import LINES, SYSTEMS, write_results
from tests.timing.records import HOSTILE
from veneer.draw.charts import Bar, Curve, draw_bars, draw_bytes, draw_curves, draw_places, touched
from veneer.draw.scale import number_text
from veneer.errors import IntegrityError, NotFound
from veneer.lab.page import Page
from veneer.lab.report import make_report
from veneer.lab.summary import summarize

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results") / "r"
    write_results(directory, blocks=3)
    return directory


@pytest.fixture(scope="module")
def page(results: Path) -> str:
    return make_report(results)


def parsed(page: str) -> ET.Element:
    first, _, rest = page.partition("\n")
    assert first == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def words(root: ET.Element) -> str:
    return "\n".join(root.itertext())


def test_it_is_well_formed_and_loads_and_runs_nothing(page: str) -> None:
    root = parsed(page)
    names = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "use", "image", "foreignObject"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert name != "src"
            assert name != "href" or value.startswith("#")
    text = page.replace("http://www.w3.org/2000/svg", "")
    for outside in ("http:", "https:", "url(", "@import", "javascript:"):
        assert outside not in text


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    write_results(tmp_path / "r", hostile=HOSTILE.replace("\ud800", ""), blocks=1)
    root = parsed(make_report(tmp_path / "r"))
    assert not list(root.iter("script"))
    assert "<script>alert(1)</script>" in words(root)


def test_links_of_the_contents_lead_somewhere(page: str) -> None:
    root = parsed(page)
    targets = {element.get("id") for element in root.iter() if element.get("id")}
    links = [(element.get("href") or "").removeprefix("#") for element in root.iter("a")]
    assert len(links) > 6
    assert set(links) <= targets


def test_it_says_where_when_and_how_it_was_measured(page: str) -> None:
    text = words(parsed(page))
    for fact in (
        "2026-11-26T10:00:00Z",
        "0123456789abcdef0123456789abcdef01234567",
        "A processor, 2 CPUs, 24 GiB",
        "6.18.44",
        "0ms: 3, 10ms-1gbit: 3, 50ms-100mbit: 3; seed 1",
        "veneer lab bench python redis --blocks 3 -o results",
        "did not end",
    ):
        assert fact in text


def test_numbers_are_those_of_the_summary(page: str, results: Path) -> None:
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in parsed(page).iter("tr")]
    summary = summarize(results)
    assert len(summary.rows) == 2 * len(LINES) * len(SYSTEMS)
    for row in summary.rows:
        assert row.seconds is not None
        seconds = number_text(row.seconds.median)
        found = [cells for cells in rows if cells[:2] == [row.image, row.system] and cells[3:4] == [seconds]]
        assert found, (row.image, row.system, row.network)
        if row.ratio is not None:
            assert any(cells[6] == number_text(row.ratio.median) for cells in found)
    aimed = [row for row in summary.rows if row.aim is not None and row.ratio is not None]
    for row in aimed:
        assert row.ratio is not None
        verdict = "met" if row.ratio.median <= (row.aim or 0) else "missed"
        wanted = [row.system, row.image, row.network, number_text(row.ratio.median)]
        (line,) = (cells for cells in rows if cells[:4] == wanted)
        assert line[-1] == verdict


def test_every_figure_of_the_bench_can_be_repeated_by_its_command(page: str) -> None:
    figures = list(parsed(page).iter("figure"))
    commands = ["".join(element.itertext()) for figure in figures for element in figure.iter("pre")]
    drawings = [figure for figure in figures if not figure.findall(".//pre")]
    assert len(commands) > 20
    # What is below a waterfall is of the same start.
    assert all("of devices over time" in words(one) or "Places on" in words(one) for one in drawings)
    subset = next(
        command for command in commands if " bench python --" in command and "networks 10ms" in command
    )
    assert subset.startswith("veneer lab bench python --systems veneer-recorded,veneer-none,")
    assert " --networks 10ms-1gbit --blocks 3 --seed 1 -o again && " in subset
    assert subset.endswith(" && veneer lab report again -o again.html")


def test_waterfalls_are_of_runs_that_have_a_timing_record(page: str) -> None:
    root = parsed(page)
    starts = [element for element in root.iter("details") if element.get("class") == "start"]
    assert len(starts) == 2 * len(LINES) * 2
    assert [start.get("open") for start in starts].count("open") == 1
    assert "queued, not sent yet" in words(starts[0])


def test_what_is_no_result_is_refused(tmp_path: Path, results: Path) -> None:
    with pytest.raises(NotFound, match="has no environment"):
        make_report(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "environment.json").write_bytes((results / "environment.json").read_bytes())
    (copy / "events.jsonl").write_text('{"event":"run"}\n')
    with pytest.raises(IntegrityError):
        make_report(copy)


def test_the_command_writes_the_page(tmp_path: Path, results: Path) -> None:
    output = tmp_path / "page.html"
    done = invoke("lab", "report", str(results), "-o", str(output), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"report": str(output), "size": output.stat().st_size}
    assert parsed(output.read_text()).tag == "html"
    assert invoke("lab", "report", str(tmp_path / "nothing")).exit_code == 11


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", "one", 0, 0.2, 0.1, 0.3, 0.25), Bar("a", "two", 1, 0.4, 0.3, 0.5)]
    root = ET.fromstring(draw_bars("t", bars, reference="r").render())
    widths = {
        element.get("class"): float(element.get("width", "nan"))
        for element in root.iter(f"{SVG}rect")
        if element.get("class") in ("s0", "s1")
    }
    assert widths["s1"] == pytest.approx(2 * widths["s0"], rel=0.01)
    assert any(element.text == "0.2 ✓" for element in root.iter(f"{SVG}text"))


def test_points_lie_where_the_axis_says() -> None:
    curve = Curve("c", 0, ((1.0, 10.0), (10.0, 20.0), (100.0, 40.0)))
    root = ET.fromstring(draw_curves("t", [curve], "x", "y", log_x=True).render())
    dots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter(f"{SVG}circle")]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.05)
    assert dots[1][1] - dots[2][1] == pytest.approx(2 * (dots[0][1] - dots[1][1]), abs=0.05)


def test_waste_is_what_came_and_was_not_read() -> None:
    from tests.timing.records import a_range, a_record

    record = a_record(a_range(plain_length=1 << 20))
    assert touched(record) == [(200.5, 4096)]
    assert "layers 1 MiB, 4 KiB read, 100 % never so far" in draw_bytes("t", record).render()
    packed = a_record(a_range(device=1))
    assert "pack 9 MiB, reads not seen once it is there" in draw_bytes("t", packed).render()
    assert ET.fromstring(draw_places("t", record).render()).tag == f"{SVG}svg"


def test_a_page_that_is_not_closed_is_no_page() -> None:
    page = Page("t", "")
    page.begin("grid")
    with pytest.raises(ValueError, match="not ended"):
        page.render()
