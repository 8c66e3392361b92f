"""What the writer promises beyond what a mount shows: the same bytes, refusals, work for the caller."""

import hashlib
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.erofs.images import device_of, index_of
from tests.erofs.mounts import mounted_image, tail_bytes
from veneer.erofs.chunks import MAX_CHUNKS, MAX_IMAGE_CHUNKS, ChunkMapper
from veneer.erofs.ondisk import BLOCK, ENTRY, NO_BLOCK, DeviceSlot
from veneer.erofs.writer import write_erofs
from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.index.merge import merge
from veneer.index.model import Extent
from veneer.testing.erofs_reader import read_erofs
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at

GOLDEN = [
    tar(
        [
            TarItem(b"bin/tool", mode=0o4755, content=b"#!tool\n" * 200, mtime_ns=1_700_000_000_123_456_789),
            TarItem(b"bin/link", "symlink", link=b"tool"),
            TarItem(b"bin/alias", "link", link=b"bin/tool"),
            TarItem(b"etc/odd", pieces=((1, b"one"), (5000, b"two")), size=10_000),
            TarItem(b"etc/caps", content=b"x", xattrs=((b"user.k", b"v"),), uid=1000, gid=1000),
            TarItem(b"dev/null", "char", rdev=(1, 3)),
        ]
    ),
    tar([TarItem(b"bin/tool", content=b"new"), TarItem(b"empty")]),
]


def test_the_bytes_are_those_of_the_documented_profile() -> None:
    """A change of these digests is a change of the profile: every cached metadata image is written anew."""
    image = write_erofs(index_of(GOLDEN))
    assert hashlib.sha256(image.data).hexdigest() == (
        "02af11cf54acd1f8bd758f19a78f534581cbebbc14c1ea852b9fa5a96b738db2"
    )
    assert image.data[1024 + 0x30 : 1024 + 0x40].hex() == "dcdc2f78797d8941ad18c65ce76dd9eb"


def test_devices_are_tagged_by_content() -> None:
    image = write_erofs(index_of(GOLDEN))
    tags = [hashlib.sha256(layer).hexdigest().encode() for layer in GOLDEN]
    assert [slot.tag for slot in image.devices[:-1]] == tags
    assert [slot.size for slot in image.devices[:-1]] == list(map(len, GOLDEN))
    # The tail's tag follows from what it is a copy of, so from the device under it.
    other = write_erofs(index_of([GOLDEN[0] + bytes(512), GOLDEN[1]]))
    assert image.tail == other.tail == 2
    assert other.copies == image.copies
    assert other.devices[2].tag != image.devices[2].tag


@pytest.mark.root
def test_an_image_of_no_layers() -> None:
    image = write_erofs(merge([]))
    assert (image.devices, image.inodes) == ((), 1)
    assert list(read_erofs(image.data).walk()) == [(b"", read_erofs(image.data).root)]
    with tempfile.TemporaryDirectory() as directory, mounted_image(image, [], Path(directory)) as root:
        assert list(root.iterdir()) == []


def test_attributes_that_no_inode_has_are_left_out_and_counted() -> None:
    acl = b"\2\0\0\0"
    items = [
        TarItem(b"f", xattrs=((b"system.nfs4_acl", b"x"), (b"user.a", b"1"))),
        TarItem(b"s", "symlink", link=b"f", xattrs=((b"system.posix_acl_access", acl),)),
    ]
    image = write_erofs(index_of([tar(items)]))
    assert image.dropped == {"system xattr": 2}
    assert sorted(inode.xattrs for inode in read_erofs(image.data).inodes.values()) == [
        *[()] * 2,
        ((b"user.a", b"1"),),
    ]


@pytest.mark.parametrize(
    "xattrs",
    [
        ((b"user.a", bytes(65_536)),),
        tuple((b"user.%d" % number, bytes(65_000)) for number in range(5)),
    ],
)
def test_attributes_that_do_not_fit_are_refused(xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(UnsupportedFormat, match="extended attribute"):
        write_erofs(index_of([tar([TarItem(b"f", xattrs=xattrs)])]))


def test_a_directory_in_two_places_is_refused() -> None:
    index = index_of([tar([TarItem(b"a/b/c", "dir"), TarItem(b"d", "dir")])])
    a, d = node_at(index, b"a"), node_at(index, b"d")
    assert a is not None
    assert d is not None
    index.children[d] = index.children[a]
    with pytest.raises(IntegrityError, match="in several places"):
        write_erofs(index)


def test_data_outside_their_device_are_refused() -> None:
    layer = tar([TarItem(b"f", content=bytes(100_000))])
    index = index_of([layer])
    index.devices = (device_of(layer[:-4096]),)
    with pytest.raises(IntegrityError, match="device"):
        write_erofs(index)


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 1, 0, 512)],
        [Extent(0, 0, 1 << 20, 512)],
        [Extent(512, 0, 0, 512), Extent(0, 0, 512, 512)],
        [Extent(0, 0, 0, 1024), Extent(512, 0, 1024, 512)],
        [Extent(0, 0, 0, 0)],
        [Extent(0, 0, 0, 4096)],
        [Extent(0, 0, -512, 512)],
    ],
)
def test_placements_that_make_no_sense_are_refused(extents: list[Extent]) -> None:
    index = index_of([tar([TarItem(b"f", content=bytes(3000))])])
    node = node_at(index, b"f")
    assert node is not None
    with pytest.raises(IntegrityError):
        write_erofs(index, placements={node: extents})


def test_a_pack_must_have_a_tag() -> None:
    for tag in (b"", b"a\0b", b"t" * 65):
        with pytest.raises(ValueError):
            write_erofs(merge([]), packs=[DeviceSlot(tag, 512)])


def test_a_file_of_one_piece_is_one_chunk_whatever_its_size() -> None:
    for size in (1, 512, 513, 1 << 20, (1 << 40) - 1, 1 << 40):
        mapper = ChunkMapper([DeviceSlot(b"t", 1 << 41)])
        chunk_format, entries = mapper.map(1, size, [Extent(0, 0, 512, size)])
        assert (entries, mapper.copies) == (ENTRY.pack(0, 1, 1), [])
        assert 512 << (chunk_format & 0x1F) >= size


def test_an_image_cannot_be_made_of_too_many_chunks() -> None:
    mapper = ChunkMapper([DeviceSlot(b"t", 1 << 20)])
    with pytest.raises(UnsupportedFormat):
        mapper.map(1, (1 << 63) - 1, [])
    for node in range(MAX_IMAGE_CHUNKS // MAX_CHUNKS):
        mapper.map(node, MAX_CHUNKS * 512, [Extent(512, 0, 512, 512)])
    with pytest.raises(UnsupportedFormat):
        mapper.map(100, 1, [Extent(0, 0, 0, 1)])


@st.composite
def sparse_files(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    unit = draw(st.sampled_from((1, 512, 4096, 65_536)))
    extents, at = [], 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3)) * unit
        length = draw(st.integers(1, 4)) * unit
        offset = draw(st.integers(0, 8)) * draw(st.sampled_from((unit, 512)))
        extents.append(Extent(at, draw(st.integers(0, 1)), offset, length))
        at += length
    return max(1, at + draw(st.integers(0, 3)) * unit - draw(st.integers(0, 1)) * 0), extents


DEVICES = [bytes((7 * place + number) % 251 for place in range(1 << 20)) for number in (1, 2)]


@given(sparse_files())
@settings(deadline=None, max_examples=300)
def test_chunks_and_copies_hold_the_bytes_of_the_file(file: tuple[int, list[Extent]]) -> None:
    size, extents = file
    expected = bytearray(size)
    for extent in extents:
        data = DEVICES[extent.device][extent.offset : extent.offset + extent.length]
        expected[extent.file_offset : extent.file_offset + extent.length] = data

    mapper = ChunkMapper([DeviceSlot(b"a", 1 << 20), DeviceSlot(b"b", 1 << 20)])
    chunk_format, entries = mapper.map(1, size, extents)
    tail = bytearray(mapper.tail_blocks * BLOCK)
    for copy in mapper.copies:
        tail[copy.offset : copy.offset + copy.length] = DEVICES[copy.device][
            copy.source : copy.source + copy.length
        ]
    assert read_chunks(chunk_format, entries, size, [*DEVICES, tail]) == expected
    assert all(one.offset + one.length <= other.offset for one, other in pairwise(mapper.copies))
    if all(e.offset % BLOCK == e.file_offset % BLOCK == e.length % BLOCK == 0 for e in extents):
        assert mapper.copies == []


def read_chunks(chunk_format: int, entries: bytes, size: int, devices: Sequence[bytes | bytearray]) -> bytes:
    """What a kernel reads."""
    length = BLOCK << (chunk_format & 0x1F)
    content = bytearray()
    for _, device, block in ENTRY.iter_unpack(entries):
        piece = b"" if block == NO_BLOCK else devices[device - 1][block * BLOCK : block * BLOCK + length]
        content += piece.ljust(length, b"\0")
    return bytes(content[:size])


def test_copies_of_the_tail_are_what_the_files_lack() -> None:
    image = write_erofs(index_of(GOLDEN))
    assert [data for _, data in tail_bytes(image, GOLDEN)] == [b"one", b"two"]
    assert {copy.node for copy in image.copies} == {node_at(index_of(GOLDEN), b"etc/odd")}
