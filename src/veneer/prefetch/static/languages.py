"""What interpreters of known languages read when they start, besides themselves and their libraries."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from veneer.prefetch.static.command import Program
from veneer.prefetch.static.files import File, ImageFiles
from veneer.prefetch.static.python import python_files
from veneer.prefetch.static.python_home import is_python

__all__ = ["language_files"]

#: Debian builds Node without the modules that others wrote, and has them in files.
_NODE: Final = (
    b"usr/share/nodejs/cjs-module-lexer/lexer.js",
    b"usr/share/nodejs/cjs-module-lexer/dist/lexer.js",
    b"usr/share/nodejs/undici/undici-fetch.js",
    b"usr/share/nodejs/acorn/dist/acorn.js",
    b"usr/share/nodejs/acorn-walk/dist/walk.js",
)
#: Of a Java home, what the launcher and the virtual machine load by themselves, in order.
_JAVA: Final = (
    *(
        b"lib/jvm.cfg",
        b"lib/server/libjvm.so",
        b"lib/libjimage.so",
        b"lib/libjava.so",
        b"lib/server/classes.jsa",
    ),
    *(b"lib/libnio.so", b"lib/libnet.so", b"lib/libzip.so", b"conf/security/java.security"),
)


def language_files(
    files: ImageFiles, program: Program, environment: Mapping[bytes, bytes], directory: bytes
) -> Iterable[File]:
    """What a program reads besides itself and its libraries, in order; nothing of an unknown one."""
    if is_python(program):
        return python_files(files, program, environment, directory)
    if program.name in (b"node", b"nodejs"):
        return _there(files, _NODE)
    if program.name == b"java":
        home = program.file.path.rpartition(b"/")[0].rpartition(b"/")[0]
        return _there(files, (home + b"/" + name for name in _JAVA))
    return ()


def _there(files: ImageFiles, paths: Iterable[bytes]) -> Iterator[File]:
    return (file for path in paths if (file := files.file(path)) is not None)
