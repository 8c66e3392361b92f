"""What interpreters of known languages read when they start, besides themselves and their libraries."""

from collections.abc import Iterable, Mapping

from veneer.prefetch.static.command import Program
from veneer.prefetch.static.files import File, ImageFiles
from veneer.prefetch.static.python import python_files
from veneer.prefetch.static.python_home import is_python

__all__ = ["language_files"]


def language_files(
    files: ImageFiles, program: Program, environment: Mapping[bytes, bytes], directory: bytes
) -> Iterable[File]:
    """What a program reads besides itself and its libraries, in order; nothing of an unknown one."""
    if is_python(program):
        return python_files(files, program, environment, directory)
    return ()
