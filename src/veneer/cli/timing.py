"""The options that say what becomes of a start's timing record, and how it is written."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.parser import Parser, not_directory
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.timing.record import TimingRecord

__all__ = ["add_timing_arguments", "phases_text", "timing_file", "write_timing"]

_SUFFIXES = (".json", ".svg")


def add_timing_arguments(parser: Parser, about: str) -> None:
    """Declare ``--timing``, which does what ``about`` says, and ``--timing-record``."""
    parser.add_argument("--timing", action="store_true", help=about)
    parser.add_argument(
        "--timing-record",
        type=timing_file,
        metavar="FILE",
        help="Write when what happened to FILE: NAME.json, or NAME.svg for a waterfall of it.",
    )


def timing_file(text: str) -> Path:
    """For ``type``: a path whose suffix says how a record is to be written."""
    path = not_directory(text)
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{text} ends neither with .json nor with .svg")
    return path


def write_timing(path: Path, record: "TimingRecord") -> None:
    """Write a record as the path's suffix says. Raises UsageError."""
    if path.suffix == ".svg":
        from veneer.draw.waterfall import draw_waterfall

        text = draw_waterfall(record).render()
    else:
        text = json.dumps(record.to_json(), ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the timing record {path}: {error.strerror}") from error


def phases_text(record: "TimingRecord") -> str:
    """How long what took, in a line."""
    phases = (f"{one.name} {one.ended - one.began:.0f}" for one in record.phases if one.ended is not None)
    return f"in ms: {', '.join(phases)}"
