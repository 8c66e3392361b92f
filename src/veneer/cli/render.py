"""How results, progress and errors look: text for people, JSON for programs, from one stream of events.

Standard output carries data only. With ``--json`` that is one document, and progress and errors are JSON
lines with a ``type`` on standard error. rich is imported only where a terminal shows a progress bar.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from typing import TYPE_CHECKING

from veneer.errors import RateLimited, RegistryError, VeneerError
from veneer.events import Event, Notice, Progress, Reporter, event_to_json, silent

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["Output", "path_json", "printable", "result_text", "size_text", "table"]

#: Without a terminal, progress is a line at most this often, so that logs stay readable.
PLAIN_INTERVAL_S = 10.0


def size_text(size: int) -> str:
    """A size for people: ``999 B``, ``1.5 KiB``, ``80.5 MiB``."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def path_json(path: bytes) -> dict[str, str]:
    """A path for JSON: ``path``, and ``path_b64`` as well where it is not UTF-8."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        import base64

        return {"path": path.decode(errors="replace"), "path_b64": base64.b64encode(path).decode()}


def printable(text: str) -> str:
    """Text with what would confuse a terminal escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two blanks apart, the last one unpadded."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def result_text(document: object, text: str, *, json: bool) -> str:
    """What the answer to a command is printed as."""
    if json:
        text = dumps(document, indent=2, ensure_ascii=False)
    return text + "\n" if text else ""


class Output:
    """Where one invocation writes to. Used from the main task only."""

    def __init__(self, *, json: bool = False, quiet: bool = False, progress: bool = True) -> None:
        self.json = json
        self.quiet = quiet
        self._progress = progress
        self._last_line: dict[str, float] = {}

    def result(self, document: object, text: str) -> None:
        """The answer to the command: ``document`` with ``--json``, else ``text``."""
        sys.stdout.write(result_text(document, text, json=self.json))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Something for people that is not the answer."""
        if not self.quiet and not self.json:
            print(text, file=sys.stderr)  # noqa: T201 - this module is where printing happens

    def fail(self, error: VeneerError) -> None:
        """Say what failed and what to do, as the last lines of standard error."""
        if self.json:
            self._line(
                {"type": "error", "code": error.exit_code, "message": error.message, "hint": error.hint}
                | ({"status": error.status, "codes": error.codes} if isinstance(error, RegistryError) else {})
                | ({"retry_after_s": error.retry_after_s} if isinstance(error, RateLimited) else {})
            )
            return
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201

    @contextmanager
    def reporting(self) -> Iterator[Reporter]:
        """A reporter for the time of some long work."""
        if self.json:
            yield self._json_event
        elif not self._progress or self.quiet:
            yield self._notices_only if not self.quiet else silent
        elif sys.stderr.isatty():
            with _bars() as reporter:
                yield reporter
        else:
            yield self._plain_event

    def _json_event(self, event: Event) -> None:
        self._line(event_to_json(event))

    def _notices_only(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.say(f"note: {event.message}")

    def _plain_event(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.say(f"note: {event.message}")
            return
        key, now = f"{event.task} {event.item}", time.monotonic()
        finished = event.done == event.total
        if not finished and now - self._last_line.setdefault(key, now) < PLAIN_INTERVAL_S:
            return
        self._last_line[key] = now
        self.say(f"{key}: {_amount(event)}")

    def _line(self, document: dict[str, object]) -> None:
        print(dumps(document, ensure_ascii=False), file=sys.stderr, flush=True)  # noqa: T201


def _amount(event: Progress) -> str:
    if event.unit == "bytes":
        done = size_text(event.done)
        return done if event.total is None else f"{done} of {size_text(event.total)}"
    return (
        f"{event.done} {event.unit}" if event.total is None else f"{event.done} of {event.total} {event.unit}"
    )


@contextmanager
def _bars() -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    tasks: dict[tuple[str, str], TaskID] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:

        def report(event: Event) -> None:
            if isinstance(event, Notice):
                console.print(f"note: {event.message}", highlight=False, markup=False)
                return
            key = (event.task, event.item)
            if key not in tasks:
                tasks[key] = bars.add_task(f"{event.task} {event.item}", total=event.total, amount="")
            bars.update(tasks[key], completed=event.done, total=event.total, amount=_amount(event))

        yield report
