"""The daemon's worker as commands know it: it reads the command lines that :mod:`veneer.cli.quick` sends it.

Started by :mod:`veneer.daemon.supervisor` only.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from veneer.cli import status
from veneer.cli.backend import with_backend
from veneer.cli.command import CommonArguments
from veneer.cli.container import options_of
from veneer.cli.parser import Parser, before_dashes
from veneer.cli.render import result_text
from veneer.cli.run import COMMAND, Arguments
from veneer.daemon.request import RunRequest, ShortRun
from veneer.daemon.standing import Render
from veneer.daemon.worker import main
from veneer.errors import UsageError

__all__ = ["read_run", "read_status"]

_HELP = {"-h", "--help"}
#: Command lines that have been read, as the same container is started again; so many, and none that is longer.
_read: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ShortRun] = {}
_MOST_READ, _MOST_TEXT = 64, 16 << 10


def read_status(words: Sequence[str], environ: Mapping[str, str]) -> tuple[Path, Render] | None:
    """The run directory that a command line of ``veneer status`` is about, and what shows it.

    None if only the command itself can do what is wanted, or say what is wrong.
    """
    if _HELP.intersection(before_dashes(words)):
        return None
    try:
        args = status.COMMAND.parser("veneer status").parse(words, CommonArguments())
        run_dir = args.settings(environ).run_dir
    except UsageError:
        return None
    if args.verbose or not run_dir.is_absolute():
        return None
    return run_dir, lambda found: result_text(*status.shown(found, json=args.json), json=args.json)


def read_run(words: Sequence[str], environ: Mapping[str, str]) -> ShortRun | None:
    """What a command line of ``veneer run`` asks for; None if only the command itself can do that.

    That is so when it depends on the directory, the terminal or the rest of the environment of whoever typed
    it, or when it wants more than a container; and when it is wrong, for the command to say so.
    """
    asked = tuple(words), tuple(environ.items())
    if (known := _read.get(asked)) is not None:
        return known
    run = _read_run(words, environ)
    # Whether volumes are there is looked at anew each time. All else follows from the words.
    if run is not None and not run.request.options.volumes and len(repr(asked)) <= _MOST_TEXT:
        if len(_read) >= _MOST_READ:
            _read.clear()
        _read[asked] = run
    return run


def _read_run(words: Sequence[str], environ: Mapping[str, str]) -> ShortRun | None:
    if _HELP.intersection(before_dashes(words)):
        return None
    try:
        args = _parser().parse(words, Arguments())
        if not _is_plain(args):
            return None
        settings = with_backend(args.settings(environ), args.backend, args.pull)
        options = options_of(args)
    except UsageError:
        return None
    paths = (settings.cache_dir, settings.run_dir, settings.authfile, settings.ca_file, args.report)
    if not all(path is None or path.is_absolute() for path in paths):
        return None
    request = RunRequest(args.image, options, args.runtime, workload=args.workload)
    return ShortRun(request, settings, args.report)


@cache
def _parser() -> Parser:
    """Making it takes longer than everything else here."""
    return COMMAND.parser("veneer run")


def _is_plain(args: Arguments) -> bool:
    own = args.json or args.quiet or args.verbose or args.timing or args.timing_record or args.tty
    relative = args.image.startswith("oci:") and not args.image.startswith("oci:/")
    return not (
        own
        or relative
        or any("=" not in item for item in args.env)
        or any(not item.startswith("/") for item in args.volume)
    )


if __name__ == "__main__":
    sys.exit(main(read_run, read_status))
