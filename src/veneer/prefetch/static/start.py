"""A static profile: what a start will read, told from the image's files alone.

The programs that the command leads to, what the dynamic linker loads with each and which parts of that,
locale, and what the interpreter of a known language reads before the program of the user runs. The result is
an ordinary profile of no runs (:attr:`Profile.static`), and like every profile a hint.

Nothing that the image says is believed but for what it is a hint of: what is malformed is left out.
"""

import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from veneer.index.model import ImageIndex
from veneer.prefetch.profile import DEFAULT_WORKLOAD, Profile, Use, disjoint
from veneer.prefetch.static.command import Program, programs
from veneer.prefetch.static.elf import PF_X, Elf
from veneer.prefetch.static.files import File, ImageFiles, Malformed, ReadNode
from veneer.prefetch.static.languages import language_files
from veneer.prefetch.static.linking import CACHE, Linker, Loaded
from veneer.prefetch.static.locales import locale_files, locale_name
from veneer.prefetch.static.python_home import is_python
from veneer.prefetch.static.symbols import Symbols, read_symbols
from veneer.prefetch.static.touched import touched

__all__ = ["MAX_STATIC_SIZE", "Command", "static_profile"]

log = logging.getLogger(__name__)

#: Plain bytes of a static profile. What is named first matters most: the end is cut off.
MAX_STATIC_SIZE: Final = 128 << 20
#: A file that is read as a whole, at most.
_MOST_OF_A_FILE: Final = 16 << 20
_MOST_OF_AN_ARGUMENT: Final = 1 << 20
#: A program with less code is a door to a library that has the rest: python of libpython, java of libjvm.
_DOOR: Final = 64 << 10
#: What every program needs: not behind a door.
_BASIC: Final = (
    b"libc.so",
    b"libc.musl",
    b"libm.so",
    b"libdl.so",
    b"libpthread.so",
    b"librt.so",
    b"libutil.so",
    b"ld-",
)
#: Libraries -> what they read when they are initialized: the first of these that is there.
_CONFIGURED: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"libcrypto.so": (b"usr/lib/ssl/openssl.cnf", b"etc/pki/tls/openssl.cnf", b"usr/local/ssl/openssl.cnf"),
}
_NAMES_USERS: Final = frozenset(
    {b"getpwuid", b"getpwnam", b"getgrnam", b"getgrgid", b"initgroups", b"getaddrinfo"}
)
_NSSWITCH: Final = b"etc/nsswitch.conf"
#: Libraries whose code everybody uses.
_BUSY: Final = (b"libc.so", b"libc.musl", b"ld-")
#: Of a library of which the others in a process need so many functions, all is taken: measured.
_MANY_CALLED: Final = 100


@dataclass(frozen=True, slots=True)
class Command:
    """What is started, as for execve(2).

    Args:
        words: program and arguments.
        environment: of it.
        directory: where.
    """

    words: tuple[bytes, ...]
    environment: Mapping[bytes, bytes]
    directory: bytes = b"/"

    @classmethod
    def create(cls, words: Sequence[str], environment: Sequence[str], directory: str) -> "Command":
        """From what an image config says: ``NAME=value``, and "" for the root."""
        pairs = (entry.encode("utf-8", "surrogateescape").partition(b"=") for entry in environment)
        return cls(
            tuple(word.encode("utf-8", "surrogateescape") for word in words),
            {name: value for name, _, value in pairs},
            posixpath.normpath("/" + directory).encode("utf-8", "surrogateescape"),
        )


def static_profile(
    index: ImageIndex, read: ReadNode, command: Command, *, workload: str = DEFAULT_WORKLOAD, image: str = ""
) -> Profile:
    """What starting a command will read of an image; without a use if that cannot be told.

    Args:
        index: the image.
        read: its contents.
        command: what is started.
        workload: what to call it.
        image: digest of its manifest, or "".

    Raises what ``read`` does.
    """
    uses: list[Use] = []
    left = MAX_STATIC_SIZE
    files = ImageFiles(index, read)
    for file, start, end in _Start(files, command).parts():
        for extent in index.extents(file.node, start, end - start):
            length = min(extent.length, left)
            if length:
                uses.append(Use(index.devices[extent.device].diff_id, extent.offset, length, 0.0, 0.0))
            left -= length
    if files.exhausted or left <= 0:
        log.info("image=%s is too large for all of a static profile", image)
    words = tuple(word.decode("utf-8", "backslashreplace") for word in command.words)
    return Profile(workload, image, words, 0, disjoint(uses))


class _Start:
    """One look at one command. For one thread."""

    def __init__(self, files: ImageFiles, command: Command) -> None:
        self._files = files
        self._command = command
        self._linker = Linker(files, command.environment, command.directory)
        self._seen: set[tuple[int, bool]] = set()
        self._known: dict[int, Symbols] = {}

    def parts(self) -> Iterator[tuple[File, int, int]]:
        """Ranges of files, in the order in which they are read; some more than once."""
        command = self._command
        found = programs(self._files, command.words, command.environment, command.directory)
        for program in found:
            if program.script:
                yield from self._whole(program.file)
            else:
                yield from self._program(program)
                for word in program.words[1:]:
                    yield from self._named(word)

    def _program(self, program: Program) -> Iterator[tuple[File, int, int]]:
        loaded = self._linker.load(program.file)
        main = _behind(loaded)
        yield from self._loaded(loaded, main)
        names = frozenset[bytes]().union(*(self._symbols(one).needed for one in main))
        environment, directory = self._command.environment, self._command.directory
        locale, python = locale_name(environment), is_python(program)
        if b"setlocale" in names or python:
            # PEP 538: Python takes another one in place of none.
            locale = locale or (b"C.UTF-8" if python else b"")
            yield from locale_files(self._files, locale, every=not python)
        if not python and not names.isdisjoint(_NAMES_USERS):
            yield from self._whole(self._files.file(_NSSWITCH))
        for file in language_files(self._files, program, environment, directory):
            if self._linker.elf(file) is not None:
                library = self._linker.load(file)
                yield from self._loaded(library, library[:1])
            else:
                yield from self._whole(file)

    def _loaded(self, loaded: Sequence[Loaded], main: Sequence[Loaded]) -> Iterator[tuple[File, int, int]]:
        """A program and its libraries; ``main`` are those whose code is the program."""
        needed = frozenset[bytes]().union(*(self._symbols(one).needed for one in loaded))
        for number, one in enumerate(loaded):
            symbols = self._symbols(one)
            called = needed.intersection(symbols.had)
            # One that has memory for all others is busy, too.
            runs = one in main or one.elf.soname.startswith(_BUSY) or b"malloc" in called
            runs |= len(called) >= _MANY_CALLED
            if (one.file.node, runs) not in self._seen:
                self._seen.add((one.file.node, runs))
                chosen = [symbols.had[name] for name in symbols.chosen & called]
                try:
                    read, size = self._files.reader(one.file), one.file.size
                    ranges = touched(one.elf, read, size, runs=runs, called=chosen)
                except Malformed:
                    ranges = [(0, min(one.file.size, 4096))]
                yield from ((one.file, start, end) for start, end in ranges)
                if number == 1:
                    yield from self._whole(self._files.file(CACHE))
                for name, paths in _CONFIGURED.items():
                    if one.elf.soname.startswith(name):
                        yield from self._whole(next(filter(None, map(self._files.file, paths)), None))

    def _symbols(self, one: Loaded) -> Symbols:
        if (symbols := self._known.get(one.file.node)) is None:
            try:
                symbols = read_symbols(one.elf, self._files.reader(one.file))
            except Malformed:
                symbols = Symbols()
            self._known[one.file.node] = symbols
        return symbols

    def _named(self, word: bytes) -> Iterator[tuple[File, int, int]]:
        """A file that an argument names: a script, or what a server is configured by."""
        path = word.rpartition(b"=")[2]
        file = self._files.file(path) if path.startswith(b"/") else None
        if file is not None and file.size <= _MOST_OF_AN_ARGUMENT:
            yield from self._whole(file)

    def _whole(self, file: File | None) -> Iterator[tuple[File, int, int]]:
        if file is not None and file.size:
            yield file, 0, min(file.size, _MOST_OF_A_FILE)


def _behind(loaded: Sequence[Loaded]) -> list[Loaded]:
    """What has a program's code: itself, and a library if it is but a door to that."""
    main = list(loaded[:1])
    if main and _code(main[0].elf) < _DOOR:
        behind = (one for one in loaded[1:] if one.by is main[0] and not one.elf.soname.startswith(_BASIC))
        if (library := next(behind, None)) is not None and _code(library.elf) > _DOOR:
            main.append(library)
    return main


def _code(elf: Elf) -> int:
    return sum(one.size for one in elf.loaded if one.flags & PF_X)
