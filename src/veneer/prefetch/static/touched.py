"""Which parts of a program or library are read when it is loaded and begins to run.

What the dynamic linker reads is certain: headers, symbols, relocations (everything before the code), and
what it writes to, which is everything that is writable. Which of the code and constants run is not; how much
of them is taken depends on how much others have to do with the file.

Figures: docs/decisions/0014-static-profiles.md.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from veneer.prefetch.static.elf import DT, PF_W, PF_X, PT_GNU_EH_FRAME, Elf, Segment
from veneer.prefetch.static.files import Malformed, Read

__all__ = ["touched"]

_PAGE: Final = 4096
#: Files up to this size are taken whole: a gap in them would save less than reading it costs.
_SMALL: Final = 64 << 10
#: Code, or constants, of a program, from the beginning: of CPython all 2.8 and 2.1 MB, of Node a third.
_WHOLE: Final = 8 << 20
#: Relocations and the like, in all.
_MOST_LINKED: Final = 16 << 20
_MOST_WRITTEN: Final = 8 << 20
_MOST_LINKAGE: Final = 1 << 20
_MOST_FUNCTIONS: Final = 4096
_MOST_RELOCATIONS: Final = 1 << 20
#: EM_ number -> the relocation whose addend is a function that the linker calls.
_IRELATIVE: Final = {3: 42, 40: 160, 62: 37, 183: 1032, 243: 58, 22: 61, 21: 248}
#: EM_ number -> the relocation that adds the address at which the file is loaded.
_RELATIVE: Final = {3: 8, 40: 23, 62: 8, 183: 1027, 243: 3, 22: 12, 21: 22}

_TABLES: Final = (
    DT.HASH,
    DT.GNU_HASH,
    DT.SYMTAB,
    DT.STRTAB,
    DT.VERSYM,
    DT.VERNEED,
    DT.RELA,
    DT.REL,
    DT.RELR,
    DT.JMPREL,
)


def touched(
    elf: Elf, read: Read, size: int, *, runs: bool, called: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """Ranges of a file (start, end) that a start reads, in whole pages, ascending.

    Args:
        elf: the file.
        read: reads it.
        size: of it.
        runs: its code is what runs, or is called a lot: it is taken whole, with its constants.
        called: addresses of functions of it that are surely called.

    Raises Malformed.
    """
    if size <= _SMALL:
        return [(0, size)]
    return _pages(_parts(elf, read, runs=runs, called=called), size)


def _pages(parts: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        start, end = start // _PAGE * _PAGE, min(size, -(-end // _PAGE) * _PAGE)
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif start < end:
            out.append((start, end))
    return out


def _parts(elf: Elf, read: Read, *, runs: bool, called: Iterable[int]) -> Iterator[tuple[int, int]]:
    yield 0, _PAGE
    yield from _linked(elf)
    exceptions = next((one for one in elf.segments if one.kind == PT_GNU_EH_FRAME), None)
    for one in elf.loaded:
        if one.flags & PF_W:
            yield one.offset, one.offset + min(one.size, _MOST_WRITTEN)
        elif one.flags & PF_X and not runs:
            # The first page has what runs at the beginning and the end; the linkage table follows.
            linkage = elf.dynamic.get(DT.PLTRELSZ, 0) // 24 * 16
            yield one.offset, min(one.end, one.offset + max(_PAGE, min(linkage, _MOST_LINKAGE)))
            yield max(one.offset, one.end - 1), one.end
        elif runs:
            yield from _run(one, exceptions)
    for address in (*called, *_called(elf, read)):
        if (place := elf.place(address)) is not None:
            yield place, place + 1


def _run(one: Segment, exceptions: Segment | None) -> Iterator[tuple[int, int]]:
    """Code or constants that run, without the tables for exceptions, which linkers put last."""
    end = one.end
    if exceptions is not None and one.offset < exceptions.offset < one.end:
        end = exceptions.offset
    yield one.offset, min(end, one.offset + _WHOLE)


def _linked(elf: Elf) -> Iterator[tuple[int, int]]:
    """What the linker reads before anything runs."""
    dynamic = elf.dynamic
    sizes = {
        DT.STRTAB: dynamic.get(DT.STRSZ, 0),
        DT.RELA: dynamic.get(DT.RELASZ, 0),
        DT.REL: dynamic.get(DT.RELSZ, 0),
        DT.RELR: dynamic.get(DT.RELRSZ, 0),
        DT.JMPREL: dynamic.get(DT.PLTRELSZ, 0),
    }
    tables: list[tuple[int, int]] = []
    for tag in _TABLES:
        place = elf.place(dynamic[tag]) if tag in dynamic else None
        if place is not None:
            tables.append((place, place + min(sizes.get(tag, _PAGE), _MOST_LINKED)))
    yield from tables
    # They lie in a row, and of some nobody states the size.
    for one in elf.loaded:
        inside = [table for table in tables if one.offset <= table[0] < one.end]
        if inside:
            start, end = min(inside)[0], max(end for _, end in inside)
            yield start, min(end, start + _MOST_LINKED)


def _called(elf: Elf, read: Read) -> Iterator[int]:
    """Addresses of functions that the linker calls: those that begin and end, and those that choose others."""
    for tag in (DT.INIT, DT.FINI):
        if tag in elf.dynamic:
            yield elf.dynamic[tag]
    yield from _initial(elf, read)
    wanted = _IRELATIVE.get(elf.machine)
    for kind, _, addend in _relocations(elf, read, (DT.RELA, DT.JMPREL)):
        if kind == wanted:
            yield addend


def _initial(elf: Elf, read: Read) -> Iterator[int]:
    """The functions of DT_INIT_ARRAY: in the file, or in the relocations that put them there."""
    start, size = elf.dynamic.get(DT.INIT_ARRAY, 0), elf.dynamic.get(DT.INIT_ARRAYSZ, 0)
    place = elf.place(start)
    width = 8 if elf.wide else 4
    if place is None or not 0 < size <= _MOST_FUNCTIONS * width:
        return
    data = read(place, size // width * width)
    for (address,) in struct.iter_unpack(
        elf.order + ("Q" if elf.wide else "I"), data[: len(data) // width * width]
    ):
        if address:
            yield address
    wanted = _RELATIVE.get(elf.machine)
    for kind, at, addend in _relocations(elf, read, (DT.RELA,)):
        if kind == wanted and start <= at < start + size:
            yield addend


def _relocations(elf: Elf, read: Read, tags: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Kind, place and addend of relocations of 64-bit files; others have their addends elsewhere."""
    sizes = {DT.RELA: DT.RELASZ, DT.JMPREL: DT.PLTRELSZ}
    entry = struct.Struct(elf.order + "QQq")
    for tag in tags:
        place = elf.place(elf.dynamic.get(tag, -1))
        size = elf.dynamic.get(sizes[tag], 0) // entry.size * entry.size
        if place is None or not elf.wide or size > _MOST_RELOCATIONS * entry.size:
            continue
        data = read(place, size)
        if len(data) != size:
            raise Malformed("relocations end after the file")
        for at, info, addend in entry.iter_unpack(data):
            yield info & 0xFFFFFFFF, at, addend
