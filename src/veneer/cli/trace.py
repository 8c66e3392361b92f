"""``veneer trace``: when what happened in a start, and doing the same again without the container."""

from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation, group_of
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text, table
from veneer.cli.replay import COMMAND as REPLAY
from veneer.cli.timing import timing_file, write_timing
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.timing.record import TimingRecord

__all__ = ["COMMAND"]

_OUTPUT = "Write it to FILE: NAME.json, or NAME.svg for a waterfall."


class ShowArguments(CommonArguments):
    """What ``veneer trace show`` takes."""

    mount: str
    output: Path | None


def add_show_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("MOUNT")
    parser.add_argument("-o", "--output", type=timing_file, metavar="FILE", help=_OUTPUT)


def show(invocation: Invocation, args: ShowArguments) -> int:
    """Show when what happened since MOUNT was asked for.

    That is how long its phases took, and the latest requests of its store.

    MOUNT is a mount point, or the id of a mount as veneer status has it. Every mount keeps such a record,
    of bounded length, so this can be asked after the fact.
    """
    import os

    from veneer.daemon.timed import timing_of
    from veneer.mount.state import mount_records

    run_dir = invocation.settings.run_dir
    place = Path(os.path.realpath(args.mount))
    found = [one for one in mount_records(run_dir) if args.mount == one.id or place == one.mountpoint]
    if not found:
        hint = "veneer status lists what is mounted"
        if os.path.isfile(args.mount):
            hint = f"to draw a timing record: veneer trace draw {args.mount} NAME.svg"
        raise UsageError(f"{args.mount} is no mount of veneer's", hint=hint)
    record = timing_of(found[-1].id, run_dir)
    _put_out(invocation, record, args.output)
    return 0


class DrawArguments(CommonArguments):
    """What ``veneer trace draw`` takes."""

    record: Path
    output: Path


def add_draw_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("RECORD", type=existing_file)
    parser.add_word("OUTPUT", type=timing_file)


def draw(invocation: Invocation, args: DrawArguments) -> int:
    """Draw the timing record in the file RECORD as a waterfall. OUTPUT is a file whose name ends with .svg."""
    if args.output.suffix != ".svg":
        raise UsageError(f"{args.output} does not end with .svg")
    write_timing(args.output, _read(args.record))
    return 0


def _put_out(invocation: Invocation, record: "TimingRecord", path: Path | None) -> None:
    if path is not None:
        write_timing(path, record)
        return
    invocation.output.result(record.to_json(), _text(record))


def _read(path: Path) -> "TimingRecord":
    from veneer.timing.record import MAX_RECORD_SIZE, TimingRecord

    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_SIZE + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return TimingRecord.parse(data, str(path))


def _text(record: "TimingRecord") -> str:
    phases = [("PHASE", "FROM", "FOR")]
    for phase in record.phases:
        lasted = "goes on" if phase.ended is None else f"{phase.ended - phase.began:.1f} ms"
        phases.append((phase.name, f"{phase.began:.1f} ms", lasted))
    ranges: list[tuple[str, ...]] = [
        ("SENT", "QUEUED", "FIRST BYTE", "LAST BYTE", "READY", "BYTES", "FOR", "OF")
    ]
    for one in record.ranges:
        device = record.devices[one.device]
        after = (None if at is None else at - one.sent for at in (one.first_byte, one.last_byte, one.ready))
        times = ("-" if ms is None else f"+{ms:.1f} ms" for ms in after)
        queued = f"-{one.sent - one.queued:.1f} ms"
        what = f"{device.kind} {device.blob[:19]}"
        ranges.append((f"{one.sent:.1f} ms", queued, *times, size_text(one.length), one.priority, what))
    waits = [read.wait for read in record.reads if read.wait > 0]
    reads = f"{len(record.reads)} reads, of which {len(waits)} waited, {sum(waits):.1f} ms together"
    return "\n\n".join([table(phases), table(ranges), reads])


COMMAND = group_of(
    "Show when what happened in a start, draw it, replay what it read.",
    {
        "show": Command(show, ShowArguments, add_show_arguments),
        "draw": Command(draw, DrawArguments, add_draw_arguments),
        "replay": REPLAY,
    },
)
