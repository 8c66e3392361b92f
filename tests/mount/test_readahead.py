"""The policy of fetching ahead, without a kernel."""

from hypothesis import given
from hypothesis import strategies as st

from veneer.mount.readahead import MAX_WINDOW, MIN_WINDOW, WHOLE_FILE, WHOLE_LATER, ReadAhead

START, SIZE = 5_000_000, 64 << 20
END = START + SIZE


def test_a_small_file_is_fetched_whole() -> None:
    assert ReadAhead(START, START + WHOLE_FILE).window(START + 70_000, 10) == (START, START + WHOLE_FILE)


def test_a_file_of_medium_size_is_fetched_whole_at_the_second_miss() -> None:
    ahead = ReadAhead(START, START + WHOLE_LATER)
    assert ahead.window(START + 6_000_000, 4096) == (START + 6_000_000, START + 6_000_000 + MIN_WINDOW)
    assert ahead.window(START + 70_000, 4096) == (START, START + WHOLE_LATER)


def test_a_reader_in_order_is_followed_further_and_further() -> None:
    ahead, at, sizes = ReadAhead(START, END), START, []
    while at < END:
        low, high = ahead.window(at, 65_536)
        assert low == at
        sizes.append(high - low)
        at = high
    assert sizes[:6] == [MIN_WINDOW << n for n in range(6)]
    assert set(sizes[6:-1]) == {MAX_WINDOW}


def test_reads_sent_ahead_may_overtake_one_another() -> None:
    ahead = ReadAhead(START, END)
    sizes = [
        high - low for low, high in (ahead.window(START + at, 4096) for at in (131_072, 0, 196_608, 65_536))
    ]
    assert sizes == [MIN_WINDOW << n for n in range(4)]


def test_after_a_jump_it_starts_again() -> None:
    ahead = ReadAhead(START, END)
    for _ in range(3):
        ahead.window(START, 4096)
    for place in (50 << 20, 10 << 20, 30 << 20):
        assert ahead.window(START + place, 4096) == (START + place, START + place + MIN_WINDOW)


def test_jumping_about_in_what_was_fetched_is_no_order() -> None:
    ahead = ReadAhead(START, END)
    for _ in range(6):
        low, high = ahead.window(START, 4096)
    assert high - low == MAX_WINDOW
    for place in (4 << 20, 2 << 20, 6 << 20):
        low, high = ahead.window(START + place, 4096)
        assert high - low == MIN_WINDOW


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 1 << 20)), max_size=20))
def test_the_range_holds_the_read_and_ends_with_the_file(reads: list[tuple[int, int]]) -> None:
    ahead = ReadAhead(START, END)
    for place, length in reads:
        length = min(length, SIZE - place)
        low, high = ahead.window(START + place, length)
        assert low == START + place
        assert low + length <= high <= min(END, low + max(length, MAX_WINDOW))
