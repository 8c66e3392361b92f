"""Drawings are well-formed whatever the names are, and say what the data say."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tests.timing.records import HOSTILE, a_range, a_record
from veneer.draw.scale import Scale, bytes_text, ms_text, number_text
from veneer.draw.svg import Drawing
from veneer.draw.waterfall import MOST_ROWS, draw_waterfall
from veneer.timing.record import TimingRecord

SVG = "{http://www.w3.org/2000/svg}"


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def boxes(root: ET.Element, look: str) -> list[tuple[float, float]]:
    """Where the bars of a look begin, and how wide they are; without those of the legend."""
    found = [e for e in root.iter(f"{SVG}rect") if e.get("class") == look and e.find(f"{SVG}title") is not None]
    return [(float(e.get("x", "nan")), float(e.get("width", "nan"))) for e in found]


def drawn(record: TimingRecord) -> ET.Element:
    return ET.fromstring(draw_waterfall(record).render())


def test_a_waterfall_says_what_the_record_says() -> None:
    shown = texts(drawn(a_record()))
    for expected in (
        "localhost:5000/app:1",
        "python3 -c print(1)",
        "resolve",
        "51.1 ms",
        "goes on",
        "mounted 95 ms",
        "end 250 ms",
        "3 MiB at 4 KiB",
        "layer 1",
        "pack",
        "it broke",
        "1 of 2",
    ):
        assert expected in shown
    assert any("2 range requests, 6 MiB" in text for text in shown)


def test_segments_are_as_long_as_what_they_stand_for() -> None:
    root = drawn(a_record(a_range()))
    ((queue, queued),) = boxes(root, "queue")
    ((wait, waited),) = boxes(root, "wait")
    ((transfer, transferred),) = boxes(root, "transfer")
    ((verify, verified),) = boxes(root, "verify")
    ms = queued / 10
    assert waited / ms == pytest.approx(50, rel=0.01)
    assert transferred / ms == pytest.approx(30, rel=0.01)
    assert verified / ms == pytest.approx(10, rel=0.02)
    assert (wait, transfer, verify) == pytest.approx(
        (queue + queued, wait + waited, transfer + transferred), abs=0.02
    )


def test_names_cannot_break_out() -> None:
    record = replace(a_record(a_range(error=HOSTILE)), image=HOSTILE, command=(HOSTILE,), backend=HOSTILE)
    root = drawn(record)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "style", "rect", "line", "path", "text", "circle"),
    }
    assert any("<script>" in text for text in texts(root))


@pytest.mark.parametrize("count", [0, 1, MOST_ROWS, MOST_ROWS + 1, 3000])
def test_any_number_of_requests_makes_a_drawing_of_bounded_height(count: int) -> None:
    ranges = tuple(
        a_range(queued=n, sent=n + 1.0, first_byte=n + 2.0, last_byte=n + 3.0, ready=n + 4.0)
        for n in range(count)
    )
    root = drawn(replace(a_record(), ranges=ranges))
    assert len(boxes(root, "transfer")) == count
    assert float(root.get("height", "nan")) < 3000


def test_a_drawing_runs_nothing_and_loads_nothing() -> None:
    text = draw_waterfall(a_record()).render().replace("http://www.w3.org/2000/svg", "")
    for word in ("<script", "http", "url(", "@import", "href", "foreignObject", "onload"):
        assert word not in text


def test_a_drawing_for_a_page_has_no_style_of_its_own() -> None:
    assert "<style" not in draw_waterfall(a_record()).render(standalone=False)


def test_texts_are_escaped() -> None:
    drawing = Drawing(10, 10, HOSTILE)
    drawing.text(1, 2, HOSTILE, HOSTILE)
    drawing.rect(1, 2, 3, 4, HOSTILE, HOSTILE)
    root = ET.fromstring(drawing.render())
    assert len(list(root.iter(f"{SVG}text"))) == 1


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (0, 0.97, False, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3, 4, False, [-2, 0, 2, 4]),
        (1, 1000, True, [1, 3, 10, 30, 100, 300, 1000]),
        (2, 60, True, [2, 5, 10, 20, 50]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert Scale(low, high, 0, 100, log).ticks(5) == expected


def test_scales_go_both_ways() -> None:
    up = Scale(0, 10, 100, 0)
    assert (up(0), up(10), up(5)) == (100, 0, 50)
    ratio = Scale(1, 100, 0, 100, log=True)
    assert ratio(10) == pytest.approx(50)
    with pytest.raises(ValueError, match="no scale"):
        Scale(5, 5, 0, 1)


def test_numbers_have_three_digits_that_matter() -> None:
    assert [number_text(v) for v in (0, 0.04567, 1.234, 12.34, 123.4, 12345)] == [
        *("0", "0.0457", "1.23", "12.3", "123", "12,345"),
    ]
    assert [ms_text(v) for v in (0, 0.5, 12.34, 999, 1234)] == ["0", "0.5 ms", "12.3 ms", "999 ms", "1.23 s"]
    assert [bytes_text(v) for v in (0, 10, 1536, 3 << 20)] == ["0", "10 B", "1.5 KiB", "3 MiB"]
