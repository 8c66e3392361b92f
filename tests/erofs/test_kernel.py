"""What the kernel shows of a written image is what a reference unpacker leaves in a directory."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.erofs.images import index_of
from tests.erofs.mounts import mounted_image
from veneer.erofs.ondisk import DeviceSlot
from veneer.erofs.writer import write_erofs
from veneer.index.model import Extent
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import Fact, difference, facts_of, node_at, scan
from veneer.testing.unpack import unpack_layers

pytestmark = pytest.mark.root

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
#: user::rw-, user:1000:rw-, group::r--, mask::rw-, other::r--
ACL = bytes.fromhex(
    "020000000100060 0ffffffff".replace(" ", "") + "02000600e8030000"
    "04000400ffffffff"
    "10000600ffffffff"
    "20000400ffffffff"
)


def through_kernel(layers: Sequence[bytes]) -> dict[bytes, Fact]:
    image = write_erofs(index_of(layers))
    with tempfile.TemporaryDirectory() as directory, mounted_image(image, layers, Path(directory)) as root:
        return scan(root)


def unpacked(layers: Sequence[bytes]) -> dict[bytes, Fact]:
    with tempfile.TemporaryDirectory() as directory:
        unpack_layers(layers, Path(directory), "keep")
        return scan(Path(directory))


@given(random_layers())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_random_images_equal_the_reference_unpack(layers: list[Layer]) -> None:
    tars = [tar(layer) for layer in layers]
    assert difference(unpacked(tars), through_kernel(tars)) == []


def test_every_kind_owner_time_and_attribute() -> None:
    layer = tar(
        [
            TarItem(b"./", "dir", mode=0o1755, uid=7, mtime_ns=-1),
            TarItem(b"empty"),
            TarItem(
                b"one", content=b"x", mode=0o4755, uid=(1 << 32) - 2, gid=(1 << 32) - 2, mtime_ns=-1_999_999_999
            ),
            TarItem(b"block", content=bytes(range(256)) * 2, mtime_ns=(1 << 33) * 10**9 + 1),
            TarItem(b"many", content=os.urandom(70_000)),
            TarItem(b"fifo", "fifo"),
            TarItem(b"null", "char", rdev=(1, 3)),
            TarItem(b"large", "block", rdev=(4095, (1 << 20) - 1)),
            TarItem(b"again", "link", link=b"one"),
            TarItem(b"sub/second", "link", link=b"many"),
            *(
                TarItem(b"s%d" % n, "symlink", link=b"t" * n)
                for n in (1, 447, 448, 449, 511, 512, 513, 4094, 4095)
            ),
            # ext4, which the reference is on, has less room than this for the attributes of one inode.
            TarItem(
                b"attributes", content=b"y", xattrs=((b"security.capability", CAPABILITY), (b"user.a", b""))
            ),
            TarItem(b"acl", mode=0o664, xattrs=((b"system.posix_acl_access", ACL), (b"user.x", b"1"))),
            TarItem(b"acls", "dir", xattrs=((b"system.posix_acl_default", ACL), (b"trusted.t", b"\0\xff"))),
            TarItem(b"link", "symlink", link=b"l" * 400, xattrs=((b"trusted.long", b"v" * 600),)),
            TarItem(b"holes", pieces=(), size=5 << 30, xattrs=((b"user.h", b"1"),)),
        ]
    )
    assert difference(unpacked([layer]), through_kernel([layer])) == []


def test_long_attributes() -> None:
    xattrs = tuple((b"user.%d" % number, bytes([number]) * 65_535) for number in range(3))
    names = tuple((b"user." + b"%03d" % number + b"n" * 247, b"v" * number) for number in range(100))
    layers = [tar([TarItem(b"f", content=b"x", xattrs=xattrs), TarItem(b"d", "dir", xattrs=names)])]
    found = through_kernel(layers)
    assert (found[b"f"].xattrs, found[b"d"].xattrs) == (xattrs, names)
    assert difference(facts_of(index_of(layers), layers), found) == []


def test_directories_of_any_size() -> None:
    short = [TarItem(b"many/%d" % number) for number in range(20_000)]
    # Names around "." and ".." in the order of bytes, and tails of every length around a block.
    odd = [TarItem(b"odd/" + name) for name in (b"!", b"-", b".-", b"...", b"..-", b".0", b"0")]
    edges = [
        TarItem(b"edge%d/" % length + bytes([97 + part]) * (length // 2 + (part and length % 2)))
        for length in range(360, 480)
        for part in (0, 1)
    ]
    long = [TarItem(b"long/" + b"%05d" % number + b"n" * 250) for number in range(300)]
    layers = [tar([*short, *odd, *edges, *long])]
    found = through_kernel(layers)
    assert difference(facts_of(index_of(layers), layers), found) == []
    assert sum(path.startswith(b"many/") for path in found) == 20_000


def test_hundreds_of_devices() -> None:
    layers = [
        tar(
            [
                TarItem(b"own/%d" % number, content=b"%d" % number * 300),
                TarItem(b"shared", content=b"%d" % number),
            ]
        )
        for number in range(300)
    ]
    assert difference(facts_of(index_of(layers), layers), through_kernel(layers)) == []


def test_sparse_files_beyond_4_gib_are_mapped_where_they_are() -> None:
    page = os.urandom(4096)
    pieces = ((0, page), (3 << 30, page * 2), ((6 << 30) + 4096, page))
    layers = [tar([TarItem(b"disk", pieces=pieces, size=(6 << 30) + 8192)])]
    image = write_erofs(index_of(layers))
    assert difference(unpacked(layers), through_kernel(layers)) == []
    # In the chunks of 32 KiB that this size allows, the pieces are not whole: they are copied, nothing else is.
    assert sum(copy.length for copy in image.copies) == 4 * 4096

    small = [tar([TarItem(b"disk", pieces=((1 << 20, page), (9 << 20, page)), size=64 << 20)])]
    assert write_erofs(index_of(small)).copies == ()
    assert difference(unpacked(small), through_kernel(small)) == []


def test_unaligned_data_are_copied_to_the_tail() -> None:
    data = os.urandom(10_000)
    layers = [
        tar([TarItem(b"odd", pieces=((3, data), (20_000, data)), size=1 << 20), TarItem(b"even", content=data)])
    ]
    image = write_erofs(index_of(layers))
    assert image.tail == 1
    assert len({copy.node for copy in image.copies}) == 1
    assert sum(copy.length for copy in image.copies) == 20_000
    assert difference(unpacked(layers), through_kernel(layers)) == []


def test_a_file_on_several_devices() -> None:
    """Hot pages on a pack, the rest in the layer."""
    content = os.urandom(100_000)
    layers = [tar([TarItem(b"program", content=content)])]
    index = index_of(layers)
    node = node_at(index, b"program")
    assert node is not None
    (own,) = index.extents(node)
    pack = content[8192:16384] + content[4096:8192]
    cold = own._replace(file_offset=16384, offset=own.offset + 16384, length=100_000 - 16384)
    placements = {
        node: [own._replace(length=4096), Extent(4096, 1, 8192, 4096), Extent(8192, 1, 0, 8192), cold]
    }
    packs = [DeviceSlot(b"pack", len(pack))]
    image = write_erofs(index, packs=packs, placements=placements)
    assert image.copies == ()
    # The layer has nothing of what is on the pack, so it must come from there.
    start = own.offset + 4096
    layer = layers[0][:start] + bytes(12288) + layers[0][start + 12288 :]
    with (
        tempfile.TemporaryDirectory() as directory,
        mounted_image(image, [layer, pack], Path(directory)) as root,
    ):
        assert (root / "program").read_bytes() == content
