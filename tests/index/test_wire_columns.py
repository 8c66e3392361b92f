"""Columns: the narrowest planes that hold the numbers, and no others; sections: the shortest msgpack."""

from array import array

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError
from veneer.index.wire_columns import (
    Fields,
    ascending,
    ascending_column,
    join,
    pack,
    signed,
    signed_column,
    split,
    spread,
    unsigned,
    unsigned_column,
)

MAX = (1 << 63) - 1
bits = st.integers(0, 63)
any_signed = bits.flatmap(lambda width: st.integers(-(1 << width), (1 << width) - 1))
any_unsigned = bits.flatmap(lambda width: st.integers(0, (1 << width) - 1))


@given(st.lists(any_unsigned, max_size=9))
@settings(deadline=None)
def test_unsigned_columns_use_as_many_planes_as_the_largest_number(values: list[int]) -> None:
    data = unsigned_column(values)
    assert unsigned(data, len(values), "column") == array("q", values)
    assert len(data) == len(values) * ((max(values, default=0).bit_length() + 7) // 8)


@given(st.lists(any_signed, max_size=9))
@settings(deadline=None)
def test_signed_columns_use_as_few_planes_as_hold_all(values: list[int]) -> None:
    data = signed_column(values)
    assert signed(data, len(values), "column") == array("q", values)
    needed = max((max(value, ~value).bit_length() // 8 + 1 for value in values), default=0)
    assert len(data) == len(values) * (needed if any(values) else 0)


@given(st.binary(max_size=24), st.integers(0, 6))
@settings(deadline=None)
def test_whatever_decodes_is_what_would_be_written(data: bytes, count: int) -> None:
    for decode, encode in ((unsigned, unsigned_column), (signed, signed_column)):
        try:
            values = decode(data, count, "column")
        except IntegrityError:
            continue
        assert encode(values) == data


@given(st.sets(st.integers(0, 1 << 40), max_size=9).map(sorted))
@settings(deadline=None)
def test_ascending_numbers_are_stored_as_distances(values: list[int]) -> None:
    count, data = ascending_column(values)
    assert ascending(data, count, (1 << 40) + 1, "column") == values
    if values:
        with pytest.raises(IntegrityError, match="not below"):
            ascending(data, count, values[-1], "column")


@given(st.lists(any_signed, min_size=1, max_size=300, unique=True), st.data())
@settings(deadline=None, max_examples=50)
def test_tables_spread_over_rows(table: list[int], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=20))
    expected = array("q", [table[number] for number in numbers])
    assert spread(array("q", table), array("q", numbers)) == expected


def test_large_tables_spread_as_well() -> None:
    assert spread(array("q", range(1000)), array("q", [999, 0, 256])) == array("q", [999, 0, 256])


def test_planes_lie_behind_each_other_lowest_first() -> None:
    assert unsigned_column([1, 0x203]) == bytes([1, 3, 0, 2])
    assert signed_column([1, -2]) == bytes([1, 0xFE])
    assert signed_column([128, -1]) == bytes([128, 255, 0, 255])
    assert signed_column([128, 1]) == bytes([128, 1, 0, 0])
    assert unsigned_column([0, 0]) == signed_column([0, 0]) == b""
    assert ascending_column([0, 1, 5]) == (3, bytes([0, 0, 3]))


@pytest.mark.parametrize("data", [b"a\0\0b", b"\0a\0b", b"a\0b\0", b"a\0b", b"", b"a\0b\0c\0d"])
def test_strings_are_as_many_as_expected_and_not_empty(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="expected 3 strings"):
        split(data, 3, "strings")
    assert split(join([b"a", b"b", b"c"]), 3, "strings") == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x93\x01\x02\x03", id="too many fields"),
        pytest.param(b"\x91\x01", id="too few fields"),
        pytest.param(b"\x92\x01\xcc\x02", id="number longer than needed"),
        pytest.param(b"\x92\x01\xc5\x00\x01a", id="string longer than needed"),
        pytest.param(b"\xdc\x00\x02\x01\x02", id="array longer than needed"),
        pytest.param(b"\x92\x01\x02\x03", id="more after it"),
        pytest.param(b"\x92\x01", id="cut off"),
        pytest.param(b"\x82\x01\x02\x03\x04", id="map"),
        pytest.param(b"\x92\x01\xd4\x01a", id="extension"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="four billion fields"),
        pytest.param(b"\x91" * 100_000, id="deep"),
        pytest.param(b"\x92\x01\xa1\xff", id="not UTF-8"),
        pytest.param(b"\x07", id="not an array"),
        pytest.param(b"\xa2ab", id="a string as long as the array should be"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_other_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Fields(data, 2, "section")


def test_fields_are_taken_by_type() -> None:
    data = pack([b"blob", "text", 7])
    assert data == msgpack.packb([b"blob", "text", 7])
    fields = Fields(data, 3, "section")
    assert (fields.blob(), fields.text(), fields.number(7)) == (b"blob", "text", 7)
    with pytest.raises(IntegrityError, match="not a text string"):
        Fields(data, 3, "section").text()
    with pytest.raises(IntegrityError, match="from 0 to 6"):
        Fields(pack([7]), 1, "section").number(6)
