"""What all subcommands share: the common options, the way into trio, and the way out on errors."""

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import click

from veneer.cli.render import Output
from veneer.errors import UsageError, VeneerError
from veneer.oci.descriptor import Platform
from veneer.settings import Settings, parse_size

__all__ = ["EXIT_STATUS", "Invocation", "command"]

P = ParamSpec("P")
T = TypeVar("T")

EXIT_STATUS = """\b
Exit status:
  0 success   1 unexpected error   2 wrong usage   130 interrupted
  10 registry error (11 not found, 12 unauthorized, 13 rate limited, 14 unavailable)
  20 integrity error (21 rejected by policy)   22 unsupported format   23 decryption
  30 cache   40 mount   50 snapshot"""


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a subcommand gets besides its own options."""

    settings: Settings
    output: Output

    def run(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run async library code to its end; a lone VeneerError comes out of trio's exception groups bare."""
        import trio  # here, not above: commands that do without it start in half the time

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


def command(
    function: Callable[Concatenate[Invocation, P], int | None],
) -> Callable[P, None]:
    """Turn ``f(invocation, **options) -> exit code`` into a click callback with the common options.

    Used below ``@click.command(epilog=EXIT_STATUS)`` and above the command's own options.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        taken = {name: kwargs.pop(name) for name in _COMMON}
        output = Output(json=bool(taken["json"]), quiet=bool(taken["quiet"]), progress=not taken["no_progress"])
        verbosity = int(str(taken["verbose"]))
        logging.basicConfig(
            level=[logging.WARNING, logging.INFO][min(verbosity, 1)],
            format="%(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        try:
            code = function(Invocation(_settings(taken), output), *args, **kwargs)
        except VeneerError as error:
            if verbosity > 1:
                traceback.print_exc()
            output.fail(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except BrokenPipeError:
            # Whoever read our output has seen enough (`veneer ls IMAGE | head`); say nothing about it.
            # The interpreter would try to flush it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        sys.exit(code or 0)

    own = {flag for parameter in getattr(function, "__click_params__", ()) for flag in parameter.opts}
    decorated: Callable[P, None] = wrapper
    for name, option in reversed(_COMMON.items()):
        # Whoever knows docker run means a volume by -v.
        decorated = (_LONG_VERBOSE if name == "verbose" and "-v" in own else option)(decorated)
    return decorated


_PATH = click.Path(path_type=Path)
_VERBOSE_HELP = "Log what happens; twice: with tracebacks."
_LONG_VERBOSE = click.option("--verbose", count=True, help=_VERBOSE_HELP)
_COMMON: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
    "json": click.option("--json", is_flag=True, help="Print JSON; errors too, as one line."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
    "verbose": click.option("-v", "--verbose", count=True, help=_VERBOSE_HELP),
    "no_progress": click.option("--no-progress", is_flag=True, help="No progress display."),
    "platform": click.option("--platform", metavar="OS/ARCH", help="Which image of a multi-platform one."),
    "authfile": click.option("--authfile", type=_PATH, help="Registry credentials (auth.json)."),
    "ca_file": click.option("--ca-file", type=_PATH, help="More certificates to trust (PEM)."),
    "insecure": click.option(
        "--insecure", multiple=True, metavar="HOST", help="Allow plain HTTP to this host; may be repeated."
    ),
    "cache_dir": click.option("--cache-dir", type=_PATH, help="Where fetched data are kept."),
    "cache_quota": click.option("--cache-quota", metavar="SIZE", help="How much of it, such as 10G."),
    "timeout": click.option(
        "--timeout", type=float, metavar="SECONDS", help="How long a read waits for the registry."
    ),
}


def _settings(taken: dict[str, object]) -> Settings:
    settings = Settings.from_environment()
    changes: dict[str, object] = {}
    for name in ("authfile", "ca_file", "cache_dir"):
        if isinstance(value := taken[name], Path):
            changes[name] = value
    if isinstance(platform := taken["platform"], str):
        changes["platform"] = Platform.parse(platform)
    if isinstance(quota := taken["cache_quota"], str):
        changes["cache_quota"] = parse_size(quota)
    if isinstance(timeout := taken["timeout"], float):
        if timeout <= 0:
            raise UsageError("--timeout must be positive")
        changes["read_deadline_s"] = timeout
    if isinstance(hosts := taken["insecure"], tuple) and hosts:
        changes["insecure"] = settings.insecure | frozenset(str(host) for host in hosts)
    return replace(settings, **changes)  # type: ignore[arg-type] # each value was checked just above
