"""The recorder: pages, each once, in order of first use, in bounded memory."""

import tracemalloc
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from veneer.oci.digest import Digest
from veneer.prefetch.profile import MAX_RUN, Profile, Use
from veneer.prefetch.recorder import PAGE, Recorder

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")
SIZE = 64 * PAGE - 100


def pages(uses: Iterable[Use]) -> list[tuple[Digest, int]]:
    return [(use.layer, page) for use in uses for page in range(use.offset // PAGE, -(-use.end // PAGE))]


@given(st.lists(st.tuples(st.sampled_from([ONE, TWO]), st.integers(0, SIZE - 1), st.integers(1, 9 * PAGE))))
def test_each_page_is_used_once_and_first_uses_are_in_order(reads: list[tuple[Digest, int, int]]) -> None:
    recorder = Recorder(10.0)
    expected: list[tuple[Digest, int]] = []
    for number, (layer, offset, length) in enumerate(reads):
        length = min(length, SIZE - offset)
        fresh = [place for place in pages([Use(layer, offset, length, 0, 0)]) if place not in expected]
        use = recorder.note(layer, SIZE, offset, length, 10 + number)
        assert (use is None) == (not fresh)
        expected += fresh
    profile = recorder.profile("default", "", ())
    assert pages(profile.uses) == expected
    assert all(use.offset % PAGE == 0 and 0 < use.end <= SIZE for use in profile.uses)
    assert Profile.parse(profile.to_json()) == profile


def test_neighbours_are_joined_only_when_they_follow_one_another() -> None:
    recorder = Recorder(0.0)
    for at, (layer, page) in enumerate([(ONE, 0), (ONE, 1), (TWO, 2), (ONE, 2), (ONE, 2), (ONE, 3), (ONE, 1)]):
        recorder.note(layer, SIZE, page * PAGE, PAGE, at / 1000)
    assert recorder.profile("w", "", ("c",)).uses == (
        Use(ONE, 0, 2 * PAGE, 0.0, 0.0),
        Use(TWO, 2 * PAGE, PAGE, 2.0, 0.0),
        Use(ONE, 2 * PAGE, 2 * PAGE, 3.0, 0.0),
    )


def test_a_run_does_not_become_longer_than_its_time_means_something() -> None:
    recorder = Recorder(0.0)
    size = 2 * MAX_RUN
    for page in range(size // PAGE):
        recorder.note(ONE, size, page * PAGE, PAGE, page)
    assert [use.length for use in recorder.profile("w", "", ()).uses] == [MAX_RUN, MAX_RUN]


def test_a_use_has_its_longest_wait_and_its_first_time() -> None:
    recorder = Recorder(1.0)
    first = recorder.note(ONE, SIZE, 0, PAGE, 1.5)
    second = recorder.note(ONE, SIZE, PAGE, PAGE, 1.6)
    assert first == second == 0
    recorder.waited(0, 0.3)
    recorder.waited(0, 0.2)
    assert recorder.profile("w", "", ()).uses == (Use(ONE, 0, 2 * PAGE, 500.0, 300.0),)


def test_what_there_is_no_room_for_is_counted() -> None:
    recorder = Recorder(0.0, most=3)
    for number in range(5):
        recorder.note(ONE, SIZE, 2 * number * PAGE, PAGE, number)
    recorder.note(ONE, SIZE, 0, PAGE, 9)
    assert len(recorder) == 3
    assert recorder.lost == 2


def test_what_is_not_read_of_a_large_device_takes_no_memory() -> None:
    size = 1 << 60
    tracemalloc.start()
    try:
        recorder = Recorder(0.0)
        recorder.note(ONE, size, size - PAGE, PAGE, 0)
        recorder.note(ONE, size, 0, PAGE, 0)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert [use.offset for use in recorder.profile("w", "", ()).uses] == [size - PAGE, 0]


def test_a_second_layer_that_lies_about_its_size_does_no_harm() -> None:
    recorder = Recorder(0.0)
    recorder.note(ONE, 10 * PAGE, 0, PAGE, 0)
    assert recorder.note(ONE, 20 * PAGE, 15 * PAGE, PAGE, 0) is None
    recorder.note(ONE, 20 * PAGE, 9 * PAGE, 5 * PAGE, 0)
    assert pages(recorder.profile("w", "", ()).uses) == [(ONE, 0), (ONE, 9)]
