"""Whole columns are computed with as their numbers are, one by one."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from veneer.index.columns import LIMIT, column, exceeds, filled, lanes, picked, plane, repeated, signed_lanes

#: Numbers near the bounds, and of every width.
UNSIGNED = st.integers(0, 63).flatmap(lambda bits: st.integers(max(0, (1 << bits) - 2), (1 << bits) - 1))
SIGNED = st.one_of(UNSIGNED, UNSIGNED.map(lambda number: -number - 1))


@given(st.lists(UNSIGNED))
def test_a_column_is_one_integer_and_back(numbers: list[int]) -> None:
    assert column(lanes(array("q", numbers)), len(numbers)).tolist() == numbers
    assert repeated(7, len(numbers)) == lanes(array("q", [7] * len(numbers)))


@given(st.lists(st.tuples(UNSIGNED, UNSIGNED)))
def test_a_number_beyond_its_own_limit_is_found(pairs: list[tuple[int, int]]) -> None:
    numbers, limits = array("q", [one for one, _ in pairs]), array("q", [limit for _, limit in pairs])
    assert exceeds(lanes(numbers), lanes(limits), len(pairs)) == any(one > limit for one, limit in pairs)
    assert not exceeds(lanes(numbers), repeated(LIMIT - 1, len(pairs)), len(pairs))


@given(st.lists(UNSIGNED))
def test_what_is_not_zero_has_all_bits(numbers: list[int]) -> None:
    masks = filled(lanes(array("q", numbers)), len(numbers))
    assert column(masks, len(numbers)).tolist() == [-1 if number else 0 for number in numbers]


@given(st.lists(SIGNED), st.integers(1, 1 << 20))
def test_remainders_of_negative_numbers_too(numbers: list[int], divisor: int) -> None:
    quotients = array("q", [number // divisor for number in numbers])
    rest = signed_lanes(array("q", numbers)) - signed_lanes(quotients) * divisor
    assert column(rest, len(numbers)).tolist() == [number % divisor for number in numbers]


@given(st.lists(SIGNED), st.integers(0, 7))
def test_bytes_of_numbers_side_by_side(numbers: list[int], place: int) -> None:
    assert list(plane(array("q", numbers), place)) == [number >> 8 * place & 0xFF for number in numbers]


@given(st.lists(st.integers(0, 4)))
def test_values_by_their_places(places: list[int]) -> None:
    assert list(picked("abcde", places)) == ["abcde"[place] for place in places]
