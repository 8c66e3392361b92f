"""Where a Python has its library and its packages, and what its command line says of them.

Source: CPython's ``Modules/getpath.py`` and ``Lib/site.py``; Debian's patch of the latter for
``dist-packages``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from veneer.prefetch.static.command import Program
from veneer.prefetch.static.files import File, ImageFiles, Malformed

__all__ = ["Home", "Options", "find_home", "is_python", "read_options", "text_of"]

_NAME: Final = re.compile(rb"python(?:(\d)(?:\.(\d+))?)?[dtm]*")
_LIBRARY: Final = re.compile(rb"python(\d)\.(\d+)t?")
_MOST_CONFIG: Final = 64 << 10
#: Options with a value in the next word, other than those that end the options.
_VALUED: Final = frozenset({b"-W", b"-X", b"--check-hash-based-pycs"})


def is_python(program: Program) -> bool:
    """Whether a program is CPython, as far as its name tells."""
    return not program.script and _NAME.fullmatch(program.name) is not None


class Options(NamedTuple):
    """What the command line says.

    Args:
        isolated: the environment does not count.
        site: the site's directories are on the path.
        kind: ``-c``, ``-m``, ``file`` or "".
        word: of the kind.
    """

    isolated: bool
    site: bool
    kind: str
    word: bytes


class Home(NamedTuple):
    """Where a Python has its library.

    Args:
        version: of it.
        library: the directory of the standard library.
        prefix: above ``lib``.
        site: directories of packages that are not part of it.
    """

    version: tuple[int, int]
    library: bytes
    prefix: bytes
    site: tuple[bytes, ...]


def find_home(files: ImageFiles, program: Program, environment: Mapping[bytes, bytes]) -> Home | None:
    """Where the Python that ``program`` is has its library, if it has one."""
    called = files.directory(program.path.rpartition(b"/")[0] or b"/")
    prefixes = [program.file.path.rpartition(b"/")[0].rpartition(b"/")[0]]
    own: bytes | None = None
    if called is not None and (config := _environment_config(files, called)) is not None:
        own, base = config
        prefixes.insert(0, base)
    if given := environment.get(b"PYTHONHOME", b"").split(b":")[0]:
        prefixes.insert(0, given.strip(b"/"))
    for prefix in [*prefixes, b"usr", b"usr/local"]:
        for lib in (b"lib", b"lib64"):
            if (found := _library(files, prefix + b"/" + lib, program.name)) is not None:
                name, version = found
                library = prefix + b"/" + lib + b"/" + name
                site = tuple(_site(prefix if own is None else own, lib, name))
                if own is not None and config is not None:
                    site = (own + b"/lib/" + name + b"/site-packages",)
                return Home(version, library, prefix, site)
    return None


def _environment_config(files: ImageFiles, called: bytes) -> tuple[bytes, bytes] | None:
    """The directory of a virtual environment and the prefix of the Python that it is of."""
    for directory in (called.rpartition(b"/")[0], called):
        if (file := files.file(directory + b"/pyvenv.cfg")) is None or file.size > _MOST_CONFIG:
            continue
        for line in text_of(files, file).splitlines():
            key, _, value = line.partition(b"=")
            if key.strip().lower() == b"home":
                home = files.directory(value.strip())
                return directory, (home or b"usr/bin").rpartition(b"/")[0]
    return None


def _library(files: ImageFiles, lib: bytes, name: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """The directory in ``lib`` that has the standard library of a program of that name."""
    best: tuple[bytes, tuple[int, int]] | None = None
    wanted = _NAME.fullmatch(name)
    for entry in files.names(lib):
        found = _LIBRARY.fullmatch(entry)
        if found is None or len(found[2]) > 3 or files.file(lib + b"/" + entry + b"/os.py") is None:
            continue
        version = int(found[1]), int(found[2])
        if wanted and ((wanted[1] or found[1]), (wanted[2] or found[2])) == (found[1], found[2]):
            best = max(best or (entry, version), (entry, version), key=lambda one: one[1])
    return best


def _site(prefix: bytes, lib: bytes, name: bytes) -> Iterator[bytes]:
    major = name.partition(b".")[0]
    if prefix == b"usr":
        yield b"usr/local/lib/" + name + b"/dist-packages"
        yield b"usr/lib/" + major + b"/dist-packages"
        yield b"usr/lib/" + name + b"/dist-packages"
    yield prefix + b"/" + lib + b"/" + name + b"/site-packages"


def read_options(words: Sequence[bytes]) -> Options:
    """What the arguments of a Python say."""
    isolated, site, at = False, True, 0
    while at < len(words):
        word = words[at]
        if not word.startswith(b"-") or word == b"-":
            return Options(isolated, site, "file" if word != b"-" else "", word)
        if word.startswith(b"--"):
            at += 2 if word in _VALUED else 1
            continue
        for number, letter in enumerate(word[1:].decode("latin-1"), 2):
            if letter in "cm":
                text = word[number:] or (words[at + 1] if at + 1 < len(words) else b"")
                return Options(isolated, site, f"-{letter}", text)
            if letter in "WX":
                at += not word[number:]
                break
            isolated |= letter in "EI"
            site &= letter != "S"
        at += 1
    return Options(isolated, site, "", b"")


def text_of(files: ImageFiles, file: File) -> bytes:
    """All of a file, or nothing of one that is too large."""
    try:
        return files.read(file)
    except Malformed:
        return b""
