"""``veneer mount``: an image's root file system on a directory."""

import os
from pathlib import Path

import click

from veneer.cli.backend import backend_option, with_backend
from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.render import size_text
from veneer.errors import UsageError

__all__ = ["mount"]


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("image")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--read-only", is_flag=True, help="No writable layer; always so without root.")
@click.option(
    "--upper",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what is written in DIR; by default it is thrown away with the mount.",
)
@backend_option
@click.option("--foreground", is_flag=True, help="Serve the mount here until it is unmounted.")
def mount(
    invocation: Invocation,
    image: str,
    directory: Path,
    *,
    read_only: bool,
    upper: Path | None,
    backend: str | None,
    foreground: bool,
) -> int:
    """Mount IMAGE on DIRECTORY, which must be empty and is made if it is missing.

    The mount is served by a process of its own in the background; veneer umount ends it.
    """
    from veneer.daemon.mounts import clean_stale
    from veneer.daemon.request import MountInfo, MountRequest
    from veneer.daemon.spawn import start_mount

    root = os.geteuid() == 0
    if upper is not None and (read_only or not root):
        raise UsageError(
            "--upper needs root" if not read_only else "--upper and --read-only exclude each other"
        )
    settings, output = with_backend(invocation.settings, backend), invocation.output
    request = MountRequest.create(image, directory, settings, writable=root and not read_only, upper=upper)

    def show(info: MountInfo) -> None:
        document = info.to_json() | {"foreground": foreground}
        how = "writable" if info.writable else "read-only"
        fetched = f"{info.requests} requests, {size_text(info.bytes_received)}, {info.seconds:.2f} s"
        output.result(document, f"mounted {info.image} on {info.mountpoint} ({how}, {info.backend}; {fetched})")

    async def work() -> None:
        await clean_stale(request.settings.run_dir)
        with output.reporting() as report:
            if foreground:
                from veneer.daemon.service import serve_mount

                await serve_mount(request, show, report=report)
            else:
                show(await start_mount(request, report=report))

    invocation.run(work)
    return 0
