"""The strict reader accepts what the writer writes, says what it says, and refuses everything else."""

import hashlib
from bisect import bisect_right

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.erofs.facts import facts_in
from tests.erofs.images import index_of
from veneer.erofs import directories
from veneer.erofs.ondisk import HEAD_SIZE, seal, unsealed
from veneer.erofs.writer import write_erofs
from veneer.errors import IntegrityError
from veneer.testing.erofs_reader import ErofsTree, read_erofs
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


def seal_again(image: bytearray) -> None:
    """Have UUID and checksum fit what an image has become."""
    head = unsealed(bytes(image[:HEAD_SIZE]))
    image[:HEAD_SIZE] = seal(head, hashlib.sha256(head + image[HEAD_SIZE:]).digest())


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
    seal_again(image)
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
    seal_again(image)
    with pytest.raises(IntegrityError):
        read_erofs(bytes(image))


def at(path: bytes) -> int:
    """Offset of the inode at ``path``."""
    return 32 * next(nid for found, nid in read_erofs(SAMPLE).walk() if found == path)


def number(offset: int, value: int, width: int = 4) -> tuple[int, bytes]:
    return offset, value.to_bytes(width, "little")


def instead(old: bytes, new: bytes) -> tuple[int, bytes]:
    assert SAMPLE.count(old) == 1
    return SAMPLE.index(old), new


#: In the directory "d": entries of 12 bytes for ".", "..", "again", "empty", "f", "g", then the names.
ENTRIES = at(b"d") + 64
FORGERIES = {
    "links of a file": number(at(b"d/g") + 0x2C, 3),
    "links of a directory": number(at(b"d") + 0x2C, 3),
    "names out of order": instead(b"...againemptyfg", b"...againemptygf"),
    "a name twice": instead(b"...againemptyfg", b"...againemptyff"),
    "a name with a slash": instead(b"againempty", b"aga/nempty"),
    "a name with a NUL": instead(b"againempty", b"aga\0nempty"),
    "no ..": instead(b"...againempty", b"..0againempty"),
    "a . that leads elsewhere": number(ENTRIES, at(b"") // 32, 8),
    "a .. that leads elsewhere": number(ENTRIES + 12, at(b"d") // 32, 8),
    "a directory in two places": (ENTRIES + 48, (at(b"d") // 32).to_bytes(8, "little")),
    "a name of another type": number(ENTRIES + 24 + 10, 7, 1),
    "an inode outside": number(ENTRIES + 48, 1 << 58, 8),
    "the number of an inode": number(at(b"d/g") + 0x14, 1),
    "a reserved byte of an inode": number(at(b"d/g") + 0x30, 1),
    "something between inodes": number(at(b"d/g") + 72, 1),
    "nanoseconds": number(at(b"d/g") + 0x28, 10**9),
    "a compact inode": number(at(b"d/g"), 8, 2),
    "a type that does not exist": number(at(b"d/g") + 4, 0o150644, 2),
    "a device that does not exist": number(at(b"d/g") + 64 + 2, 3, 2),
    "no device": number(at(b"d/g") + 64 + 2, 0, 2),
    "a block outside the device": number(at(b"d/g") + 64 + 4, 0xFFFFFF),
    "a hole of a device": number(at(b"d/g") + 64 + 4, 0xFFFFFFFF),
    "the high half of a block": number(at(b"d/g") + 64, 1, 2),
    "chunks without devices": number(at(b"d/g") + 0x10, 0),
    "chunks that are too large": number(at(b"d/g") + 0x10, 0x21),
    "a size that its chunks do not hold": number(at(b"d/g") + 8, 1 << 62, 8),
    "a negative size": number(at(b"d/g") + 8, 1 << 63, 8),
    "data in an empty file": number(at(b"d/empty") + 0x10, 5),
    "a fifo with a number": number(at(b"fifo") + 0x10, 5),
    "a target with a NUL": instead(b"target", b"tar\0et"),
    "an empty target": number(at(b"short") + 8, 0, 8),
    "a target elsewhere": number(at(b"long") + 0x10, 3),
    "something after a target": instead(b"t" * 900 + b"\0", b"t" * 900 + b"x"),
    "extended attributes that never end": number(at(b"x") + 2, 0xFFFF, 2),
    "extended attributes without any": number(at(b"x") + 2, 1, 2),
    "shared extended attributes": number(at(b"x") + 64 + 4, 1, 1),
    "an unknown prefix": number(at(b"x") + 64 + 12 + 1, 5, 1),
    "extended attributes out of order": (at(b"x") + 64 + 12 + 1, b"\1\1\0z"),
    "more inodes than there are": number(1024 + 0x10, 1000, 8),
    "more devices than fit": number(1024 + 0x56, 0xFFFF, 2),
    "another feature": number(1024 + 0x50, 0xD),
    "a device without a tag": (1152, bytes(64)),
    "an address of a device": number(1152 + 68, 9),
    "bytes before the superblock": (0, b"\1"),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_each_promise_is_checked(change: tuple[int, bytes]) -> None:
    offset, value = change
    image = bytearray(SAMPLE)
    assert image[offset : offset + len(value)] != value
    image[offset : offset + len(value)] = value
    seal_again(image)
    with pytest.raises(IntegrityError):
        read_erofs(bytes(image))


def test_inodes_in_another_order_are_refused() -> None:
    """Two inodes of the same size change places, and the names that lead to them follow."""
    one, other = at(b"fifo"), at(b"null")
    image = bytearray(SAMPLE)
    image[one : one + 64], image[other : other + 64] = SAMPLE[other : other + 64], SAMPLE[one : one + 64]
    for offset in (one, other):
        image[offset + 0x14 : offset + 0x18] = SAMPLE[offset + 0x14 : offset + 0x18]
    for nid, instead_of in ((one // 32, other // 32), (other // 32, one // 32)):
        place = SAMPLE.index(nid.to_bytes(8, "little"), at(b"") + 64)
        image[place : place + 8] = instead_of.to_bytes(8, "little")
    seal_again(image)
    with pytest.raises(IntegrityError, match="order"):
        read_erofs(bytes(image))


def test_directory_blocks_that_are_not_full_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    early = iter([1])
    monkeypatch.setattr(directories, "bisect_right", lambda *of: bisect_right(*of) - next(early, 0))
    image = write_erofs(index_of([tar([TarItem(b"%04d" % number) for number in range(60)])]))
    with pytest.raises(IntegrityError, match="not full"):
        read_erofs(image.data)
