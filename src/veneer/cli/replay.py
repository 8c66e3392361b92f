"""``veneer trace replay``: what a start read, read again without the container."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.backend import add_workload_argument
from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file
from veneer.cli.render import size_text
from veneer.cli.timing import timing_file, write_timing
from veneer.errors import UsageError
from veneer.settings import BACKENDS

if TYPE_CHECKING:
    from veneer.events import Reporter
    from veneer.index.model import ImageIndex
    from veneer.lab.replay import Replayed, Step
    from veneer.prefetch.profile import Profile
    from veneer.timing.record import TimingRecord

__all__ = ["COMMAND"]

_STORE = "store"


class Arguments(CommonArguments):
    """What ``veneer trace replay`` takes."""

    profile: Path
    image: str
    backend: str
    workload: str
    think: float
    timing_record: Path | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("PROFILE", type=existing_file)
    parser.add_word("IMAGE")
    add = parser.add_argument
    add(
        "--backend",
        choices=(_STORE, *BACKENDS),
        default=_STORE,
        metavar="NAME",
        help="Read through the store alone (store), or through a mount by auto, fuse, erofs-fuse or "
        "erofs-fanotify. [default: %(default)s]",
    )
    add_workload_argument(parser)
    add(
        "--think",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="Pause between reads as the program did, times FACTOR; 0 for no pauses. [default: %(default)s]",
    )
    add(
        "--timing-record",
        type=timing_file,
        metavar="FILE",
        help="Write when what happened to FILE: NAME.json, or NAME.svg for a waterfall of it.",
    )


def run(invocation: Invocation, args: Arguments) -> int:
    """Read what PROFILE says of IMAGE, in its order and at its pace, and time it.

    PROFILE is a file of veneer profile export or record. What is cached is not fetched: for a cold replay
    give an empty --cache-dir. Reads follow one another; through a mount they are of the files that hold the
    ranges, with the kernel's read-ahead off. With a mount, its pack is used, if there is one.
    """
    from veneer.image.profiles import read_profile

    if not args.think >= 0:
        raise UsageError("--think must not be negative")
    try:
        profile = read_profile(args.profile)
    except OSError as error:
        raise UsageError(f"cannot read the profile {args.profile}: {error.strerror}") from error
    with invocation.output.reporting() as report:
        by = _by_store if args.backend == _STORE else _by_mount
        replayed, counts, record = by(invocation, args, profile, report)
    if args.timing_record is not None:
        write_timing(args.timing_record, record)
    requests, fetched = counts["requests"], counts["bytes_fetched"]
    invocation.output.result(
        {
            "image": args.image,
            "workload": profile.workload,
            "backend": record.backend,
            "think": args.think,
            "uses": len(profile.uses),
            "requests": requests,
            "bytes_fetched": fetched,
        }
        | replayed.to_json(),
        f"{replayed.reads} reads of {size_text(replayed.bytes_read)} by {record.backend} in "
        f"{replayed.seconds:.3f} s: {replayed.wait_s:.3f} s in {replayed.waits} waits, "
        f"{replayed.think_s:.3f} s of pauses; {requests} requests, {size_text(fetched)}",
    )
    return 0


def _by_store(
    invocation: Invocation, args: Arguments, profile: "Profile", report: "Reporter"
) -> "tuple[Replayed, Mapping[str, int], TimingRecord]":
    from veneer.lab.replay import replay_image

    return invocation.run(
        partial(replay_image, args.image, profile, invocation.settings, think=args.think, report=report)
    )


def _by_mount(
    invocation: Invocation, args: Arguments, profile: "Profile", report: "Reporter"
) -> "tuple[Replayed, Mapping[str, int], TimingRecord]":
    from veneer.daemon.client import mount_image
    from veneer.daemon.mounts import stop
    from veneer.daemon.request import MountRequest
    from veneer.daemon.timed import timing_of
    from veneer.image import open_image
    from veneer.lab.replay import replay_mount, steps_of
    from veneer.mount.state import mount_records

    settings = replace(invocation.settings, backend=args.backend)

    async def look() -> "tuple[list[Step], ImageIndex]":
        async with open_image(args.image, settings, report=report) as image:
            return steps_of(profile, image, think=args.think), await image.load()

    steps, index = invocation.run(look)
    with tempfile.TemporaryDirectory(prefix="veneer-replay-") as directory:
        request = MountRequest.create(args.image, Path(directory) / "root", settings, workload=args.workload)
        info = mount_image(request, report=report)
        (made,) = (one for one in mount_records(settings.run_dir) if one.id == info.id)
        try:
            replayed = replay_mount(steps, index, Path(info.mountpoint))
            record = timing_of(info.id, settings.run_dir)
        finally:
            last = stop(made, settings.run_dir).report
    store: Mapping[str, int] = last.store if last is not None else {}
    return replayed, {"requests": store["requests"], "bytes_fetched": store["bytes_fetched"]}, record


COMMAND = Command(run, Arguments, add_arguments)
