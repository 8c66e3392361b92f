"""Which programs a command line leads to: through PATH, scripts and programs that run others.

Source: execve(2) and the kernel's ``fs/binfmt_script.c`` for scripts; the manuals of env(1), tini(1) and the
like. A shell's script is not followed, but for the one line with which entry points of images hand over:
``exec "$@"``.
"""

import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from veneer.prefetch.static.elf import is_elf
from veneer.prefetch.static.files import File, ImageFiles, Malformed

__all__ = ["DEFAULT_PATH", "Program", "programs"]

#: As containers have it when the image does not say.
DEFAULT_PATH: Final = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Programs that run one after the other, scripts included.
_MOST: Final = 16
#: Bytes of a script's first line, as in Linux.
_FIRST_LINE: Final = 256
_MOST_SCRIPT: Final = 256 << 10
_SHELLS: Final = frozenset({b"sh", b"bash", b"dash", b"ash", b"ksh", b"zsh", b"busybox"})
#: Programs that run the command after their options; those of these options that have a value.
_WRAPPERS: Final[Mapping[bytes, frozenset[bytes]]] = {
    b"env": frozenset({b"-u", b"--unset", b"-C", b"--chdir"}),
    b"tini": frozenset({b"-p", b"-e"}),
    b"docker-init": frozenset({b"-p", b"-e"}),
    b"dumb-init": frozenset({b"-r", b"--rewrite"}),
    b"catatonit": frozenset(),
    b"nohup": frozenset(),
    b"setsid": frozenset(),
    b"stdbuf": frozenset({b"-i", b"-o", b"-e"}),
    b"nice": frozenset({b"-n"}),
    b"exec": frozenset(),
}
#: The same, whose first word says as whom to run it.
_AS_USER: Final = frozenset({b"gosu", b"su-exec", b"setpriv", b"chroot"})
_ENDS: Final = re.compile(rb"[;&|\n]+")
#: GCC, which runs a compiler, an assembler and a linker.
_DRIVER: Final = re.compile(rb"([a-z0-9_]+-[a-z0-9_-]+)-(gcc|g\+\+)-(\d+)")
_ASSIGNMENT: Final = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*=")
_HANDS_OVER: Final = re.compile(rb"""^[ \t]*exec[ \t]+(?:[^\n#]*[ \t])?["']?\$(?:@|\{@\})""", re.MULTILINE)


class Program(NamedTuple):
    """Something that is executed.

    Args:
        file: which.
        path: by which it was called.
        words: its arguments, its own name in front.
        script: it is text, which the next program reads.
    """

    file: File
    path: bytes
    words: tuple[bytes, ...]
    script: bool = False

    @property
    def name(self) -> bytes:
        """What it is called without directories, links followed: ``python3.11`` for ``/usr/bin/python``."""
        return self.file.path.rpartition(b"/")[2]


def programs(
    files: ImageFiles, words: Sequence[bytes], environment: Mapping[bytes, bytes], directory: bytes
) -> list[Program]:
    """The programs that a command runs, as far as one sees without running any, in order.

    Args:
        files: of the image.
        words: the command, as for execve(2).
        environment: PATH counts.
        directory: where it is run.
    """
    found: list[Program] = []
    pending = deque([tuple(words)])
    while pending and len(found) < _MOST:
        command = pending.popleft()
        program = _find(files, command, environment, directory) if command else None
        if program is not None:
            found.append(program)
            # What it runs comes before what is run after it.
            pending.extendleft(reversed(_next(files, program, directory)))
    return found


def _find(
    files: ImageFiles, words: Sequence[bytes], environment: Mapping[bytes, bytes], directory: bytes
) -> Program | None:
    name = words[0]
    if b"/" in name:
        candidates = [name if name.startswith(b"/") else directory + b"/" + name]
    else:
        path = environment.get(b"PATH", DEFAULT_PATH)
        candidates = [(one or directory) + b"/" + name for one in path.split(b":")]
    for candidate in candidates:
        file = files.file(candidate)
        if file is not None and file.executable:
            return Program(file, candidate, tuple(words), _is_script(files, file))
    return None


def _is_script(files: ImageFiles, file: File) -> bool:
    try:
        head = files.read(file, 0, 4)
    except Malformed:
        return False
    return head.startswith(b"#!") or not is_elf(head)


def _next(files: ImageFiles, program: Program, directory: bytes) -> list[tuple[bytes, ...]]:
    """The commands that a program runs, as far as one can tell."""
    words = program.words
    if program.script:
        return [_interpreter(files, program)]
    name = program.path.rpartition(b"/")[2]
    if name in _WRAPPERS:
        return [_wrapped(words[1:], _WRAPPERS[name])]
    if name in _AS_USER:
        return [_wrapped(words[1:], frozenset())[1:]]
    if name in _SHELLS or program.name in _SHELLS:
        return _shell(files, words[1:], directory)
    if (driver := _DRIVER.fullmatch(program.name)) is not None:
        below = b"/usr/lib/gcc/%b/%b/" % (driver[1], driver[3])
        compiler = b"cc1plus" if driver[2] == b"g++" else b"cc1"
        return [(below + compiler,), (b"as",), (below + b"collect2",), (b"ld",)]
    return []


def _interpreter(files: ImageFiles, program: Program) -> tuple[bytes, ...]:
    """What reads a script: the kernel gives it one argument at most, and then the script."""
    rest = (program.path, *program.words[1:])
    try:
        head = files.read(program.file, 0, _FIRST_LINE)
    except Malformed:
        return ()
    if not head.startswith(b"#!"):
        # execvp(3) and shells run what the kernel does not know by a shell.
        return (b"/bin/sh", *rest) if b"\0" not in head else ()
    parts = head[2:].split(b"\n", 1)[0].strip(b" \t\r").split(None, 1)
    return (*parts, *rest) if parts else ()


def _wrapped(words: Sequence[bytes], valued: frozenset[bytes]) -> tuple[bytes, ...]:
    at = 0
    while at < len(words):
        word = words[at]
        if word == b"--":
            return tuple(words[at + 1 :])
        if word in (b"-S", b"--split-string") or (word.startswith(b"-S") and len(word) > 2):
            # env -S: the words in one argument of a script's first line.
            text, rest = (
                (word[2:], words[at + 1 :])
                if word[1:2] == b"S" and len(word) > 2
                else (
                    words[at + 1] if at + 1 < len(words) else b"",
                    words[at + 2 :],
                )
            )
            return _wrapped([*text.split(), *rest], valued)
        if word in valued:
            at += 1
        elif not word.startswith(b"-") and not _ASSIGNMENT.match(word):
            return tuple(words[at:])
        at += 1
    return ()


def _shell(files: ImageFiles, words: Sequence[bytes], directory: bytes) -> list[tuple[bytes, ...]]:
    at = 0
    while at < len(words) and words[at].startswith(b"-") and words[at] not in (b"-", b"--"):
        if not words[at].startswith(b"--") and b"c" in words[at]:
            return _line(words[at + 1]) if at + 1 < len(words) else []
        at += 1
    if at < len(words) and words[at] in (b"-", b"--"):
        at += 1
    if at + 1 >= len(words):
        return []
    file = files.file(words[at] if words[at].startswith(b"/") else directory + b"/" + words[at])
    if file is None or file.size > _MOST_SCRIPT:
        return []
    try:
        text = files.read(file)
    except Malformed:
        return []
    return [tuple(words[at + 1 :])] if _HANDS_OVER.search(text) else []


def _line(text: bytes) -> list[tuple[bytes, ...]]:
    """The commands of a shell's -c, as far as they are no more than words."""
    found: list[tuple[bytes, ...]] = []
    for part in _ENDS.split(text)[:_MOST]:
        # What follows a redirection is a name.
        plain = part.partition(b">")[0].partition(b"<")[0].decode("utf-8", "surrogateescape")
        try:
            words = [word.encode("utf-8", "surrogateescape") for word in shlex.split(plain)]
        except ValueError:
            continue
        while words and (_ASSIGNMENT.match(words[0]) or words[0] == b"exec"):
            del words[0]
        found.append(tuple(words))
    return found
