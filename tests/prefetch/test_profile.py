"""Profiles: what is written is read again, what is hostile is refused or harmless, and runs become one."""

import json
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError, UnsupportedFormat, UsageError
from veneer.oci.digest import Digest
from veneer.prefetch import profile as module
from veneer.prefetch.profile import MAX_RUN, PROFILE_TYPE, Profile, Use, merge_profiles
from veneer.prefetch.ranges import cut_to_first

LAYERS = tuple(Digest.of(name) for name in (b"one", b"two", b"three"))
IMAGE = str(Digest.of(b"image"))

times = st.floats(0, 1e6).map(lambda ms: round(ms, 3))
#: Any ranges, also such that overlap.
ranges = st.lists(
    st.builds(Use, st.sampled_from(LAYERS), st.integers(0, 60), st.integers(1, 20), times, times), max_size=20
)
words = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=4).map(tuple)


def profile(uses: Iterable[Use], **changes: object) -> Profile:
    fields: dict[str, object] = {"workload": "default", "image": IMAGE, "command": ("a", "b"), "runs": 1}
    return Profile(**fields | changes, uses=tuple(uses))  # type: ignore[arg-type] # fields of Profile


def disjoint(uses: Iterable[Use]) -> list[Use]:
    """The uses that do not overlap an earlier one."""
    out: list[Use] = []
    taken: set[tuple[Digest, int]] = set()
    for use in uses:
        mine = {(use.layer, at) for at in range(use.offset, use.end)}
        if not mine & taken:
            taken |= mine
            out.append(use)
    return out


profiles = st.builds(
    lambda uses, command, runs: profile(disjoint(uses), command=command, runs=runs),
    ranges,
    words,
    st.integers(1, 9),
)


def order(uses: Iterable[Use]) -> list[tuple[Digest, int]]:
    """Bytes in order of first use."""
    return [(use.layer, at) for use in uses for at in range(use.offset, use.end)]


def document(**changes: object) -> dict[str, object]:
    value = json.loads(profile([Use(LAYERS[0], 4096, 8192, 1.5, 0.25)]).to_json())
    assert isinstance(value, dict)
    return value | changes


def parse(value: object) -> Profile:
    return Profile.parse(json.dumps(value).encode())


def test_a_static_profile_has_a_say_in_what_no_run_has_used() -> None:
    one, two = LAYERS[:2]
    static = profile([Use(one, 50, 10, 0, 0), Use(one, 0, 10, 0, 0), Use(two, 0, 5, 0, 0)], runs=0)
    recorded = profile([Use(one, 0, 10, 3, 1), Use(one, 50, 10, 4, 1)], runs=2)
    assert static.static
    assert not recorded.static
    merged = merge_profiles([static, recorded])
    assert merged.runs == 2
    assert order(merged.uses)[:20] == order(recorded.uses)
    assert {use.layer for use in merged.uses} == {one, two}
    assert merge_profiles([static, static]) == static


@given(profiles)
@settings(deadline=None)
def test_what_is_written_is_read_again(written: Profile) -> None:
    assert Profile.parse(written.to_json()) == written


def test_the_document_is_as_specified() -> None:
    uses = [
        Use(LAYERS[1], 0, 4096, 0.0, 12.5),
        Use(LAYERS[0], 8192, 100, 3.25, 0.0),
        Use(LAYERS[1], 4096, 1, 4, 0),
    ]
    assert json.loads(profile(uses, runs=2).to_json()) == {
        "mediaType": "application/vnd.veneer.profile.v1+json",
        "workload": "default",
        "image": IMAGE,
        "command": ["a", "b"],
        "runs": 2,
        "layers": [str(LAYERS[1]), str(LAYERS[0])],
        "uses": [[0, 0, 4096, 0.0, 12.5], [1, 8192, 100, 3.25, 0.0], [0, 4096, 1, 4, 0]],
    }


@given(ranges)
@settings(deadline=None)
def test_of_overlapping_uses_the_first_one_has_the_bytes(uses: list[Use]) -> None:
    numbers = {layer: number for number, layer in enumerate(LAYERS)}
    rows = [[numbers[use.layer], *use[1:]] for use in uses]
    read = parse(document(layers=[str(layer) for layer in LAYERS], uses=rows))
    assert order(read.uses) == list(dict.fromkeys(order(uses)))
    first: dict[tuple[Digest, int], float] = {}
    for use in uses:
        for place in order([use]):
            first.setdefault(place, use.first_ms)
    assert all(use.first_ms == first[place] for use in read.uses for place in order([use]))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), max_size=12))
def test_each_byte_goes_to_the_range_that_comes_first(drawn: list[tuple[int, int]]) -> None:
    given_ranges = [(start, start + length, number) for number, (start, length) in enumerate(drawn)]
    owner: dict[int, int] = {}
    for start, end, number in given_ranges:
        for at in range(start, end):
            owner.setdefault(at, number)
    pieces = cut_to_first(given_ranges)
    assert {at: number for start, end, number in pieces for at in range(start, end)} == owner
    assert sum(end - start for start, end, _ in pieces) == len(owner)
    assert not any(one[1:] == (two[0], two[2]) for one, two in pairwise(pieces))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([*document()]), JUNK)
@settings(deadline=None, max_examples=300)
def test_a_document_with_anything_in_one_member_is_refused_or_a_profile(name: str, junk: object) -> None:
    try:
        read = parse(document(**{name: junk}))
    except (IntegrityError, UnsupportedFormat):
        return
    assert Profile.parse(read.to_json()) == read


@given(st.lists(st.lists(st.one_of(st.integers(-2, 2**54), st.floats(), st.booleans(), st.none()), max_size=6)))
@settings(deadline=None)
def test_hostile_uses_are_refused_or_made_harmless(rows: list[list[object]]) -> None:
    try:
        read = parse(document(uses=rows))
    except IntegrityError:
        return
    for use in read.uses:
        assert 0 <= use.offset < use.end <= 1 << 53
        assert use.first_ms >= 0
        assert use.wait_ms >= 0


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Profile.parse(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uses": [[1, 0, 1, 0, 0]]}, "layer"),
        ({"uses": [[0, 0, 0, 0, 0]]}, "length"),
        ({"uses": [[0, 1 << 53, 1, 0, 0]]}, "offset"),
        ({"uses": [[0, 2, (1 << 53) - 1, 0, 0]]}, "length"),
        ({"uses": [[0, 0.0, 1, 0, 0]]}, "offset"),
        ({"uses": [[False, 0, 1, 0, 0]]}, "layer"),
        ({"uses": [[0, 0, 1, -0.1, 0]]}, "time"),
        ({"uses": [[0, 0, 1, 0, 1e10]]}, "time"),
        ({"uses": [[0, 0, 1, True, 0]]}, "time"),
        ({"uses": [[0, 0, 1, 0]]}, "no list of layer"),
        ({"layers": [str(LAYERS[0])] * 2}, "twice"),
        ({"layers": ["sha256:12"]}, "invalid digest"),
        ({"image": "latest"}, "invalid digest"),
        ({"workload": "../other"}, "workload"),
        ({"workload": ""}, "workload"),
        ({"runs": -1}, "runs"),
        ({"command": [1]}, "command"),
        ({"comment": ""}, "members"),
    ],
)
def test_what_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        parse(document(**change))


def test_another_version_is_another_format() -> None:
    with pytest.raises(UnsupportedFormat, match="v2"):
        parse({"mediaType": PROFILE_TYPE.replace("v1", "v2"), "new": 1})


def test_what_is_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_USES", 100)
    for data in (b"[" * 300, b"[" + b"1," * 1200 + b"1]", b"[0]"):
        with pytest.raises(IntegrityError):
            Profile.parse(data)
    rows = [[0, 10 * number, 5, 0, 0] for number in range(101)]
    with pytest.raises(IntegrityError, match="at most 100"):
        parse(document(uses=rows))
    assert len(parse(document(uses=rows[:100])).uses) == 100
    # One range in many pieces: each hole was used before it.
    with pytest.raises(IntegrityError, match="more than the 100"):
        parse(document(uses=[*rows[:60], [0, 0, 1000, 0, 0]]))
    with pytest.raises(UsageError, match="more than the 100"):
        profile(Use(LAYERS[0], 2 * number, 1, 0, 0) for number in range(101))


def test_restricting_keeps_the_order_of_what_is_left() -> None:
    uses = [Use(LAYERS[number % 3], 10 * number, 10, number, 0) for number in range(9)]
    found = profile(uses).restricted([LAYERS[2], LAYERS[0]])
    assert found.uses == tuple(use for use in uses if use.layer != LAYERS[1])
    assert found.layers == (LAYERS[0], LAYERS[2])
    assert found.size == 60
    assert profile(uses).restricted([]).uses == ()


# Merging


@given(st.lists(profiles, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_merged_profile_has_what_any_run_had_and_nothing_twice(runs: list[Profile]) -> None:
    merged = merge_profiles(runs)
    found = order(merged.uses)
    assert len(found) == len(set(found))
    assert set(found) == {place for run in runs for place in order(run.uses)}
    assert merged.runs == sum(run.runs for run in runs)


@given(profiles, st.integers(1, 3))
@settings(deadline=None)
def test_merging_a_run_with_itself_changes_no_order(run: Profile, times: int) -> None:
    merged = merge_profiles([run] * times)
    assert order(merged.uses) == order(run.uses)


@given(profiles)
@settings(deadline=None)
def test_it_does_not_matter_how_runs_were_cut(run: Profile) -> None:
    pieces = [use._replace(offset=at, length=1) for use in run.uses for at in range(use.offset, use.end)]
    other = profile(pieces, command=run.command, runs=run.runs)
    assert order(merge_profiles([run, other]).uses) == order(run.uses)


def test_runs_are_put_in_the_order_of_the_median() -> None:
    a, b, c = (Use(LAYERS[0], 1000 * number, 10, 0, 0) for number in range(3))
    usual, odd = profile([a, b, c]), profile([c, b, a])
    assert order(merge_profiles([usual, odd, usual]).uses) == order([a, b, c])
    assert order(merge_profiles([odd, usual, odd]).uses) == order([c, b, a])
    # A profile of several runs counts as often.
    assert order(merge_profiles([merge_profiles([odd, odd, odd]), usual, usual]).uses) == order([c, b, a])


def test_times_are_medians() -> None:
    runs = [profile([Use(LAYERS[0], 0, 10, first, wait)]) for first, wait in ((1, 9), (5, 1), (100, 2))]
    assert merge_profiles(runs).uses == (Use(LAYERS[0], 0, 10, 5, 2),)


def test_what_boundaries_cut_is_joined_again_up_to_a_size() -> None:
    whole = profile([Use(LAYERS[0], 0, MAX_RUN, 1, 3), Use(LAYERS[0], MAX_RUN, 10, 2, 0)])
    part = profile([Use(LAYERS[0], 0, 100, 1, 5)])
    assert [use.length for use in merge_profiles([whole, part, whole]).uses] == [MAX_RUN, 10]


def test_what_merges_have_in_common() -> None:
    use = Use(LAYERS[0], 0, 10, 0, 0)
    assert merge_profiles([profile([use]), profile([use])]).image == IMAGE
    assert merge_profiles([profile([use]), profile([use], image="")]).image == ""
    with pytest.raises(UsageError, match="default, other"):
        merge_profiles([profile([use]), profile([use], workload="other")])
    with pytest.raises(UsageError):
        merge_profiles([])


def test_a_document_of_more_values_than_a_profile_has_is_not_read() -> None:
    with pytest.raises(IntegrityError, match="more values than are allowed"):
        Profile.parse(b"[" + b"0," * (10 * module.MAX_USES) + b"0,0]")
