"""``veneer status``: what is mounted, and what has been fetched of it."""

from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.render import size_text, table

if TYPE_CHECKING:
    from veneer.daemon.mounts import MountStatus

__all__ = ["COMMAND"]


def run(invocation: Invocation, _args: CommonArguments) -> int:
    """Show what is mounted, who serves it, and how much of each layer is in the cache."""
    from veneer.daemon.mounts import list_mounts

    async def work() -> "list[MountStatus]":
        return await list_mounts(invocation.settings.run_dir.absolute())

    mounts = invocation.run(work)
    text = "\n\n".join(map(_describe, mounts)) or "nothing is mounted"
    invocation.output.result([found.to_json() for found in mounts], text)
    return 0


def _describe(found: "MountStatus") -> str:
    record = found.record
    place = "detached but in use" if record.kind == "detached" else f"on {record.mountpoint}"
    where = f"{record.image} {place}, served by process {record.process.pid}"
    if record.kind == "run":
        return f"{where}, the root of a container"
    if found.report is None:
        return f"{where}, which does not answer"
    report = found.report
    how = "writable" if report.writable else "read-only"
    lines = [
        f"{where} for {report.uptime_s:.0f} s ({how})",
        f"  backend {report.backend}: {report.backend_reason}",
    ]
    store, fuse = report.store, report.fuse
    lines.append(
        f"  {fuse['reads']} reads, {store['misses']} of them waited, {fuse['failed_reads']} failed; "
        f"{store['requests']} requests for data, {size_text(store['bytes_fetched'])}"
    )
    rows = [
        (
            f"  {layer.digest[:19]}",
            f"{size_text(layer.cached)} of {size_text(layer.size)}",
            f"{layer.percent:.0f} %",
        )
        for layer in report.layers
    ]
    return "\n".join([*lines, table(rows)]) if rows else "\n".join(lines)


COMMAND = Command(run, CommonArguments)
