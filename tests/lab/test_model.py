"""The model of a start: round trips, bandwidth and order, computed by hand."""

import math

import pytest

from veneer.lab.model import Cut, Line, Touch, model_demand, model_pack
from veneer.lab.records import Network
from veneer.oci.digest import Digest

LAYER = Digest.of(b"layer")
CUT = Cut([0, 100, 200, 300, 400], [50, 50, 50, 50])


def touch(offset: int, length: int = 10, think_s: float = 0.0) -> Touch:
    return Touch(think_s, LAYER, offset, length)


def exact(touch: Touch) -> tuple[int, int]:
    return touch.offset, touch.offset + touch.length


def test_spans_of_a_range() -> None:
    assert [*CUT.covering(0, 100)] == [0]
    assert [*CUT.covering(99, 101)] == [0, 1]
    assert [*CUT.covering(300, 400)] == [3]
    with pytest.raises(ValueError, match="one more boundary"):
        Cut([0, 1], [1, 2])


def test_a_line_is_that_of_a_network() -> None:
    assert Line.of(Network("x", 10, 100)) == Line(0.01, 12.5e6)
    assert Line.of(Network("x", 0, 0)) == Line(0.0, math.inf)


def test_each_miss_costs_a_round_trip_and_its_bytes() -> None:
    start = model_demand([touch(0), touch(210), touch(5)], {LAYER: CUT}, Line(1.0, 100.0), window=exact)
    assert (start.requests, start.bytes, start.waits) == (2, 100, 2)
    assert start.seconds == start.wait_s == pytest.approx(2 * (1.0 + 0.5))


def test_a_window_saves_requests_and_costs_bytes_that_are_waited_for_only_when_needed() -> None:
    touches = [touch(110), touch(10, think_s=10.0), touch(210)]
    start = model_demand(touches, {LAYER: CUT}, Line(1.0, 100.0), window=lambda _: (0, 400))
    assert (start.requests, start.bytes) == (1, 200)
    # What the reader asked for comes first; all the rest is there after its pause.
    assert start.wait_s == pytest.approx(1.5)
    assert start.seconds == pytest.approx(11.5)


def test_a_miss_brings_neighbours_along_on_both_sides() -> None:
    touches = [touch(110), touch(210), touch(10), touch(310)]
    start = model_demand(touches, {LAYER: CUT}, Line(1.0, math.inf), window=exact, reach=(50, 99))
    assert (start.requests, start.bytes) == (2, 200)
    # What comes in the 13 ms in which 1280 KiB are verified, and in 50 ms besides.
    assert Line(0.0, 12.5e6).reach == (20_480, 163_840)
    assert Line(0.05, 12.5e6).reach == (98_605, 788_840)
    assert Line(0.05, 1e12).reach[1] == 4 << 20


def test_a_read_of_what_is_under_way_waits_for_the_rest_of_it() -> None:
    touches = [touch(0), touch(310)]
    start = model_demand(touches, {LAYER: CUT}, Line(1.0, 100.0), window=lambda _: (0, 400))
    assert (start.requests, start.waits) == (1, 2)
    assert start.seconds == pytest.approx(1.0 + 200 / 100)


def test_a_request_queues_behind_what_fills_the_line() -> None:
    windows = {0: (0, 300), 310: (310, 320)}
    touches = [touch(0), touch(310)]
    start = model_demand(touches, {LAYER: CUT}, Line(0.5, 100.0), window=lambda one: windows[one.offset])
    # The second is asked for at 1.0 and could come at 1.5; the first still arrives until 2.0.
    assert start.seconds == pytest.approx(0.5 + 150 / 100 + 50 / 100)


def test_a_pack_is_one_round_trip_and_comes_in_its_order() -> None:
    touches = [touch(0), touch(0, think_s=0.25), touch(0)]
    start = model_pack(touches, [[0], [1], []], [100, 100, 100], Line(1.0, 100.0), request_size=150)
    assert (start.requests, start.bytes) == (2, 300)
    assert start.seconds == pytest.approx(1.0 + 2.0)
    assert start.wait_s == pytest.approx(2.0 + 0.75)


def test_decoding_is_waited_for() -> None:
    start = model_pack([touch(0)], [[1]], [100, 100], Line(0.0, math.inf), request_size=1, decode_s=0.01)
    assert start.seconds == pytest.approx(2.0)
    start = model_demand([touch(0)], {LAYER: CUT}, Line(0.0, math.inf), window=exact, decode_s=0.01)
    assert start.seconds == pytest.approx(0.5)
