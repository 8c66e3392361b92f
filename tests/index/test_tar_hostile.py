"""Whatever comes as a tar, the parser answers with entries or an IntegrityError, in bounded memory."""

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import IntegrityError
from veneer.index.tar import TarEntry, TarParser
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import END, TarItem, header, item_bytes, octal, pax, tar

MIB = 1 << 20


def parse(data: bytes) -> list[TarEntry]:
    parser = TarParser()
    return parser.feed(data) + parser.finish()


def accepted(data: bytes) -> list[TarEntry]:
    """The entries, or none if the tar is refused; nothing else may come out."""
    try:
        return parse(data)
    except IntegrityError:
        return []


def sane(entry: TarEntry) -> bool:
    """What everything behind the parser relies on."""
    segments = [(0, entry.size)] if entry.segments is None else list(entry.segments)
    ends = [0, *(number for start, length in segments for number in (start, start + length))]
    return (
        len(entry.path) <= 4095
        and 0 <= entry.mode <= 0o7777
        and 0 <= entry.size < 1 << 63
        and 0 <= entry.header < entry.data < 1 << 63
        and sum(length for _, length in segments) == entry.stored_size
        and ends == sorted(ends)
        and ends[-1] <= entry.size
    )


@given(st.lists(st.binary(max_size=700), max_size=6).map(b"".join))
@settings(deadline=None, max_examples=100)
def test_random_bytes(data: bytes) -> None:
    assert all(map(sane, accepted(data)))


@st.composite
def mutated_tars(draw: st.DrawFn) -> bytes:
    layers: list[Layer] = draw(random_layers(most_layers=1, most_items=6))
    data = bytearray(tar(layers[0]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    if draw(st.booleans()):  # right checksums again, so that more than the checksum is tested
        for at in range(0, len(data) - 511, 512):
            block = data[at : at + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(data)


@given(mutated_tars())
@settings(deadline=None, max_examples=300)
def test_mutated_tars(data: bytes) -> None:
    assert all(map(sane, accepted(data)))


def sparse(records: dict[bytes, bytes], data: bytes = b"", size: int | None = None) -> bytes:
    body = data + bytes(-len(data) % 512)
    records = {b"GNU.sparse.size": b"1000", **records}
    return pax(records.items()) + header(b"s", size=len(data) if size is None else size) + body + END


def inner_map(text: bytes) -> bytes:
    version = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}
    return sparse(version, text + bytes(-len(text) % 512))


def with_slots(*slots: tuple[bytes, bytes]) -> bytes:
    tail = bytes(41) + b"".join(a + b for a, b in slots).ljust(97, b"\0") + octal(100, 12)
    return header(b"s", b"S", size=10, magic=b"ustar  \0", tail=tail) + bytes(512) + END


PLAIN = header(b"x") + END

REFUSED: dict[str, tuple[bytes, str]] = {
    "a wrong checksum": (header(b"x").replace(b"x", b"y", 1) + END, "checksum"),
    "letters in a number": (header(b"x").replace(b"0000644", b"000_644") + END, "checksum|not a number"),
    "an unknown type": (header(b"x", b"Z") + END, "unknown entry type"),
    "a volume label": (header(b"x", b"V") + END, "unknown entry type"),
    "zeros inside": (header(b"x") + bytes(512) + header(b"y") + END, "zeros inside"),
    "a negative size": (header(b"x", size=-1) + END, "size -1 is impossible"),
    "a negative size of a link": (header(b"x", b"1", size=-1) + END, "size -1 is impossible"),
    "a size of 2^63": (pax([(b"size", b"9223372036854775808")]) + PLAIN, "impossible"),
    "a size that leaves no room": (pax([(b"size", b"9223372036854775807")]) + PLAIN, "impossible"),
    "a negative owner": (header(b"x", uid=-1) + END, "owner"),
    "the owner that chown ignores": (header(b"x", gid=(1 << 32) - 1) + END, "owner"),
    "a device number too large": (header(b"x", b"3", rdev=(4096, 0)) + END, "device number"),
    "an endless extended header": (header(b"x", b"x", size=MIB + 1), "extended header of 1048577"),
    "an endless long name": (header(b"x", b"L", size=1 << 40), "extended header of"),
    "a negative extended header": (header(b"x", b"x", size=-5), "extended header of -5"),
    "a long path": (pax([(b"path", b"p" * 4096)]) + PLAIN, "more than 4095"),
    "a long link": (pax([(b"linkpath", b"p" * 4096)]) + header(b"x", b"2") + END, "more than 4095"),
    "a NUL in a path": (pax([(b"path", b"a\0b")]) + PLAIN, "NUL"),
    "two extended headers": (pax([]) + pax([]) + PLAIN, "two extended headers"),
    "two names": (
        header(b"L", b"L", size=1) + bytes(512) + pax([(b"path", b"p")]) + header(b"x"),
        "both GNU and PAX",
    ),
    "an extended header of nothing": (pax([(b"path", b"p")]) + END, "not followed by an entry"),
    "a global header in between": (pax([]) + pax([], b"g") + PLAIN, "global header"),
    "a global path": (pax([(b"path", b"p")], b"g") + PLAIN, "only be true of one entry"),
    "global attributes": (pax([(b"SCHILY.xattr.user.a", b"")], b"g") + PLAIN, "only be true of one"),
    "a record without length": (header(b"x", b"x", size=4) + b"a=b\n".ljust(512, b"\0"), "no record at"),
    "a record too long": (header(b"x", b"x", size=9) + b"99 uid=1\n".ljust(512, b"\0"), "wrong length"),
    "a record without end": (header(b"x", b"x", size=9) + b"9 uid=123".ljust(512, b"\0"), "wrong length"),
    "a signed number": (pax([(b"uid", b"+1")]) + PLAIN, "not a number"),
    "a number in other digits": (pax([(b"uid", "١".encode())]) + PLAIN, "not a number"),
    "a time with an exponent": (pax([(b"mtime", b"1e9")]) + PLAIN, "not a time"),
    "an attribute without name": (pax([(b"SCHILY.xattr.", b"")]) + PLAIN, "attribute name"),
    "a long attribute name": (pax([(b"SCHILY.xattr." + b"n" * 256, b"")]) + PLAIN, "attribute name"),
    "a large attribute": (pax([(b"SCHILY.xattr.user.a", bytes(65537))]) + PLAIN, "65537 bytes"),
    "too many attributes": (
        pax([(b"SCHILY.xattr.user.%0200d" % n, b"") for n in range(330)]) + PLAIN,
        "too many names",
    ),
    "broken base64": (pax([(b"LIBARCHIVE.xattr.user.a", b"A")]) + PLAIN, "base64"),
    "sparse: no size": (sparse({b"GNU.sparse.size": b"", b"GNU.sparse.map": b"0,1"}, b"a"), "no size"),
    "sparse: two sizes": (sparse({b"GNU.sparse.realsize": b"5", b"GNU.sparse.map": b""}), "no size, or two"),
    "sparse: a huge size": (
        sparse({b"GNU.sparse.size": b"9223372036854775808", b"GNU.sparse.map": b""}),
        "size 9223372036854775808 is impossible",
    ),
    "sparse: an unknown version": (sparse({b"GNU.sparse.major": b"2"}), "format version"),
    "sparse: an odd map": (sparse({b"GNU.sparse.map": b"0,1,2"}, b"a"), "odd number"),
    "sparse: a wrong count": (
        sparse({b"GNU.sparse.map": b"0,0", b"GNU.sparse.numblocks": b"2"}),
        "than it says",
    ),
    "sparse: overlapping": (sparse({b"GNU.sparse.map": b"0,5,4,5"}, b"a" * 10), "the sparse map has"),
    "sparse: descending": (sparse({b"GNU.sparse.map": b"500,5,4,5"}, b"a" * 10), "the sparse map has"),
    "sparse: beyond the end": (sparse({b"GNU.sparse.map": b"996,5"}, b"a" * 5), "the sparse map has"),
    "sparse: more than is stored": (sparse({b"GNU.sparse.map": b"0,10"}, b"a" * 5), "5 are stored"),
    "sparse: less than is stored": (sparse({b"GNU.sparse.map": b"0,10"}, b"a" * 15), "15 are stored"),
    "sparse: offsets without lengths": (
        pax([(b"GNU.sparse.size", b"9"), *[(b"GNU.sparse.offset", b"0")] * 2]) + header(b"s"),
        "out of order",
    ),
    "sparse: a map of letters": (inner_map(b"many\n"), "not a number"),
    "sparse: a map that never counts": (inner_map(b"1" * 600), "no count"),
    "sparse: too many segments": (inner_map(b"100001\n"), "too many segments"),
    "sparse: a map without end": (inner_map(b"2\n0\n1\n"), "longer than the stored data"),
    "sparse: a map of long numbers": (inner_map(b"1\n" + b"0" * 9000 + b"\n1\n"), "does not end"),
    "sparse: old and negative": (with_slots((octal(-5, 12), octal(10, 12))), "the sparse map has"),
    "sparse: old and overlapping": (with_slots(*[(octal(0, 12), octal(5, 12))] * 2), "the sparse map has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(IntegrityError, match=why) as caught:
        parse(data)
    assert "tar entry" in caught.value.message
    assert "at offset" in caught.value.message


def test_a_message_names_the_entry_and_where_it_begins() -> None:
    good = item_bytes(TarItem(b"good", content=b"x" * 600))
    bad = pax([(b"path", b"some/\xff\n" + b"n" * 4000 + b"g" * 200), (b"uid", b"0")]) + header(b"short")
    with pytest.raises(IntegrityError) as caught:
        parse(good + bad + END)
    assert caught.value.message == (
        f"tar entry 'short', header at offset {len(good)}: a path or link target of more than 4095 bytes"
    )
    bad = pax([(b"path", b"some/\xff\n" + b"n" * 400)]) + header(b"short", b"Z")
    with pytest.raises(IntegrityError, match=r"header at offset 1536: the unknown entry type b'Z'"):
        parse(good + bad + END)


def peak_of(pieces: Iterator[bytes]) -> int:
    """Most memory that the parser took at once; its answer may be an error."""
    parser = TarParser()
    tracemalloc.start()
    try:
        for piece in pieces:
            parser.feed(piece)
    except IntegrityError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_bounded() -> None:
    def endless(start: bytes, piece: bytes) -> Iterator[bytes]:
        yield start
        for _ in range(400):
            yield piece

    zeros = bytes(64 << 10)
    # 25 MiB of file data, of an extended header, of segments in the old format, of a map that does not end.
    assert peak_of(endless(header(b"x", size=1 << 40), zeros)) < MIB
    assert peak_of(endless(header(b"x", b"x", size=MIB), zeros)) < 4 * MIB
    slot = (octal(0, 12) + octal(0, 12)) * 21 + b"\1" + bytes(7)
    first = header(b"s", b"S", magic=b"ustar  \0", tail=bytes(41 + 96) + b"\1" + octal(1 << 40, 12))
    assert peak_of(endless(first, slot * 128)) < 16 * MIB
    version = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"1")]
    mapped = pax(version) + header(b"s", size=1 << 40) + b"100000\n".ljust(512, b"0")
    assert peak_of(endless(mapped, b"0" * (64 << 10))) < 16 * MIB
    # Global headers say at most three things, however many there are.
    globals_ = b"".join(pax([(b"comment.%d" % n, bytes(900))], b"g") for n in range(30))
    assert peak_of(endless(b"", globals_)) < MIB
