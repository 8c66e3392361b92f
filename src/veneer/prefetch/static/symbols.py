"""The dynamic symbols of a program or library: what it needs of others, and what it has for them.

Source: the generic ABI, chapters 4 (symbol table) and 5 (hash table); ``DT_GNU_HASH`` as glibc has it.
"""

import struct
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from veneer.prefetch.static.elf import DT, Elf
from veneer.prefetch.static.files import Malformed, Read

__all__ = ["Symbols", "read_symbols"]

#: The largest library of a distribution, of LLVM, has 50,000.
_MOST: Final = 1 << 17
_MOST_NAMES: Final = 16 << 20
_STT_FUNC: Final = 2
_STT_GNU_IFUNC: Final = 10
_SHN_UNDEF: Final = 0


@dataclass(frozen=True, slots=True)
class Symbols:
    """Names of functions.

    Args:
        needed: of others.
        had: for others -> the address, of the function or of what chooses it.
        chosen: those of ``had`` that the linker has to choose at the start.
    """

    needed: frozenset[bytes] = frozenset()
    had: dict[bytes, int] = field(default_factory=dict)
    chosen: frozenset[bytes] = frozenset()


def read_symbols(elf: Elf, read: Read) -> Symbols:
    """The symbols of a file; none if it has no table of them. Raises Malformed."""
    place, names_at = elf.place(elf.dynamic.get(DT.SYMTAB, -1)), elf.place(elf.dynamic.get(DT.STRTAB, -1))
    entry = struct.Struct(elf.order + ("IBBHQQ" if elf.wide else "IIIBBH"))
    count = _count(elf, read)
    length = elf.dynamic.get(DT.STRSZ, 0)
    if place is None or names_at is None or not count:
        return Symbols()
    if count > _MOST or length > _MOST_NAMES:
        raise Malformed(f"{count} symbols")
    names, table = read(names_at, length), read(place, count * entry.size)
    needed: set[bytes] = set()
    had: dict[bytes, int] = {}
    chosen: set[bytes] = set()
    # The first one is none.
    for fields in islice(entry.iter_unpack(table[: len(table) // entry.size * entry.size]), 1, None):
        if elf.wide:
            at, info, _, section, value, _ = fields
        else:
            at, value, _, info, _, section = fields
        kind = info & 15
        if section != _SHN_UNDEF and kind not in (_STT_FUNC, _STT_GNU_IFUNC):
            continue
        name = names[at : names.find(b"\0", at)]
        if section == _SHN_UNDEF:
            needed.add(name)
            continue
        had[name] = value
        if kind == _STT_GNU_IFUNC:
            chosen.add(name)
    return Symbols(frozenset(needed), had, frozenset(chosen))


def _count(elf: Elf, read: Read) -> int:
    """How many symbols there are, which only the hash tables tell."""
    if (place := elf.place(elf.dynamic.get(DT.HASH, -1))) is not None:
        head = read(place, 8)
        return int(struct.unpack(elf.order + "II", head)[1]) if len(head) == 8 else 0
    if (place := elf.place(elf.dynamic.get(DT.GNU_HASH, -1))) is None:
        return 0
    head = read(place, 16)
    if len(head) < 16:
        return 0
    buckets, first, words, _ = struct.unpack(elf.order + "IIII", head)
    if buckets > _MOST or words > _MOST:
        raise Malformed("a hash table without end")
    at = place + 16 + words * (8 if elf.wide else 4)
    starts = read(at, 4 * buckets)
    last = max(
        (one for (one,) in struct.iter_unpack(elf.order + "I", starts[: len(starts) // 4 * 4])), default=0
    )
    if last < first:
        return int(first)
    if last - first > _MOST:
        raise Malformed("a hash table without end")
    # The chain of the last bucket ends with an odd hash.
    chain = read(at + 4 * buckets + 4 * (last - first), 4 * _MOST)
    for number, (one,) in enumerate(struct.iter_unpack(elf.order + "I", chain[: len(chain) // 4 * 4])):
        if one & 1:
            return int(last + number + 1)
    raise Malformed("a hash table without end")
