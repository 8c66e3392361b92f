"""ELF files as far as the dynamic linker looks at them, read as data.

Source: the generic ABI (gabi.xinuos.com, chapters 4 and 5) and glibc's elf.h. Section headers are not looked
at: neither the kernel nor the linker does, and a file may have none.

Every count and length is held against :data:`_MOST_HEADERS` and its like before anything is read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from veneer.prefetch.static.files import Malformed, Read

__all__ = ["DT", "PF_W", "PF_X", "PT_LOAD", "Elf", "Segment", "is_elf", "read_elf"]

MAGIC: Final = b"\x7fELF"
PT_LOAD: Final = 1
PT_DYNAMIC: Final = 2
PT_INTERP: Final = 3
PT_GNU_EH_FRAME: Final = 0x6474E550
PF_X: Final = 1
PF_W: Final = 2
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
_DF_1_NODEFLIB: Final = 0x800

#: The kernel takes as many program headers as fit into 64 KiB; linkers write a dozen.
_MOST_HEADERS: Final = 512
_MOST_DYNAMIC: Final = 4096
#: PATH_MAX.
_MOST_NAME: Final = 4096
_MOST_NEEDED: Final = 1024


class DT:
    """Tags of the dynamic section."""

    NEEDED: Final = 1
    PLTRELSZ: Final = 2
    HASH: Final = 4
    STRTAB: Final = 5
    SYMTAB: Final = 6
    RELA: Final = 7
    RELASZ: Final = 8
    STRSZ: Final = 10
    INIT: Final = 12
    FINI: Final = 13
    SONAME: Final = 14
    RPATH: Final = 15
    REL: Final = 17
    RELSZ: Final = 18
    JMPREL: Final = 23
    INIT_ARRAY: Final = 25
    INIT_ARRAYSZ: Final = 27
    RUNPATH: Final = 29
    RELRSZ: Final = 35
    RELR: Final = 36
    GNU_HASH: Final = 0x6FFFFEF5
    VERSYM: Final = 0x6FFFFFF0
    FLAGS_1: Final = 0x6FFFFFFB
    VERNEED: Final = 0x6FFFFFFE


class Segment(NamedTuple):
    """A program header: ``size`` bytes at ``offset`` of the file are at ``address`` in memory."""

    kind: int
    flags: int
    offset: int
    address: int
    size: int

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Elf:
    """A program or library.

    Args:
        wide: of 64 bits.
        order: ``<`` or ``>``, for struct.
        machine: EM_ number.
        segments: of the kinds that matter.
        interpreter: the program that loads it, "" for none.
        needed: names of libraries, in order.
        soname: its own name among libraries, "" for none.
        rpath: where to look for libraries, unless it has a runpath; "" for nowhere.
        runpath: where to look for those that it needs itself.
        default_paths: libraries are looked for in the usual places, too.
        dynamic: the other entries of its dynamic section, the first of each tag.
    """

    wide: bool
    order: str
    machine: int
    segments: tuple[Segment, ...]
    interpreter: bytes
    needed: tuple[bytes, ...]
    soname: bytes
    rpath: bytes
    runpath: bytes
    default_paths: bool
    dynamic: dict[int, int]

    @property
    def kind(self) -> tuple[bool, str, int]:
        """Files that go together agree in this."""
        return self.wide, self.order, self.machine

    @property
    def loaded(self) -> list[Segment]:
        """What is mapped into memory, in order of the file."""
        return sorted(one for one in self.segments if one.kind == PT_LOAD)

    def place(self, address: int) -> int | None:
        """Where in the file a byte in memory is."""
        return _place(self.segments, address)


def is_elf(head: bytes) -> bool:
    """Whether a file that begins so is one."""
    return head.startswith(MAGIC)


def read_elf(read: Read, size: int) -> Elf:
    """The file of ``size`` bytes that ``read`` reads. Raises Malformed when it is no ELF file to run."""
    ident = read(0, 16)
    if len(ident) < 16 or not is_elf(ident):
        raise Malformed("no ELF file")
    wide, order = {1: False, 2: True}.get(ident[4]), {1: "<", 2: ">"}.get(ident[5])
    if wide is None or order is None:
        raise Malformed("an ELF file of an unknown class")
    header = struct.Struct(order + ("HHIQQQIHHH" if wide else "HHIIIIIHHH"))
    kind, machine, _, _, headers_at, _, _, _, entry_size, count = header.unpack(_exactly(read, 16, header.size))
    if kind not in (_ET_EXEC, _ET_DYN):
        raise Malformed(f"an ELF file of type {kind}, which nobody runs")
    segments = tuple(_segments(read, headers_at, entry_size, count, wide=wide, order=order, size=size))
    interpreter = b""
    for one in segments:
        if one.kind == PT_INTERP:
            interpreter = _until_nul(read, one.offset, min(one.size, _MOST_NAME))
            break
    tags = _dynamic(read, segments, wide=wide, order=order)
    dynamic: dict[int, int] = {}
    for tag, value in tags:
        dynamic.setdefault(tag, value)
    strings = _Strings(read, segments, dynamic)
    needed = [strings.get(value) for tag, value in tags if tag == DT.NEEDED]
    if len(needed) > _MOST_NEEDED:
        raise Malformed(f"it needs {len(needed)} libraries")
    rpath, runpath = strings.of(DT.RPATH), strings.of(DT.RUNPATH)
    return Elf(
        wide,
        order,
        machine,
        segments,
        interpreter,
        tuple(needed),
        strings.of(DT.SONAME),
        b"" if DT.RUNPATH in dynamic else rpath,
        runpath,
        not dynamic.get(DT.FLAGS_1, 0) & _DF_1_NODEFLIB,
        dynamic,
    )


def _exactly(read: Read, offset: int, length: int) -> bytes:
    data = read(offset, length)
    if len(data) != length:
        raise Malformed("it ends too early")
    return data


def _segments(
    read: Read, at: int, entry_size: int, count: int, *, wide: bool, order: str, size: int
) -> Iterator[Segment]:
    entry = struct.Struct(order + ("IIQQQQQQ" if wide else "IIIIIIII"))
    if count > _MOST_HEADERS or (count and entry_size != entry.size):
        raise Malformed(f"{count} program headers of {entry_size} bytes")
    for fields in entry.iter_unpack(_exactly(read, at, count * entry.size)):
        if wide:
            kind, flags, offset, address, _, length, _, _ = fields
        else:
            kind, offset, address, _, length, _, flags, _ = fields
        if kind not in (PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_GNU_EH_FRAME):
            continue
        if offset + length > size:
            raise Malformed("a segment ends after the file")
        yield Segment(kind, flags, offset, address, length)


def _dynamic(read: Read, segments: tuple[Segment, ...], *, wide: bool, order: str) -> list[tuple[int, int]]:
    entry = struct.Struct(order + ("qQ" if wide else "iI"))
    found: list[tuple[int, int]] = []
    for one in segments:
        if one.kind == PT_DYNAMIC:
            count = one.size // entry.size
            if count > _MOST_DYNAMIC:
                raise Malformed(f"a dynamic section of {count} entries")
            for tag, value in entry.iter_unpack(_exactly(read, one.offset, count * entry.size)):
                if tag == 0:
                    break
                found.append((tag, value))
            break
    return found


def _place(segments: tuple[Segment, ...], address: int) -> int | None:
    for one in segments:
        if one.kind == PT_LOAD and one.address <= address < one.address + one.size:
            return one.offset + address - one.address
    return None


class _Strings:
    """The string table that the dynamic section names."""

    def __init__(self, read: Read, segments: tuple[Segment, ...], dynamic: dict[int, int]) -> None:
        self._read = read
        self._dynamic = dynamic
        self._start = _place(segments, dynamic.get(DT.STRTAB, -1))
        self._size = dynamic.get(DT.STRSZ, 0)

    def of(self, tag: int) -> bytes:
        """The string that an entry is, "" without it."""
        return self.get(self._dynamic[tag]) if tag in self._dynamic else b""

    def get(self, offset: int) -> bytes:
        if self._start is None or not 0 <= offset < self._size:
            raise Malformed("a name that is in no string table")
        return _until_nul(self._read, self._start + offset, min(self._size - offset, _MOST_NAME))


def _until_nul(read: Read, offset: int, most: int) -> bytes:
    text, nul, _ = read(offset, most).partition(b"\0")
    if not nul:
        raise Malformed("a name without an end")
    return text
