"""Command lines, on argparse: options and words in any order, errors as UsageError, help of one width.

argparse parses the options here, and the options only. It deals out positional arguments as soon as it sees
some, so that it refuses ``ls IMAGE -l PATH``, and takes every ``--`` away, also one that is meant for the
command of a container. Words are therefore what is left when the options are gone, and everything after the
first ``--``.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from veneer.errors import UsageError

__all__ = ["Parser", "before_dashes", "directory", "existing_file", "no_such", "not_directory"]

T = TypeVar("T")

#: As wide as help gets; wider lines are hard to read.
_WIDTH = 100
#: From here on a name is worth suggesting for another: stat for status, but not version for json.
_LIKENESS = 0.7
#: Where the text beside an option begins, at most; below a longer option.
_COLUMN = 30


class _Word(NamedTuple):
    metavar: str
    type: Callable[[str], object]
    default: object
    repeated: bool

    @property
    def usage(self) -> str:
        if self.repeated:
            return f"[{self.metavar}]..."
        return self.metavar if self.default is None else f"[{self.metavar}]"


class Parser(argparse.ArgumentParser):
    """The options and words of one command.

    An option that is added later takes its letter from an earlier one.

    Args:
        prog: what the user typed to get here.
        about: paragraphs of what it does.
        epilog: goes below the options as it is.
        usage: what the usage line says of words that :meth:`add_word` does not declare.
    """

    def __init__(self, prog: str, about: str, epilog: str = "", usage: str = "") -> None:
        super().__init__(
            prog,
            description=about,
            epilog=epilog,
            formatter_class=partial(_Formatter, max_help_position=_COLUMN, width=_WIDTH),
            conflict_handler="resolve",
            allow_abbrev=False,
            add_help=False,
        )
        self._words: list[_Word] = []
        self._usage = usage

    def add_word(
        self,
        metavar: str,
        *,
        type: Callable[[str], object] = str,  # noqa: A002 - as argparse calls it
        default: object = None,
        repeated: bool = False,
    ) -> None:
        """Take one more word, into the attribute named like ``metavar``.

        Args:
            metavar: the word in the usage line.
            type: makes the value from the word.
            default: the value when it is missing; without one it must not be.
            repeated: take all words that are left as a tuple, also none.
        """
        self._words.append(_Word(metavar, type, default, repeated))

    def parse(self, argv: Sequence[str], into: T) -> T:
        """Set an attribute of ``into`` for each option and word. Raises UsageError; exits after ``--help``."""
        head = before_dashes(argv)
        _, words = self.parse_known_args(head, into)
        for word in words:
            if word.startswith("-") and word != "-":
                raise no_such("option", word.partition("=")[0], self._option_string_actions, self.prog)
        words += argv[len(head) + 1 :]
        for declared in self._words:
            name = declared.metavar.lower()
            if declared.repeated:
                setattr(into, name, tuple(map(declared.type, words)))
                words = []
            elif words:
                setattr(into, name, declared.type(words.pop(0)))
            elif declared.default is not None:
                setattr(into, name, declared.default)
            else:
                self.error(f"missing {declared.metavar}")
        if words:
            self.error(f"unexpected argument {words[0]!r}")
        return into

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line; argparse calls this as well."""
        raise UsageError(message.removeprefix("argument "), hint=f"see {self.prog} --help")

    def format_help(self) -> str:
        """The whole help."""
        import textwrap

        paragraphs = (self.description or "").split("\n\n")
        self.description = "\n\n".join(textwrap.fill(" ".join(text.split()), _WIDTH) for text in paragraphs)
        self.usage = " ".join(
            ["%(prog)s [OPTIONS]", *(word.usage for word in self._words), self._usage]
        ).rstrip()
        return super().format_help()

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process after ``--help``; BrokenPipeError when nobody reads it."""
        sys.stdout.flush()
        super().exit(status, message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The same look with every Python: ``-e, --env NAME``, which 3.13 and later do by themselves."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = action.metavar or "|".join(map(str, action.choices or ()))
        return f"{', '.join(action.option_strings)} {value if action.nargs != 0 else ''}".rstrip()


def directory(text: str) -> Path:
    """For ``type``: a path that may be a directory, or become one."""
    if os.path.exists(text) and not os.path.isdir(text):
        raise UsageError(f"{text} is not a directory")
    return Path(text)


def not_directory(text: str) -> Path:
    """For ``type``: a path that may be a file, or become one."""
    if os.path.isdir(text):
        raise UsageError(f"{text} is a directory")
    return Path(text)


def existing_file(text: str) -> Path:
    """For ``type``: a path of a file."""
    if not os.path.exists(text):
        raise UsageError(f"{text} does not exist")
    return not_directory(text)


def before_dashes(argv: Sequence[str]) -> list[str]:
    """The part of a command line that may hold options."""
    return list(argv[: argv.index("--")] if "--" in argv else argv)


def no_such(kind: str, name: str, known: Iterable[str], prog: str) -> UsageError:
    """What to raise for a name that does not exist."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)
    return UsageError(
        f"no such {kind}: {name}", hint=f"did you mean {close[0]}?" if close else f"see {prog} --help"
    )
