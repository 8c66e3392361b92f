"""``veneer umount``: the end of a mount."""

from pathlib import Path

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command

__all__ = ["umount"]


@click.command(epilog=EXIT_STATUS)
@command
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Detach now; go on serving whoever uses it still.")
def umount(invocation: Invocation, directory: Path, *, lazy: bool) -> int:
    """Unmount DIRECTORY. What was written without --upper is thrown away."""
    from veneer.daemon.mounts import umount as unmount
    from veneer.mount.state import MountRecord

    async def work() -> MountRecord:
        return await unmount(directory, invocation.settings.run_dir.absolute(), lazy=lazy)

    record = invocation.run(work)
    invocation.output.result({"mountpoint": str(record.mountpoint), "image": record.image, "lazy": lazy}, "")
    return 0
