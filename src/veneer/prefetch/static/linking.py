"""Which libraries the dynamic linker loads with a program: the closure of DT_NEEDED, by its own rules.

Source: glibc, ``elf/dl-load.c`` and ``elf/dl-deps.c``; for musl ``ldso/dynlink.c``. The rules, in the
linker's order:

- LD_PRELOAD and ``/etc/ld.so.preload`` come right after the program. Then breadth first, each library once.
- A name with a slash is a path. Others are looked for in the RPATH of whoever needs them, of who needs that,
  and so on up to the program, unless whoever needs them has a RUNPATH; in LD_LIBRARY_PATH; in the RUNPATH of
  whoever needs them; in ``ld.so.cache``; in the usual directories. Nobody but ldconfig reads ``ld.so.conf``.
- In each directory, subdirectories for better processors come first.
- Files of another class or machine are passed over.

Not for: libraries that a program asks for while it runs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from veneer.prefetch.static.elf import Elf, read_elf
from veneer.prefetch.static.files import File, ImageFiles, Malformed
from veneer.prefetch.static.ldcache import MAX_CACHE_SIZE, LdCache, parse_ldcache

__all__ = ["CACHE", "Linker", "Loaded"]

CACHE: Final = b"etc/ld.so.cache"
_PRELOAD: Final = b"etc/ld.so.preload"
#: A desktop program has 400.
_MOST_LIBRARIES: Final = 2000
_MOST_DIRECTORIES: Final = 200
_MOST_CONFIG: Final = 64 << 10

#: EM_ number -> what the machine is called in paths, and the levels that nearly all servers reach, best first.
_MACHINES: Final[Mapping[int, tuple[bytes, tuple[bytes, ...]]]] = {
    3: (b"i386", ()),
    21: (b"powerpc64le", (b"power9",)),
    22: (b"s390x", (b"z14", b"z13")),
    40: (b"arm", ()),
    62: (b"x86_64", (b"x86-64-v3", b"x86-64-v2")),
    183: (b"aarch64", ()),
    243: (b"riscv64", ()),
    258: (b"loongarch64", ()),
}


class _Needed(NamedTuple):
    name: bytes
    by: "Loaded"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A program, or a library of one.

    Args:
        file: which.
        name: the path that it was found by.
        elf: what it says.
        by: who needed it first; None for the program.
    """

    file: File
    name: bytes
    elf: Elf
    by: "Loaded | None" = None


class Linker:
    """The dynamic linker of one image, in one environment. For one thread.

    Args:
        files: of the image.
        environment: LD_LIBRARY_PATH and LD_PRELOAD count.
        directory: where the program is started.
        levels: subdirectories of glibc-hwcaps to look into, instead of those that nearly all servers can.
    """

    def __init__(
        self,
        files: ImageFiles,
        environment: Mapping[bytes, bytes],
        directory: bytes = b"/",
        levels: Sequence[bytes] | None = None,
    ) -> None:
        self._files = files
        self._environment = environment
        self._directory = directory
        self._given_levels = levels
        self._cache = self._read_cache()
        self._elves: dict[int, Elf | None] = {}

    def elf(self, file: File) -> Elf | None:
        """What a file says, or None if it is nothing to run."""
        if file.node not in self._elves:
            try:
                self._elves[file.node] = read_elf(self._files.reader(file), file.size)
            except Malformed:
                self._elves[file.node] = None
        return self._elves[file.node]

    def load(self, file: File) -> list[Loaded]:
        """A program (or a library that one loads), its linker, and its libraries, in the order of loading."""
        elf = self.elf(file)
        if elf is None:
            return []
        program = Loaded(file, b"/" + file.path, elf)
        loaded = [program]
        interpreter = self._files.file(elf.interpreter) if elf.interpreter else None
        if interpreter is not None and (linker := self._fitting(interpreter, elf.interpreter, program)):
            loaded.append(linker)
        # The linker looks through all names before it looks for a file, and knows files by their inodes.
        names = {one.elf.soname for one in loaded[1:]} | {one.name for one in loaded}
        nodes = {one.file.node for one in loaded}
        pending = [_Needed(name, program) for name in (*self._preloaded(), *elf.needed)]
        at = 0
        while at < len(pending) and len(loaded) < _MOST_LIBRARIES:
            name, by = pending[at]
            at += 1
            if name in names:
                continue
            names.add(name)
            library = self._find(name, by, program)
            if library is None or library.file.node in nodes:
                continue
            nodes.add(library.file.node)
            names |= {library.elf.soname, library.name} - {b""}
            loaded.append(library)
            pending += [_Needed(needed, library) for needed in library.elf.needed]
        return loaded

    # Finding one library

    def _find(self, name: bytes, by: Loaded, program: Loaded) -> Loaded | None:
        for path in self._candidates(name, by, program):
            file = self._files.file(path if path.startswith(b"/") else self._directory + b"/" + path)
            if file is not None and (found := self._fitting(file, path, by)) is not None:
                return found
        return None

    def _fitting(self, file: File, name: bytes, by: Loaded) -> Loaded | None:
        elf = self.elf(file)
        return None if elf is None or elf.kind != by.elf.kind else Loaded(file, name, elf, by)

    def _candidates(self, name: bytes, by: Loaded, program: Loaded) -> Iterator[bytes]:
        if b"/" in name:
            yield from self._expanded(name, by)
            return
        if not by.elf.runpath:
            yield from self._below(self._inherited(by, program), name, by)
        listed = self._environment.get(b"LD_LIBRARY_PATH", b"").replace(b";", b":")
        if listed:
            yield from self._below(self._split(listed, program), name, by)
        yield from self._below(self._split(by.elf.runpath, by), name, by)
        usual = tuple(self._usual(by))
        if self._cache is not None:
            for path in self._cache.find(name, self._levels(by)):
                if by.elf.default_paths or not path.startswith(tuple(one + b"/" for one in usual)):
                    yield path
        if by.elf.default_paths:
            yield from self._below(usual, name, by)

    def _inherited(self, by: Loaded, program: Loaded) -> Iterator[bytes]:
        """The directories of RPATH, up to the program."""
        at: Loaded | None = by
        seen_program = False
        while at is not None:
            yield from self._split(at.elf.rpath, at)
            seen_program |= at is program
            at = at.by
        if not seen_program:
            yield from self._split(program.elf.rpath, program)

    def _split(self, listed: bytes, whose: Loaded) -> Iterator[bytes]:
        if listed:
            for one in listed.split(b":")[:_MOST_DIRECTORIES]:
                yield from self._expanded(one or b".", whose)

    def _below(self, directories: Iterable[bytes], name: bytes, by: Loaded) -> Iterator[bytes]:
        for directory in directories:
            hwcaps = directory + b"/glibc-hwcaps"
            if self._files.directory(hwcaps) is not None:
                for level in self._levels(by):
                    yield hwcaps + b"/" + level + b"/" + name
            yield directory + b"/" + name

    def _expanded(self, text: bytes, whose: Loaded) -> Iterator[bytes]:
        """A path with $ORIGIN and the like put in; what $LIB is differs between distributions."""
        machine = self._machine(whose)
        origin = whose.name.rpartition(b"/")[0] or b"/"
        for lib in (b"lib/" + machine + b"-linux-gnu", b"lib64", b"lib"):
            out = text
            for variable, value in ((b"ORIGIN", origin), (b"PLATFORM", machine), (b"LIB", lib)):
                out = out.replace(b"${" + variable + b"}", value).replace(b"$" + variable, value)
            yield out
            if out == text or lib not in out:
                return

    def _usual(self, by: Loaded) -> Iterator[bytes]:
        """The directories that are built into linkers, of Debian's kind, of others, and of musl."""
        if self._cache is None:
            machine = self._machine(by)
            if (musl := self._files.file(b"etc/ld-musl-" + machine + b".path")) is not None:
                try:
                    listed = self._files.read(musl, 0, _MOST_CONFIG)
                except Malformed:
                    listed = b""
                yield from (one for one in listed.replace(b"\n", b":").split(b":")[:_MOST_DIRECTORIES] if one)
        wide = (b"64",) if by.elf.wide else ()
        for suffix in (b"/" + self._machine(by) + b"-linux-gnu", *wide, b""):
            yield b"/lib" + suffix
            yield b"/usr/lib" + suffix
        yield b"/usr/local/lib"

    def _machine(self, of: Loaded) -> bytes:
        return _MACHINES.get(of.elf.machine, (b"unknown", ()))[0]

    def _levels(self, of: Loaded) -> Sequence[bytes]:
        if self._given_levels is not None:
            return self._given_levels
        return _MACHINES.get(of.elf.machine, (b"", ()))[1]

    # What applies to all

    def _preloaded(self) -> list[bytes]:
        names = self._environment.get(b"LD_PRELOAD", b"").replace(b":", b" ").split()
        if (file := self._files.file(_PRELOAD)) is not None:
            with suppress(Malformed):
                names += self._files.read(file, 0, _MOST_CONFIG).replace(b":", b" ").split()
        return names[:_MOST_DIRECTORIES]

    def _read_cache(self) -> LdCache | None:
        file = self._files.file(CACHE)
        if file is None or file.size > MAX_CACHE_SIZE:
            return None
        try:
            return parse_ldcache(self._files.read(file))
        except Malformed:
            return None
