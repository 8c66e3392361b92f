"""What happened in the rounds of a scenario, and whether every error that a reader got is accounted for.

An error is explained by what the script itself did at that moment (the tree was not mounted), or by the log: a
line about this very file; or, when lines were left out for their number, any such line; or, while killed
processes were being replaced, the line that says so. The cause must be one that the scenario may lead to.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from crashes.readers import ReadError

__all__ = ["UNEXPLAINED", "Outcome", "Window", "explain"]

_FAILED = re.compile(r"read failed .*?path=(?P<path>'[^']*'|\"[^\"]*\").*? error=(?P<error>\w+)")
_LEFT_OUT = re.compile(r"failed_reads_not_shown=")
#: A daemon says as many lines in ten seconds; more are counted only.
_LINES_SHOWN = 20
#: What the daemon says about processes of its own that died.
_RESTART = re.compile(r"worker ended pid=|primary died|standby died pid=|supervisors? (?:has |have )?died")
#: The kernel asks for whole pages, and reads ahead: so many small files may lie in a page before the one that
#: is named, and so many in a range after it.
_BEFORE, _AFTER = 8, 16
#: An error may reach its reader a little after its cause is over.
_AFTER_S = 1.0

UNEXPLAINED = "unexplained"


@dataclass(slots=True)
class Window:
    """A time in which errors of some kind come from what the script did, or are to be found in the log.

    Args:
        cause: what the script did.
        errnos: names of those that it explains by itself; empty: only with a line about a restart in the log.
        begin: monotonic seconds.
        end: of it.
    """

    cause: str
    errnos: frozenset[str]
    begin: float
    end: float = float("inf")

    def covers(self, error: ReadError) -> bool:
        """Whether the error happened in it."""
        return self.begin <= error.at <= self.end + _AFTER_S


@dataclass(slots=True)
class Outcome:
    """Sums over the rounds of one scenario."""

    scenario: str
    backend: str
    seed: int
    rounds: int = 0
    faults: int = 0
    reads: int = 0
    bytes: int = 0
    wrong: int = 0
    seconds: float = 0.0
    #: (errno, cause) -> how many.
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    failure: str = ""
    examples: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def unexplained(self) -> int:
        """Errors without a cause."""
        return sum(count for (_, cause), count in self.errors.items() if cause.startswith(UNEXPLAINED))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failure and not self.wrong and not self.unexplained

    def to_json(self) -> dict[str, object]:
        """The outcome as a JSON object."""
        errors = [
            {"errno": name, "cause": cause, "count": n} for (name, cause), n in sorted(self.errors.items())
        ]
        plain = ("scenario", "backend", "seed", "rounds", "faults", "reads", "bytes", "wrong", "failure")
        facts = {name: getattr(self, name) for name in plain}
        return facts | {
            "seconds": round(self.seconds, 1),
            "errors": errors,
            "notes": dict(self.notes),
            "ok": self.ok,
        }


def explain(
    error: ReadError,
    log: str,
    windows: Sequence[Window],
    allowed: frozenset[str],
    order: Mapping[str, tuple[int, int]],
) -> str:
    """The cause of an error, or a text that begins with :data:`UNEXPLAINED`.

    Args:
        error: what a reader got.
        log: what the processes of the mount have said since before the error.
        windows: what the script did.
        allowed: causes that are acceptable: classes of errors in the log.
        order: layer and place in it of each file.
    """
    if error.doing == "sweep":
        return f"{UNEXPLAINED}: everything is well again"
    inside = [window for window in windows if window.covers(error)]
    for window in inside:
        if error.name in window.errnos:
            return window.cause
    told = list(_FAILED.finditer(log))
    kinds = Counter(match["error"] for match in told if _beside(error.path, match["path"][2:-1], order))
    if not kinds and (len(told) >= _LINES_SHOWN or _LEFT_OUT.search(log)):
        kinds = Counter(match["error"] for match in told)
    for kind, _ in kinds.most_common():
        if kind in allowed:
            return kind
    if any(not window.errnos for window in inside) and _RESTART.search(log):
        return "restart"
    return f"{UNEXPLAINED}: log says {dict(kinds)}" if kinds else f"{UNEXPLAINED}: nothing in the log"


def _beside(path: str, told: str, order: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a line about one file may stand for another: it names one that lies in the range.

    That is the root for a range that starts before the first file of a layer.
    """
    layer, place = order[path]
    if told and told not in order:
        return False
    told_layer, told_place = order[told] if told else (layer, 0)
    return layer == told_layer and -_BEFORE <= place - told_place <= _AFTER


@contextmanager
def window(windows: list[Window], cause: str, *errnos: str) -> Iterator[None]:
    """Note that errors during the block have a cause."""
    windows.append(Window(cause, frozenset(errnos), monotonic()))
    try:
        yield
    finally:
        windows[-1].end = monotonic()
