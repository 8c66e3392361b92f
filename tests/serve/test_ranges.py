"""Range headers: against a naive reading of RFC 9110, and against whatever a client may send."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from veneer.serve.ranges import MAX_RANGES, ByteRange, Unsatisfiable, parse_range

SPEC = st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40))


def bytes_of(spec: tuple[int | None, int | None], data: bytes) -> bytes:
    first, last = spec
    if first is None:
        assert last is not None
        return data[-last:] if last else b""
    return data[first:] if last is None else data[first : last + 1]


@settings(deadline=None, max_examples=300)
@given(specs=st.lists(SPEC, min_size=1, max_size=4), total=st.integers(0, 30))
def test_ranges_select_the_bytes_the_rfc_says(specs: list[tuple[int | None, int | None]], total: int) -> None:
    data = bytes(range(total))
    header = "bytes=" + ", ".join(
        f"{'' if first is None else first}-{'' if last is None else last}" for first, last in specs
    )
    malformed = any(
        spec == (None, None) or (spec[0] is not None and spec[1] is not None and spec[1] < spec[0])
        for spec in specs
    )
    if malformed:
        assert parse_range(header, total) is None
        return
    expected = [part for spec in specs if (part := bytes_of(spec, data))]
    try:
        found = parse_range(header, total)
    except Unsatisfiable:
        assert expected == []
        return
    if found is None:  # refused as a burden
        assert sum(map(len, expected)) > 2 * total
        return
    assert [data[part.offset : part.offset + part.length] for part in found] == expected


@settings(deadline=None, max_examples=300)
@given(
    header=st.text(max_size=60) | st.from_regex(r"\A[bB]ytes ?=[-0-9, \t=;x]{0,40}\Z"),
    total=st.integers(0, 1 << 48),
)
@example(header="bytes=" + "9" * 5000 + "-", total=10)
@example(header="bytes=0-" + "9" * 5000, total=10)
@example(header="bytes=٣-٤", total=10)
def test_hostile_headers_are_ignored_or_stay_inside(header: str, total: int) -> None:
    try:
        found = parse_range(header, total)
    except Unsatisfiable:
        return
    for part in found or []:
        assert part.length > 0
        assert part.offset >= 0
        assert part.offset + part.length <= total


def test_an_end_behind_the_blob_is_cut_however_many_digits_it_has() -> None:
    assert parse_range("bytes=4-" + "9" * 5000, 10) == [ByteRange(4, 6)]


def test_too_many_or_too_heavy_ranges_get_the_whole() -> None:
    assert parse_range("bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)), 1 << 20) is None
    assert parse_range("bytes=0-,0-,0-", 100) is None


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20,30-40", "bytes=-0"])
def test_only_ranges_outside_are_unsatisfiable(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        parse_range(header, 10)
