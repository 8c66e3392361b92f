"""The parser reads what other programs and our own independent writer put into tars."""

import io
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError
from veneer.index.tar import TarEntry, TarParser
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import END, TarItem, header, item_bytes, pax, tar

SECOND = 1_000_000_000


def parse(data: bytes) -> list[TarEntry]:
    parser = TarParser()
    entries = parser.feed(data) + parser.finish()
    assert parser.position == len(data)
    return entries


def parse_one(data: bytes) -> TarEntry:
    [entry] = parse(data)
    return entry


def content(entry: TarEntry, stream: bytes) -> bytes:
    """The file as a reader sees it."""
    out, place = bytearray(entry.size), entry.data
    for offset, length in entry.segments if entry.segments is not None else [(0, entry.size)]:
        out[offset : offset + length] = stream[place : place + length]
        place += length
    assert place == entry.data + entry.stored_size
    return bytes(out)


def assert_says(entry: TarEntry, item: TarItem, stream: bytes) -> None:
    v7_directory = item.form == "v7" and item.kind == "dir"
    assert entry.path.rstrip(b"/") == item.path.rstrip(b"/") if v7_directory else entry.path == item.path
    wanted = item.kind, item.mode, item.uid, item.gid, item.mtime_ns, item.link, item.rdev, dict(item.xattrs)
    got = entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.link, entry.rdev, entry.xattrs
    assert got == wanted
    if item.kind != "file":
        assert (entry.size, entry.stored_size, entry.segments) == (0, 0, None)
    elif item.pieces is None:
        assert entry.segments is None
        assert content(entry, stream) == item.content
    else:
        assert entry.size == item.size
        stored = b"".join(data for _, data in item.pieces)
        assert stream[entry.data : entry.data + entry.stored_size] == stored
        segments = [(0, entry.size)] if entry.segments is None else entry.segments
        assert sum(length for _, length in segments) == len(stored)
        for at, data in item.pieces:
            assert any(start <= at and at + len(data) <= start + length for start, length in segments)


@given(random_layers(most_layers=1))
@settings(deadline=None, max_examples=100)
def test_entries_are_what_was_written(layers: list[Layer]) -> None:
    [layer] = layers
    stream = tar(layer)
    entries = parse(stream)
    assert len(entries) == len(layer)
    starts = [sum(len(item_bytes(item)) for item in layer[:number]) for number in range(len(layer))]
    assert [entry.header for entry in entries] == starts
    for entry, item in zip(entries, layer, strict=True):
        assert_says(entry, item, stream)


@given(random_layers(most_layers=1, most_items=6), st.lists(st.integers(1, 3000), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_pieces_of_the_stream_make_no_difference(layers: list[Layer], sizes: list[int]) -> None:
    stream = tar(layers[0]) + b"whatever follows"
    parser = TarParser()
    entries: list[TarEntry] = []
    view, at, turn = memoryview(stream), 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        entries += parser.feed(view[at : at + size])
        at, turn = at + size, turn + 1
    assert entries + parser.finish() == parse(stream)


def test_an_entry_comes_before_its_data() -> None:
    stream = tar([TarItem(b"big", content=bytes(5000))])
    parser = TarParser()
    assert parser.feed(stream[:511]) == []
    [entry] = parser.feed(stream[511:512])
    assert (entry.path, entry.data, entry.size) == (b"big", 512, 5000)


def tarfile_members() -> Iterable[tuple[tarfile.TarInfo, bytes]]:
    names = ["short", "d" * 90 + "/" + "n" * 60, "é" * 40, "deep/" * 60 + "name", "\udcff\udcfe", "with space"]
    for number, name in enumerate(names):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = number * 300, 0o600 + number, 1_600_000_000 + number
        info.uid, info.gid = (5_000_000, 3_000_000) if number == 2 else (number, number)
        yield info, bytes([number]) * info.size
    for kind, name in ((tarfile.DIRTYPE, "dir"), (tarfile.FIFOTYPE, "fifo"), (tarfile.CHRTYPE, "chr")):
        info = tarfile.TarInfo(name)
        info.type, info.devmajor, info.devminor = kind, 5, 1
        yield info, b""
    for kind, target in (
        (tarfile.SYMTYPE, "/" + "t" * 150),
        (tarfile.LNKTYPE, "short"),
        (tarfile.SYMTYPE, "\udc80"),
    ):
        info = tarfile.TarInfo("link to " + target[:9])
        info.type, info.linkname = kind, target
        yield info, b""


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_what_tarfile_writes(form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for info, data in tarfile_members():
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar has no room for it
                assert form == tarfile.USTAR_FORMAT
    compare_with_tarfile(buffer.getvalue())


def compare_with_tarfile(stream: bytes) -> None:
    kinds = {
        tarfile.REGTYPE: "file",
        tarfile.AREGTYPE: "file",
        tarfile.GNUTYPE_SPARSE: "file",
        tarfile.DIRTYPE: "dir",
        tarfile.FIFOTYPE: "fifo",
        tarfile.CHRTYPE: "char",
        tarfile.BLKTYPE: "block",
        tarfile.SYMTYPE: "symlink",
        tarfile.LNKTYPE: "link",
    }
    with tarfile.open(fileobj=io.BytesIO(stream), encoding="utf-8", errors="surrogateescape") as archive:
        members = archive.getmembers()
        entries = parse(stream)
        assert len(entries) == len(members) > 0
        for entry, member in zip(entries, members, strict=True):
            assert entry.path.rstrip(b"/") == os.fsencode(member.name)
            assert entry.kind == kinds[member.type]
            assert (entry.mode, entry.uid, entry.gid) == (member.mode & 0o7777, member.uid, member.gid)
            assert entry.mtime_ns // SECOND == int(member.mtime // 1)
            assert entry.link == os.fsencode(member.linkname)
            if member.ischr() or member.isblk():
                assert entry.rdev == (member.devmajor, member.devminor)
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None:
                assert content(entry, stream) == file.read()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with everything that a program can find on disk."""
    root = tmp_path / "tree"
    (root / "directory" / ("long" * 60)).mkdir(parents=True)
    (root / "plain").write_bytes(b"plain" * 1000)
    os.setxattr(root / "plain", "user.bytes", b"\x00\xff=\n value")
    os.setxattr(root / "plain", "user.empty", b"")
    os.link(root / "plain", root / "another")
    (root / "symlink").symlink_to("l" * 200)
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        for number in range(40):  # more segments than the old format's first two headers have room for
            file.seek(number * 65536)
            file.write(bytes([number + 1]) * 4096)
        file.truncate(40 * 65536)
    with (root / "hole").open("wb") as file:
        file.truncate(1 << 20)
    os.utime(root / "plain", ns=(0, 1_234_567_890_123_456_789))
    os.utime(root / "sparse", ns=(0, -1_500_000_001))
    return root


GNU_TAR_OPTIONS = [
    ("--format=gnu", "--sparse"),
    ("--format=posix", "--sparse", "--sparse-version=0.0", "--xattrs"),
    ("--format=posix", "--sparse", "--sparse-version=0.1", "--xattrs"),
    ("--format=posix", "--sparse", "--sparse-version=1.0", "--xattrs"),
    ("--format=posix", "--pax-option=globexthdr.name=g,comment=of all,gid=77", "--xattrs"),
    ("--format=oldgnu",),
]


@pytest.mark.parametrize("options", GNU_TAR_OPTIONS, ids=" ".join)
def test_what_gnu_tar_writes(tree: Path, options: tuple[str, ...]) -> None:
    stream = subprocess.run(
        ["tar", "-C", tree, *options, "-cf", "-", "."], check=True, capture_output=True
    ).stdout
    compare_with_tarfile(stream)
    entries = {entry.path.removeprefix(b"./").rstrip(b"/"): entry for entry in parse(stream)}
    assert len(entries) == len(list(tree.rglob("*"))) + 1
    exact = "--format=posix" in options
    for path in tree.rglob("*"):
        entry, status = entries[os.fsencode(path.relative_to(tree))], path.lstat()
        unit = 1 if exact else SECOND
        assert entry.mtime_ns // unit == status.st_mtime_ns // unit
        if entry.kind == "file":
            assert content(entry, stream) == path.read_bytes()
    if "--sparse" in options:
        sparse, hole = entries[b"sparse"], entries[b"hole"]
        assert sparse.segments == tuple((number * 65536, 4096) for number in range(40))
        assert (hole.segments, hole.size, hole.stored_size) == ((), 1 << 20, 0)
    if "--xattrs" in options:
        first = next(
            entry for name, entry in entries.items() if name in (b"plain", b"another") and entry.kind == "file"
        )
        assert first.xattrs == {b"user.bytes": b"\x00\xff=\n value", b"user.empty": b""}
    assert entries[b"plain"].gid == (77 if "gid=77" in options[1:2][0:1] else entries[b"plain"].gid)


def test_attributes_as_libarchive_writes_them() -> None:
    # A name in percent-encoding, a value in base64 without padding, and star's spelling beside it.
    records = [
        (b"LIBARCHIVE.xattr.user.a%20name%25", b"AP8"),
        (b"LIBARCHIVE.xattr.user.both", b"AAAA"),
        (b"SCHILY.xattr.user.both", b"exact"),
        (b"LIBARCHIVE.xattr.user.c%3Dd", b"AAAA"),
        (b"SCHILY.xattr.user.c%3Dd", b"as bsdtar does"),
    ]
    entry = parse_one(pax(records) + header(b"x") + END)
    assert entry.xattrs == {
        b"user.a name%": b"\x00\xff",
        b"user.both": b"exact",
        b"user.c%3Dd": b"as bsdtar does",
    }


def test_records_overrule_the_header_and_empty_ones_do_not() -> None:
    records = [
        (b"path", b"wrong"),
        (b"path", b"the last one wins"),
        (b"uid", b""),
        (b"mtime", b"-1.5"),
        (b"SCHILY.devmajor", b"4"),
        (b"SCHILY.devminor", b"64"),
        (b"comment", b"nothing"),
    ]
    entry = parse_one(pax(records) + header(b"short", b"3", uid=7, mtime=9) + END)
    assert (entry.path, entry.uid, entry.mtime_ns) == (b"the last one wins", 7, -1_500_000_000)
    assert entry.rdev == (4, 64)


def test_a_global_header_counts_until_the_next() -> None:
    stream = pax([(b"gid", b"5"), (b"mtime", b"1.000000001"), (b"comment", b"x")], b"g") + header(b"one", gid=1)
    stream += pax([(b"gid", b"6")], b"g") + pax([(b"mtime", b"2")]) + header(b"two") + header(b"three") + END
    one, two, three = parse(stream)
    assert [(e.gid, e.mtime_ns) for e in (one, two, three)] == [
        (5, SECOND + 1),
        (6, 2 * SECOND),
        (6, SECOND + 1),
    ]


@pytest.mark.parametrize(
    ("mtime", "expected"),
    [
        (b"0", 0),
        (b"1.", SECOND),
        (b"1.0000000019", SECOND + 1),
        (b"-0.5", -SECOND // 2),
        (b"9" * 20, int("9" * 20) * SECOND),
    ],
)
def test_times_are_exact(mtime: bytes, expected: int) -> None:
    assert parse_one(pax([(b"mtime", mtime)]) + header(b"x") + END).mtime_ns == expected


@pytest.mark.parametrize("mtime", [-1, -(1 << 40), 8**11, (1 << 62) + 1])
def test_numbers_beyond_octal(mtime: int) -> None:
    assert parse_one(header(b"x", mtime=mtime) + END).mtime_ns == mtime * SECOND


def test_segments_have_one_form() -> None:
    pieces = ((0, b"a"), (1, b"b"), (5, b""), (7, b"c"))
    assert parse_one(tar([TarItem(b"s", pieces=pieces, size=9)])).segments == ((0, 2), (7, 1))
    assert parse_one(tar([TarItem(b"no hole", pieces=((0, b"a"), (1, b"b")), size=2)])).segments is None
    assert parse_one(tar([TarItem(b"empty", pieces=(), size=0)])).segments is None


def test_checksums_of_signed_bytes_count_too() -> None:
    block = bytearray(header(b"\xff\xfe\x80"))
    unsigned = int(block[148:154], 8)
    block[148:156] = b"%06o\0 " % (unsigned - 3 * 256)
    assert parse_one(bytes(block) + END).path == b"\xff\xfe\x80"


def test_types_that_old_tars_have() -> None:
    stream = header(b"dir/", b"\0") + header(b"contiguous", b"7", size=3) + b"abc".ljust(512, b"\0")
    stream += header(b"file/", b"0") + header(b"link", b"1", size=999, link=b"contiguous") + END
    kinds = [(entry.path, entry.kind, entry.size) for entry in parse(stream)]
    assert kinds == [
        (b"dir/", "dir", 0),
        (b"contiguous", "file", 3),
        (b"file/", "file", 0),
        (b"link", "link", 0),
    ]


def test_prefixes_of_ustar_star_and_gnu() -> None:
    times = b"00000000000 00000000000 "
    star = header(b"name", tail=b"p" * 131 + times + bytes(8) + b"tar\0")
    gnu = header(b"name", magic=b"ustar  \0", tail=b"00000000000\0")
    v7 = header(b"name", magic=bytes(8), tail=b"prefix")
    assert [entry.path for entry in parse(header(b"name", tail=b"prefix") + star + gnu + v7 + END)] == [
        b"prefix/name",
        b"p" * 131 + b"/name",
        b"name",
        b"name",
    ]


def test_a_tar_may_end_without_the_zeros_and_garbage_may_follow_them() -> None:
    stream = header(b"x", size=5) + b"12345"
    assert parse(b"") == []
    assert parse_one(stream).size == 5  # not even the padding
    assert parse_one(stream + bytes(507)).size == 5
    assert parse_one(stream + bytes(507) + bytes(512)).size == 5
    assert parse_one(stream + bytes(507) + END + b"\xff" * 1000).size == 5


def test_every_cut_within_headers_or_data_is_noticed() -> None:
    items = [
        TarItem(b"n" * 150, content=b"data", xattrs=((b"user.a", b"b"),)),
        TarItem(b"s", pieces=((0, b"a"), (99, b"b")), size=200),
        TarItem(b"g" * 150, pieces=tuple((n * 10, b"a") for n in range(9)), size=200, form="gnu", sparse="old"),
    ]
    stream = b"".join(map(item_bytes, items))
    ends = {0}
    for number in range(len(items)):
        whole = len(b"".join(map(item_bytes, items[: number + 1])))
        entry = parse(stream)[number]
        ends |= set(range(entry.data + entry.stored_size, whole + 1))
    for cut in range(0, len(stream) + 1, 7):
        parser = TarParser()
        parser.feed(stream[:cut])
        if cut in ends:
            parser.finish()
        else:
            with pytest.raises(IntegrityError, match="truncated"):
                parser.finish()
