"""Files that are not what they claim to be cost nothing but the hint that they could have been."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.prefetch.static.images import file, image, link, program
from veneer.index.model import ImageIndex
from veneer.prefetch.static.elf import DT, read_elf
from veneer.prefetch.static.files import ImageFiles, Malformed, Read, ReadNode
from veneer.prefetch.static.ldcache import parse_ldcache
from veneer.prefetch.static.locales import locale_files
from veneer.prefetch.static.python_imports import MAX_SOURCE, imports_of
from veneer.prefetch.static.start import Command, static_profile
from veneer.prefetch.static.symbols import read_symbols
from veneer.prefetch.static.touched import touched
from veneer.testing.tars import TarItem

#: What reading one file may take in all: far less than memory has, far more than a real one needs.
MOST = 200 << 20
LIBRARY = Path("/lib/x86_64-linux-gnu/libz.so.1").read_bytes()
CACHE = Path("/etc/ld.so.cache").read_bytes()

edits = st.lists(st.tuples(st.integers(0, 1 << 14), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)


def edited(data: bytes, changes: list[tuple[int, bytes]], size: int) -> bytes:
    out = bytearray(data[: len(data) if size < 0 else size])
    for at, new in changes:
        if at < len(out):
            out[at : at + len(new)] = new
    return bytes(out)


def reader(data: bytes) -> Read:
    taken = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal taken
        taken += length
        assert offset >= 0
        assert length >= 0
        assert taken < MOST
        return data[offset : offset + length]

    return read


@given(edits, st.sampled_from([-1, -1, -1, 0, 15, 64, 100, 1000, 9000]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_damaged_library_is_refused_or_read(changes: list[tuple[int, bytes]], size: int, runs: bool) -> None:
    data = edited(LIBRARY, changes, size)
    try:
        elf = read_elf(reader(data), len(data))
        read_symbols(elf, reader(data))
        ranges = touched(elf, reader(data), len(data), runs=runs)
    except Malformed:
        return
    assert all(0 <= start < end <= len(data) for start, end in ranges)


@given(
    st.dictionaries(
        st.sampled_from(sorted(v for k, v in vars(DT).items() if k.isupper())), st.integers(0, 2**64 - 1)
    )
)
@settings(deadline=None)
def test_a_dynamic_section_may_say_anything(entries: dict[int, int]) -> None:
    elf = read_elf(reader(LIBRARY), len(LIBRARY))
    said = replace(elf, dynamic={**elf.dynamic, **entries})
    try:
        read_symbols(said, reader(LIBRARY))
        ranges = touched(said, reader(LIBRARY), len(LIBRARY), runs=True)
    except Malformed:
        return
    assert all(0 <= start < end <= len(LIBRARY) for start, end in ranges)


def test_a_real_library_is_read_as_binutils_do() -> None:
    for path in ("/bin/bash", "/lib/x86_64-linux-gnu/libm.so.6", "/usr/bin/git"):
        data = Path(path).read_bytes()
        elf = read_elf(reader(data), len(data))
        said = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
        assert [name.decode() for name in elf.needed] == re.findall(r"\(NEEDED\).*\[(.*)\]", said)
        table = subprocess.run(
            ["readelf", "--dyn-syms", "-W", path], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in table.stdout.splitlines()]
        rows = [row for row in rows if len(row) > 7 and row[0].rstrip(":").isdigit()]
        plain = {row[7].partition("@")[0] for row in rows if row[6] != "UND" and row[3] in ("FUNC", "IFUNC")}
        symbols = read_symbols(elf, reader(data))
        assert {name.decode() for name in symbols.had} == plain
        assert {name.decode() for name in symbols.needed} == {
            row[7].partition("@")[0] for row in rows if row[6] == "UND"
        }


def test_the_cache_of_this_machine_is_read_as_ldconfig_does() -> None:
    said = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    expected: dict[bytes, list[bytes]] = {}
    for name, path in re.findall(r"^\t(\S+) \(libc6.*?\) => (\S+)$", said, re.MULTILINE):
        expected.setdefault(name.encode(), []).append(path.encode())
    cache = parse_ldcache(CACHE)
    assert expected
    assert {name: cache.find(name, ()) for name in expected} == expected
    assert cache.find(b"libnothing.so", ()) == []


@given(edits, st.sampled_from([-1, -1, 0, 20, 47, 48, 500]))
@settings(deadline=None, max_examples=150)
def test_a_damaged_cache_is_refused_or_read(changes: list[tuple[int, bytes]], size: int) -> None:
    try:
        parse_ldcache(edited(CACHE, changes, size)).find(b"libc.so.6", (b"x86-64-v3",))
    except Malformed:
        return


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_a_locale_archive_may_be_anything(data: bytes) -> None:
    archive = file("usr/lib/locale/locale-archive", b"\x09\x01\x02\xde" + data)
    index, read = image([archive])
    for found, start, end in locale_files(ImageFiles(index, read), b"en_US.UTF-8", every=True):
        assert found.path == b"usr/lib/locale/locale-archive"
        assert start <= end


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@settings(deadline=None, max_examples=50)
def test_python_source_may_be_anything(source: bytes) -> None:
    imports_of(source, (3, 11))
    imports_of(b"import os\n" + source, (3, 11), main=True)


@pytest.mark.parametrize(
    "source",
    [
        b"(" * 100_000,
        b"-" * 200_000 + b"1",
        b"x" + b".a" * 150_000,
        b"x = " + b"[" * 199 + b"]" * 199,
        b"if x:\n" + b"".join(b" " * depth + b"if x:\n" for depth in range(1, 150)),
        b"a" + b"+a" * 200_000,
        b"x" + b"(a" * 90_000 + b")" * 90_000,
        b"import a\n" * 10_000,
        b"\0import a",
        b"# coding: no-such\nimport a",
        b"x" * (MAX_SOURCE + 1),
    ],
)
def test_python_source_may_be_nested_without_end(source: bytes) -> None:
    imports_of(source, (3, 11))


def start_of(index: ImageIndex, read: ReadNode) -> None:
    command = Command.create(["/bin/python3", "-m", "a"], ["LANG=en_US.UTF-8", "LD_PRELOAD=x.so"], "/")
    profile = static_profile(index, read, command)
    sizes = {device.diff_id: device.spans.size for device in index.devices}
    assert all(use.end <= sizes[use.layer] for use in profile.uses)


@given(
    edits,
    st.binary(max_size=64),
    st.sampled_from(["a.py", "a/__init__.py", "a/__main__.py", "__pycache__/a.cpython-311.pyc"]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_an_image_may_be_anything(changes: list[tuple[int, bytes]], junk: bytes, name: str) -> None:
    damaged = edited(LIBRARY, changes, -1)
    layer = [
        program("bin/python3.11", damaged),
        link("bin/python3", "python3.11"),
        file("lib/python3.11/os.py", junk),
        file("lib/python3.11/a.py", b"import a.b, c\nfrom . import d\nfrom .... import e\n"),
        file("lib/python3.11/c.so", damaged),
        file("x.so", damaged),
        file("etc/ld.so.cache", edited(CACHE, changes, -1)),
        file("etc/ld.so.preload", junk),
        file("usr/lib/locale/locale-archive", junk),
        file(f"lib/python3.11/{name}", junk),
    ]
    start_of(*image(layer))


def test_modules_that_import_each_other_come_to_an_end() -> None:
    modules = [
        file(f"lib/python3.11/m{number}.py", f"from m{number + 1} import *\nimport m{number // 2}\n".encode())
        for number in range(1500)
    ]
    index, read = image([program("bin/python3.11", LIBRARY), file("lib/python3.11/os.py"), *modules])
    command = Command.create(["/bin/python3.11", "-c", "import m0"], [], "/")
    assert len(static_profile(index, read, command).uses) > 100


def test_no_more_of_an_image_is_read_than_is_reasonable() -> None:
    index, read = image([program("bin/a", LIBRARY), TarItem(b"b", size=1 << 40, pieces=((0, b"x"),))])
    files = ImageFiles(index, read, most=100_000)
    found = files.file(b"bin/a")
    large = files.file(b"b")
    assert found is not None
    assert large is not None
    assert files.read(found, 0, 10) == LIBRARY[:10]
    with pytest.raises(Malformed):
        files.read(large)
    with pytest.raises(Malformed):
        files.read(found)
    assert files.exhausted
