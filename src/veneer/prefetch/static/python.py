"""What CPython reads when it starts and runs a program: its own modules, and those that the program imports.

Source: CPython's ``Modules/getpath.py``, ``Lib/site.py`` and ``Lib/importlib/_bootstrap_external.py``, in
words: where the standard library is follows from where the program is; a module is looked for along the path
as directory, extension, source; byte code is used if it names the time and size of its source, and else read
in vain.

Not for: what is imported in functions, or what a program puts into ``sys.path``.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from veneer.prefetch.static.command import Program
from veneer.prefetch.static.files import File, ImageFiles, Malformed
from veneer.prefetch.static.python_home import Home, Options, find_home, read_options, text_of
from veneer.prefetch.static.python_imports import MAX_SOURCE, Alternatives, Import, Statement, imports_of

__all__ = ["python_files"]

#: A data-science stack imports 2,500 modules.
_MOST_MODULES: Final = 5_000
_MOST_SOURCES: Final = 48 << 20
_MOST_DEPTH: Final = 400
_MOST_NAMES: Final = 500
_MOST_CONFIG: Final = 64 << 10
#: What the interpreter imports before the program, in its order.
_START: Final = (
    "encodings",
    "codecs",
    "encodings.aliases",
    "encodings.utf_8",
    "io",
    "abc",
    "site",
    "os",
    "stat",
)
_CUSTOM: Final = ("sitecustomize", "usercustomize")
#: Modules that are part of the interpreter since 3.11.
_FROZEN: Final = frozenset(
    {
        *(
            "abc",
            "codecs",
            "io",
            "_collections_abc",
            "_sitebuiltins",
            "genericpath",
            "ntpath",
            "posixpath",
            "os",
        ),
        *("site", "stat", "importlib.util", "importlib.machinery", "runpy", "zipimport", "importlib"),
        *("importlib._bootstrap", "importlib._bootstrap_external"),
    }
)


class _Module(NamedTuple):
    """Something importable: its file, "" for a namespace, and where its submodules are."""

    file: File | None
    directory: bytes
    path: tuple[bytes, ...] | None


def python_files(
    files: ImageFiles, program: Program, environment: Mapping[bytes, bytes], directory: bytes
) -> Iterator[File]:
    """The files that a Python reads besides itself and its libraries, in order; extensions are libraries.

    Args:
        files: of the image.
        program: the interpreter, with its arguments.
        environment: PYTHONPATH and PYTHONHOME count.
        directory: where it is run.
    """
    home = find_home(files, program, environment)
    if home is None:
        return
    options = read_options(program.words[1:])
    if (found := files.file(b"etc/localtime")) is not None:
        yield found
    start = _Start(files, home, options, environment, directory)
    yield from start.read()


class _Start:
    """One start of one Python."""

    def __init__(
        self,
        files: ImageFiles,
        home: Home,
        options: Options,
        environment: Mapping[bytes, bytes],
        directory: bytes,
    ) -> None:
        self._files = files
        self._home = home
        self._options = options
        self._directory = directory
        self._frozen = _FROZEN if home.version >= (3, 11) else frozenset[str]()
        self._tag = b"cpython-%d%d" % home.version
        self._suffixes = tuple(_suffixes(self._tag))
        self._modules: dict[str, _Module | None] = {}
        self._listed: dict[bytes, frozenset[bytes]] = {}
        self._sources = _MOST_SOURCES
        self._out: list[File] = []
        self._path: list[bytes] = []
        if not options.isolated:
            self._path += [one for one in environment.get(b"PYTHONPATH", b"").split(b":") if one]
        self._path += [home.library, home.library + b"/lib-dynload"]

    def read(self) -> Iterator[File]:
        """The files, in order. May be called once."""
        self._import_all([Import(name) for name in _START])
        if self._options.site:
            self._add_site()
            self._import_all([Import(name) for name in _CUSTOM])
        self._run()
        yield from self._out

    def _add_site(self) -> None:
        for directory in self._home.site:
            names = self._names(directory)
            if not names:
                continue
            self._path.append(directory)
            for name in sorted(name for name in names if name.endswith(b".pth")):
                file = self._files.file(directory + b"/" + name)
                if file is None or file.size > _MOST_CONFIG:
                    continue
                self._out.append(file)
                for line in text_of(self._files, file).splitlines():
                    if line.startswith((b"import ", b"import\t")):
                        self._import_all(imports_of(line, self._home.version))
                    elif line and not line.startswith(b"#"):
                        added = self._files.directory(
                            line if line.startswith(b"/") else directory + b"/" + line
                        )
                        if added is not None:
                            self._path.append(added)

    def _run(self) -> None:
        """The program itself."""
        kind, word = self._options.kind, self._options.word
        if kind == "file":
            path = word if word.startswith(b"/") else self._directory + b"/" + word
            if self._files.directory(path) is not None:
                path += b"/__main__.py"
            if (file := self._files.file(path)) is not None:
                self._path.insert(0, file.path.rpartition(b"/")[0])
                self._out.append(file)
                self._follow_main(text_of(self._files, file) if file.size <= MAX_SOURCE else b"")
            return
        if not kind:
            return
        self._path.insert(0, self._directory)
        if kind == "-c":
            self._follow_main(word)
            return
        name = word.decode("utf-8", "replace")
        self._import_all([Import("runpy"), Import(name)])
        module = self._modules.get(name)
        if module is not None and module.path is not None:
            name += ".__main__"
            self._import_all([Import(name)])
            module = self._modules.get(name)
        if module is not None and module.file is not None and module.file.size <= MAX_SOURCE:
            source = text_of(self._files, module.file)
            self._import_all(imports_of(source, self._home.version, main=True), name.rpartition(".")[0])

    def _follow_main(self, source: bytes) -> None:
        self._import_all(imports_of(source, self._home.version, main=True))

    def _import_all(self, statements: Sequence[Statement], package: str = "") -> None:
        """Import along, depth first like the interpreter, without its recursion."""
        stack: list[tuple[Iterator[Statement], str]] = [(iter(statements), package)]
        while stack:
            iterator, package = stack[-1]
            statement = next(iterator, None)
            if statement is None:
                stack.pop()
            elif isinstance(statement, Alternatives):
                missing = not all(self._there(one, package) for one in statement.first)
                both = (*statement.first, *(statement.otherwise if missing else ()))
                stack.append((iter(both), package))
            else:
                for name in self._named(statement, package):
                    if (inner := self._load(name)) and len(stack) < _MOST_DEPTH:
                        module = self._modules[name]
                        of = name if module and module.path is not None else name.rpartition(".")[0]
                        stack.append((iter(inner), of))
                        # The rest of this statement comes after what the module imports.
                        stack.insert(-1, (iter([statement]), package))
                        break

    def _there(self, statement: Statement, package: str) -> bool:
        if isinstance(statement, Alternatives):
            return True
        names = list(self._named(statement, package))
        return bool(names) and all(self._find(name) is not None or self._built_in(name) for name in names[:1])

    def _built_in(self, name: str) -> bool:
        """Whether a module without a file is part of the interpreter: those begin so, or are these."""
        return name.startswith("_") or name in (
            "sys",
            "time",
            "errno",
            "posix",
            "math",
            "builtins",
            "gc",
            "marshal",
        )

    def _named(self, statement: Import, package: str) -> Iterator[str]:
        """The names of all modules that an import imports, parents first."""
        base = statement.module
        if statement.level:
            parents = package.split(".") if package else []
            if statement.level > len(parents):
                return
            kept = parents[: len(parents) - statement.level + 1]
            base = ".".join([*kept, base] if base else kept)
        parts = base.split(".")
        for count in range(1, len(parts) + 1):
            yield ".".join(parts[:count])
        module = self._modules.get(base)
        if module is not None and module.path is not None:
            for name in statement.names[:_MOST_NAMES]:
                if name != "*" and self._find(f"{base}.{name}") is not None:
                    yield f"{base}.{name}"

    def _load(self, name: str) -> tuple[Statement, ...]:
        """Read a module that has not been read; what it imports."""
        if name in self._modules:
            return ()
        module = self._modules[name] = self._find(name) if len(self._modules) < _MOST_MODULES else None
        if module is None or module.file is None:
            return ()
        file = module.file
        if name not in self._frozen:
            self._out += self._read_of(file, module.directory)
        if not file.path.endswith(b".py") or file.size > min(MAX_SOURCE, self._sources):
            return ()
        self._sources -= file.size
        return imports_of(text_of(self._files, file), self._home.version)

    def _read_of(self, file: File, directory: bytes) -> list[File]:
        """What is read of a module: byte code, and the source as well if that is of another one."""
        name = file.path.rpartition(b"/")[2]
        if not name.endswith(b".py"):
            return [file]
        compiled = self._files.file(directory + b"/__pycache__/" + name[:-2] + self._tag + b".pyc")
        if compiled is None:
            return [file]
        try:
            head = self._files.read(compiled, 0, 16)
        except Malformed:
            return [file]
        if len(head) < 16:
            return [compiled, file]
        flags, mtime, size = struct.unpack_from("<III", head, 4)
        if flags & 1:
            fresh = not flags & 2
        else:
            fresh = (mtime, size) == (file.mtime_s & 0xFFFFFFFF, file.size & 0xFFFFFFFF)
        return [compiled] if fresh else [compiled, file]

    def _find(self, name: str) -> _Module | None:
        if name in self._modules:
            return self._modules[name]
        parent, _, last = name.rpartition(".")
        if parent:
            above = self._modules.get(parent)
            path: Sequence[bytes] = (above and above.path) or ()
        else:
            path = self._path
        wanted = last.encode("utf-8", "replace")
        if not wanted or b"/" in wanted:
            return None
        portions: list[bytes] = []
        for directory in path:
            found = self._in(directory, wanted)
            if found is not None and found.file is not None:
                return found
            if found is not None:
                portions.append(found.directory)
        return _Module(None, b"", tuple(portions)) if portions else None

    def _in(self, directory: bytes, name: bytes) -> _Module | None:
        """A module in one directory; without a file if it is a part of a namespace."""
        names = self._names(directory)
        below = directory + b"/" + name
        inside = self._names(below) if name in names else frozenset[bytes]()
        for suffix in self._suffixes:
            if b"__init__" + suffix in inside and (file := self._files.file(below + b"/__init__" + suffix)):
                return _Module(file, below, (below,))
        for suffix in self._suffixes:
            if name + suffix in names and (file := self._files.file(below + suffix)) is not None:
                return _Module(file, directory, None)
        return _Module(None, below, (below,)) if inside else None

    def _names(self, directory: bytes) -> frozenset[bytes]:
        if (names := self._listed.get(directory)) is None:
            names = self._listed[directory] = frozenset(self._files.names(directory))
        return names


def _suffixes(tag: bytes) -> Iterator[bytes]:
    """The endings of modules, in the order in which they are tried."""
    for machine in (b"x86_64", b"aarch64", b"riscv64", b"powerpc64le", b"s390x", b"arm", b"i386"):
        for libc in (b"gnu", b"musl", b"gnueabihf"):
            yield b"." + tag + b"-" + machine + b"-linux-" + libc + b".so"
    yield from (b".abi3.so", b".so", b".py", b".pyc")
