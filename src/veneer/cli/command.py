"""What all commands share: the common options, the way into trio, and the way out on errors.

A command is a module with a class of what it takes, ``add_arguments(parser)`` that declares it, and ``run``,
which does the work and whose docstring is the help. Everything heavy is imported in ``run``: ``veneer --help``
and ``veneer status`` must not pay for FUSE, HTTP and compression libraries that they do not use.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from veneer.cli.parser import Parser, before_dashes, no_such
from veneer.cli.render import Output
from veneer.errors import UsageError, VeneerError
from veneer.oci.platform import Platform
from veneer.settings import Settings, parse_size

__all__ = [
    "EXIT_STATUS",
    "AnyCommand",
    "Command",
    "CommonArguments",
    "Group",
    "Invocation",
    "execute",
    "group_of",
]

T = TypeVar("T")

EXIT_STATUS = """exit status:
  0 success   1 unexpected error   2 wrong usage   130 interrupted
  10 registry error (11 not found, 12 unauthorized, 13 rate limited, 14 unavailable)
  20 integrity error   22 unsupported format   30 cache   40 mount"""


class Invocation(NamedTuple):
    """What a command gets besides its own options."""

    settings: Settings
    output: Output
    verbose: int = 0

    def run(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run async library code to its end; a lone VeneerError comes out of trio's exception groups bare."""
        import trio

        _log(self.verbose)
        try:
            return trio.run(function)
        except BaseExceptionGroup as group:
            raise _only_cause(group) from group


def _only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one foreseen error in a group, when every leaf is foreseen; otherwise the group itself."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    for interrupt in leaves:
        if isinstance(interrupt, KeyboardInterrupt):
            return interrupt
    if all(isinstance(leaf, VeneerError) for leaf in leaves):
        return leaves[0]
    return group


class CommonArguments:
    """What every command takes."""

    json: bool
    quiet: bool
    verbose: int
    no_progress: bool
    platform: Platform | None
    authfile: Path | None
    ca_file: Path | None
    insecure: list[str]
    cache_dir: Path | None
    cache_quota: int | None
    timeout: float | None

    @staticmethod
    def add_to(parser: Parser) -> None:
        """Declare them. A command's own letters win: whoever knows docker run means a volume by -v."""
        add = parser.add_argument_group("common options").add_argument
        add("--json", action="store_true", help="Print JSON; errors too, as one line.")
        add("-q", "--quiet", action="store_true", help="Print results and errors only.")
        add("-v", "--verbose", action="count", default=0, help="Log what happens; twice: with tracebacks.")
        add("--no-progress", action="store_true", help="No progress display.")
        add("--platform", type=Platform.parse, metavar="OS/ARCH", help="Which image of a multi-platform one.")
        add("--authfile", type=Path, metavar="PATH", help="Registry credentials (auth.json).")
        add("--ca-file", type=Path, metavar="PATH", help="More certificates to trust (PEM).")
        add(
            "--insecure",
            action="append",
            default=[],
            metavar="HOST",
            help="Allow plain HTTP to this host; may be repeated.",
        )
        add("--cache-dir", type=Path, metavar="PATH", help="Where fetched data are kept.")
        add("--cache-quota", type=parse_size, metavar="SIZE", help="How much of it, such as 10G.")
        add("--timeout", type=float, metavar="SECONDS", help="How long a read waits for the registry.")
        add("-h", "--help", action="help", help="Show this message and exit.")

    def settings(self, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings of the environment, with what the options say in their place. Raises UsageError."""
        settings = Settings.from_environment(environ)
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError("--timeout must be positive")
        return replace(
            settings,
            platform=self.platform or settings.platform,
            authfile=self.authfile or settings.authfile,
            ca_file=self.ca_file or settings.ca_file,
            insecure=settings.insecure | frozenset(self.insecure),
            cache_dir=self.cache_dir or settings.cache_dir,
            cache_quota=settings.cache_quota if self.cache_quota is None else self.cache_quota,
            read_deadline_s=settings.read_deadline_s if self.timeout is None else self.timeout,
        )


A = TypeVar("A", bound=CommonArguments)


def _nothing_more(_parser: Parser) -> None:
    """For commands that only take what all take."""


class Command(Generic[A]):
    """Something that veneer does.

    Args:
        run: does it, and returns the exit status; its docstring is the help.
        arguments: makes what ``run`` gets; the parser sets its attributes.
        add_arguments: declares options and words of its own.
        epilog: below the options.
    """

    def __init__(
        self,
        run: Callable[[Invocation, A], int],
        arguments: type[A],
        add_arguments: Callable[[Parser], None] = _nothing_more,
        epilog: str = EXIT_STATUS,
    ) -> None:
        self._run = run
        self._arguments = arguments
        self._add_arguments = add_arguments
        self._epilog = epilog

    @property
    def about(self) -> str:
        """What it does."""
        return self._run.__doc__ or ""

    @property
    def summary(self) -> str:
        """The same in a sentence."""
        sentence, dot, _ = self.about.partition(".")
        return sentence + dot

    def parser(self, prog: str) -> Parser:
        """The parser of its command line; ``prog`` is what the user typed to get here."""
        parser = Parser(prog, self.about, self._epilog)
        CommonArguments.add_to(parser)
        self._add_arguments(parser)
        return parser

    def execute(self, prog: str, argv: Sequence[str]) -> int:
        """Parse ``argv``, run, and return the exit status. Raises VeneerError."""
        args = self.parser(prog).parse(argv, self._arguments())
        if args.verbose:
            _log(args.verbose)
        output = Output(json=args.json, quiet=args.quiet, progress=not args.no_progress)
        try:
            return self._run(Invocation(args.settings(), output, args.verbose), args)
        except VeneerError:
            if args.verbose > 1:
                import traceback

                traceback.print_exc()
            raise


#: Whatever it takes, which is between the command and its arguments.
AnyCommand = Command[Any]


class Group(NamedTuple):
    """Commands under one name, looked up when they are called.

    Args:
        about: what they have in common.
        summaries: what each does, in a line.
        find: the command of that name.
        epilog: below the list of commands.
        version: shown by ``--version``, if there is one.
    """

    about: str
    summaries: Mapping[str, str]
    find: "Callable[[str], AnyCommand | Group]"
    epilog: str = ""
    version: str = ""

    def parser(self, prog: str) -> Parser:
        """The parser of what comes before the name of the command."""
        width = max(map(len, self.summaries)) + 2
        commands = "\n".join(f"  {name:{width}}{summary}" for name, summary in self.summaries.items())
        epilog = f"commands:\n{commands}\n\n{self.epilog}".rstrip()
        parser = Parser(prog, self.about, epilog, "COMMAND [ARGS]...")
        if self.version:
            parser.add_argument(
                "--version", action="version", version=self.version, help="Show the version and exit."
            )
        parser.add_argument("-h", "--help", action="help", help="Show this message and exit.")
        return parser

    def execute(self, prog: str, argv: Sequence[str]) -> int:
        """Run the command that ``argv`` names, and return the exit status. Raises VeneerError."""
        at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
        if at:
            self.parser(prog).parse(argv[:at], object())
        if at == len(argv):
            self.parser(prog).print_help(sys.stderr)
            return UsageError.exit_code
        name = argv[at]
        if name not in self.summaries:
            raise no_such("command", name, self.summaries, prog)
        return self.find(name).execute(f"{prog} {name}", argv[at + 1 :])


def group_of(about: str, commands: Mapping[str, AnyCommand]) -> Group:
    """A group of commands that are at hand."""
    summaries = {name: command.summary for name, command in commands.items()}
    return Group(about, summaries, commands.__getitem__)


def execute(entry: "AnyCommand | Group", prog: str, argv: Sequence[str]) -> int:
    """Run a command line to its end, say on standard error what went wrong, and return the exit status."""
    try:
        try:
            code = entry.execute(prog, argv)
        except VeneerError as error:
            Output(json="--json" in before_dashes(argv)).fail(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough (`veneer ls IMAGE | head`); say nothing about it.
        # The interpreter would try to flush it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    return code


def _log(verbose: int) -> None:
    """Log to standard error. Only from here on, since many commands do without the logging module."""
    import logging

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
