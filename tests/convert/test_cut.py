"""Where spans begin and end."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.convert.cut import FRAME_SIZE, MAX_SPAN, SMALL_FILE, SpanCutter
from veneer.index.tar import TarEntry, TarParser
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import END, TarItem, tar

SIZES = st.sampled_from((0, 1, 511, 5_000, SMALL_FILE - 1, SMALL_FILE, SMALL_FILE + 1, FRAME_SIZE, 400_000))


def cut(data: bytes, pieces: list[int]) -> tuple[list[int], list[TarEntry]]:
    """The cuts of a tar that arrives in pieces of the given lengths, over and over."""
    parser, cutter, cuts, entries, at = TarParser(), SpanCutter(), [0], list[TarEntry](), 0
    while at < len(data):
        for length in pieces:
            found = parser.feed(data[at : at + length])
            at = min(len(data), at + length)
            entries += found
            cuts += cutter.advance(found, at)
    return cuts + cutter.advance(parser.finish(), at) + cutter.finish(at), entries


def check(data: bytes, pieces: list[int]) -> tuple[list[int], list[TarEntry]]:
    cuts, entries = cut(data, [len(data) + 1])
    assert cuts[0] == 0
    assert cuts[-1] == len(data)
    assert all(0 < end - start <= MAX_SPAN for start, end in pairwise(cuts))
    assert cut(data, pieces)[0] == cuts
    return cuts, entries


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(SIZES, st.sampled_from((0, 0, 0, 1, 5))), max_size=12),
    st.sampled_from((0, 512, 100 * 512, 2_000 * 512)),
    st.lists(st.integers(700, 300_000), min_size=1, max_size=4),
)
def test_cuts_depend_on_the_tar_alone_and_tile_it(
    files: list[tuple[int, int]], padding: int, pieces: list[int]
) -> None:
    items = [
        TarItem(
            b"f%d" % number,
            content=bytes(size),
            xattrs=tuple((b"user.%d" % name, bytes(60_000)) for name in range(headers)),
        )
        for number, (size, headers) in enumerate(files)
    ]
    cuts, entries = check(tar(items) + bytes(padding), pieces)
    for entry in entries:
        end = entry.data + entry.stored_size
        inside = [cut for cut in cuts if entry.data < cut < end]
        if entry.stored_size > SMALL_FILE:
            assert entry.data in cuts
            assert inside == list(range(entry.data + FRAME_SIZE, end, FRAME_SIZE))
        else:
            assert not inside


@settings(deadline=None, max_examples=30)
@given(random_layers(most_layers=1), st.lists(st.integers(1, 5_000), min_size=1, max_size=3))
def test_every_kind_of_entry_is_cut_alike_in_any_pieces(layers: list[Layer], pieces: list[int]) -> None:
    check(tar(layers[0]), pieces)


def test_small_neighbours_share_a_span_and_a_large_file_has_its_own() -> None:
    small = [TarItem(b"s%d" % number, content=bytes(3_000)) for number in range(100)]
    cuts, entries = check(tar([*small, TarItem(b"large", content=bytes(3 * FRAME_SIZE))]), [10_000])
    shared = [cut for cut in cuts if cut < entries[-1].data]
    # 100 files of 512 + 3,072 bytes fill two frames and a part of a third.
    assert len(shared) == 3
    assert set(shared) <= {0, *(entry.header for entry in entries)}
    data = entries[-1].data
    # The end of the archive shares the span of the last piece only if there is one to share.
    assert cuts[3:] == [data, data + FRAME_SIZE, data + 2 * FRAME_SIZE, cuts[-1]]


def test_an_empty_stream_has_no_spans() -> None:
    assert SpanCutter().finish(0) == []
    assert check(END, [1])[0] == [0, len(END)]
