"""``veneer mount``: an image's root file system on a directory."""

import os
from pathlib import Path

from veneer.cli.backend import add_backend_argument, add_pull_argument, add_workload_argument, with_backend
from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, directory
from veneer.cli.render import size_text
from veneer.cli.timing import add_timing_arguments, phases_text, write_timing
from veneer.errors import UsageError

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer mount`` takes."""

    image: str
    directory: Path
    read_only: bool
    upper: Path | None
    backend: str | None
    workload: str
    pull: str
    complete: bool
    foreground: bool
    timing: bool
    timing_record: Path | None


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("DIRECTORY", type=Path)
    add = parser.add_argument
    add("--read-only", action="store_true", help="No writable layer; always so without root.")
    add(
        "--upper",
        type=directory,
        metavar="DIR",
        help="Keep what is written in DIR; by default it is thrown away with the mount.",
    )
    add_backend_argument(parser)
    add_workload_argument(parser)
    add_pull_argument(parser)
    add(
        "--complete",
        action="store_true",
        help="Fetch all of the image in the background, when nobody waits for anything else.",
    )
    add("--foreground", action="store_true", help="Serve the mount here until it is unmounted.")
    add_timing_arguments(parser, "Say how long what took.")


def run(invocation: Invocation, args: Arguments) -> int:
    """Mount IMAGE on DIRECTORY, which must be empty and is made if it is missing.

    An image without an index is downloaded into the cache first, once, and what that takes is said; veneer
    inspect tells beforehand whether it has one.

    The mount is served in the background, by the daemon where the kernel lets it (see veneer daemon) and
    else by a process of its own; veneer umount ends it.
    """
    from veneer.daemon.client import mount_image, timed_mount
    from veneer.daemon.mounts import clean_stale
    from veneer.daemon.request import MountInfo, MountRequest

    root = os.geteuid() == 0
    if args.upper is not None and (args.read_only or not root):
        raise UsageError(
            "--upper needs root" if not args.read_only else "--upper and --read-only exclude each other"
        )
    timed = args.timing or args.timing_record is not None
    if timed and args.foreground:
        raise UsageError("a mount in the foreground is not timed", hint="use veneer trace show DIRECTORY")
    settings, output = with_backend(invocation.settings, args.backend, args.pull), invocation.output
    request = MountRequest.create(
        args.image,
        args.directory,
        settings,
        writable=root and not args.read_only,
        upper=args.upper,
        workload=args.workload,
        complete=args.complete,
    )

    def show(info: MountInfo) -> None:
        document = info.to_json() | {"foreground": args.foreground}
        how = "writable" if info.writable else "read-only"
        fetched = f"{info.requests} requests, {size_text(info.bytes_received)}, {info.seconds:.2f} s"
        output.result(document, f"mounted {info.image} on {info.mountpoint} ({how}, {info.backend}; {fetched})")

    with output.reporting() as report:
        if timed:
            info, record = timed_mount(request, report=report)
            show(info)
            if args.timing_record is not None:
                write_timing(args.timing_record, record)
            if args.timing:
                output.say(phases_text(record))
            return 0
        if not args.foreground:
            show(mount_image(request, report=report))
            return 0
        # Such a process is started again by whoever supervises it, and finds its own mount if it was killed.
        clean_stale(settings.run_dir)

        async def serve() -> None:
            from veneer.daemon.service import serve_mount

            await serve_mount(request, show, report=report)

        invocation.run(serve)
    return 0


COMMAND = Command(run, Arguments, add_arguments)
