"""The strict reader accepts what the writer writes, says what it says, and refuses everything else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.erofs.facts import facts_in
from tests.erofs.images import index_of
from veneer.erofs.ondisk import seal
from veneer.erofs.reader import ErofsTree, read_erofs
from veneer.erofs.writer import write_erofs
from veneer.errors import IntegrityError
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import difference, facts_of


@given(random_layers())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_read_is_what_was_written(layers: list[Layer]) -> None:
    tars = [tar(layer) for layer in layers]
    index = index_of(tars)
    image = write_erofs(index)
    assert difference(facts_of(index, tars), facts_in(image, tars)) == []
    assert write_erofs(index_of(tars)).data == image.data


def sample() -> bytes:
    """An image with one of everything."""
    page = bytes(4096)
    layer = tar(
        [
            TarItem(b"d/empty"),
            TarItem(b"d/f", content=b"x" * 5000, mtime_ns=-5),
            TarItem(b"d/g", content=b"y", uid=9),
            TarItem(b"d/again", "link", link=b"d/g"),
            TarItem(b"fifo", "fifo"),
            TarItem(b"null", "char", rdev=(1, 3)),
            TarItem(b"short", "symlink", link=b"target"),
            TarItem(b"long", "symlink", link=b"t" * 900),
            TarItem(b"holes", pieces=((4096, page), (16384, page)), size=1 << 20),
            TarItem(b"odd", pieces=((5, page),), size=9000),
            TarItem(b"x", content=b"z", xattrs=((b"security.a", b"\1"), (b"user.b", b"long" * 200))),
            *(TarItem(b"many/%04d" % number) for number in range(60)),
        ]
    )
    return write_erofs(index_of([layer])).data


SAMPLE = sample()


def described(tree: ErofsTree) -> object:
    return tree.devices, tree.root, tree.inodes, tree.children


@given(st.integers(0, 8 * len(SAMPLE) - 1))
@settings(deadline=None, max_examples=200)
def test_any_flipped_bit_is_refused(bit: int) -> None:
    image = bytearray(SAMPLE)
    image[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError):
        read_erofs(bytes(image))


def test_any_other_length_is_refused() -> None:
    for image in (b"", SAMPLE[:1024], SAMPLE[:-512], SAMPLE + bytes(512), SAMPLE[:-1]):
        with pytest.raises(IntegrityError):
            read_erofs(image)


#: Where structures are: most changes elsewhere hit names and values, which may be anything.
NUMBERS = st.sampled_from(
    (0, 1, 2, 8, 9, 0x7F, 0xFF, 0xFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
) | st.integers(0, 300)


@given(
    st.lists(
        st.tuples(st.integers(1024 // 4, len(SAMPLE) // 4 - 2), NUMBERS, st.sampled_from((1, 2, 4, 8))),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=1500)
def test_a_forged_image_is_refused_or_means_what_it_says(changes: list[tuple[int, int, int]]) -> None:
    """With the right checksum and UUID: what is accepted has other facts than the original, or its bytes."""
    image = bytearray(SAMPLE)
    for word, value, width in changes:
        image[4 * word : 4 * word + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    seal(image)
    try:
        tree = read_erofs(bytes(image))
    except IntegrityError:
        return
    assert (bytes(image) == SAMPLE) == (described(tree) == described(read_erofs(SAMPLE)))


@given(st.binary(max_size=3000))
@settings(deadline=None, max_examples=100)
def test_garbage_is_refused(data: bytes) -> None:
    image = bytearray(SAMPLE[:1280] + data)
    image += bytes(-len(image) % 512)
    seal(image)
    with pytest.raises(IntegrityError):
        read_erofs(bytes(image))
