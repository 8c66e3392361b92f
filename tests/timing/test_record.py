"""Timing records as documents: what is written is read, what is not one is refused, zero can be moved."""

import json
import math
from typing import Any

import pytest

from tests.timing.records import a_record
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.timing import RangeLog, Timing
from veneer.timing.gather import record_of
from veneer.timing.record import TimedDevice, TimingRecord


def document() -> dict[str, Any]:
    return json.loads(json.dumps(a_record().to_json()))  # type: ignore[no-any-return]


def test_what_is_written_is_read() -> None:
    record = a_record()
    assert TimingRecord.parse(json.dumps(record.to_json()).encode()) == record
    assert document()["bytes_fetched"] == 6 << 20


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("image",), 1),
        (("zero_s",), "1"),
        (("zero_s",), 1e300),
        (("zero_s",), True),
        (("ranges",), {}),
        (("ranges", 0), []),
        (("ranges", 0, "device"), 2),
        (("ranges", 0, "device"), -1),
        (("ranges", 0, "length"), 1.5),
        (("ranges", 0, "sent"), None),
        (("ranges", 0, "error"), 5),
        (("reads", 0), [1, 2]),
        (("reads", 0, 1), 9),
        (("reads", 0, 4), None),
        (("phases", 0, "name"), None),
        (("marks", 0, "at"), "soon"),
        (("devices", 0, "size"), 1 << 60),
        (("command",), "python3"),
    ],
)
def test_what_is_no_record_is_refused(path: tuple[Any, ...], value: object) -> None:
    changed = document()
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(IntegrityError):
        TimingRecord.parse(json.dumps(changed).encode())


def test_a_member_that_is_missing_and_another_version_are_refused() -> None:
    changed = document()
    del changed["devices"]
    with pytest.raises(IntegrityError, match="devices is missing"):
        TimingRecord.from_json(changed)
    with pytest.raises(UnsupportedFormat):
        TimingRecord.from_json(document() | {"mediaType": "application/vnd.veneer.timing.v2+json"})


def test_a_record_gets_what_the_command_line_knows_on_the_same_axis() -> None:
    served, log = Timing(), RangeLog()
    served.began = 100.0
    served.add("resolve", 100.010, 100.020)
    one = log.of("a").sent(5, 6, (7, 8), spans=1, priority="demand", queued=100.030)
    one.sent, one.last_byte = 100.031, 100.040
    devices = {"a": TimedDevice("sha256:00", "layer", 100, 50)}
    record = record_of(served, log, devices, image="app", digest="sha256:11", backend="fuse")
    assert [(phase.name, phase.began, phase.ended) for phase in record.phases] == [("resolve", 10.0, 20.0)]

    asked = Timing()
    asked.began = 99.5
    asked.add("ask", 99.9, 100.1)
    asked.mark("end", 101.0)
    whole = record.with_command(asked, ("true",))
    assert [(phase.name, phase.began, phase.ended) for phase in whole.phases] == [
        ("ask", 400.0, 600.0),
        ("resolve", 510.0, 520.0),
    ]
    assert (whole.ranges[0].sent, whole.ranges[0].last_byte, whole.ranges[0].ready) == (531.0, 540.0, None)
    assert (whole.mark("end"), whole.mark("first output"), whole.lasted("resolve")) == (1500.0, None, 10.0)
    assert whole.end == 1500.0
    assert math.isclose(whole.zero_s, 99.5)


def test_a_phase_is_noted_also_when_it_fails() -> None:
    timing = Timing()
    with pytest.raises(OSError), timing.phase("resolve"):
        raise OSError
    (phase,) = timing.phases
    assert phase.name == "resolve"
    assert phase.ended is not None
