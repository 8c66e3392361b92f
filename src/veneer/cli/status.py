"""``veneer status``: what is mounted, and what has been fetched of it."""

from typing import TYPE_CHECKING, Any

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.render import size_text, table

if TYPE_CHECKING:
    from veneer.daemon.mounts import Listing, MountStatus
    from veneer.daemon.report import HintReport, PackReport

__all__ = ["COMMAND", "shown"]


def run(invocation: Invocation, _args: CommonArguments) -> int:
    """Show what is mounted, who serves it, and how much of each layer is in the cache."""
    from veneer.daemon.mounts import list_mounts

    found = list_mounts(invocation.settings.run_dir.absolute())
    invocation.output.result(*shown(found, json=invocation.output.json))
    return 0


def shown(found: "Listing", *, json: bool) -> tuple[object, str]:
    """What is printed: with ``--json``, or for people. Nobody waits for the other one to be made."""
    if json:
        return {"daemon": found.daemon, "mounts": [mount.to_json() for mount in found.mounts]}, ""
    parts = [*map(_describe, found.mounts)] or ["nothing is mounted"]
    if found.daemon is not None:
        parts.append(_describe_daemon(found.daemon))
    return None, "\n\n".join(parts)


def _describe(found: "MountStatus") -> str:
    record = found.record
    place = "detached but in use" if record.kind == "detached" else f"on {record.mountpoint}"
    server = "the daemon" if record.daemon else f"process {record.process.pid}"
    where = f"{record.image} {place}, served by {server}"
    if record.kind == "run":
        where += ", the root of a container"
    if found.report is None:
        return f"{where}, which does not answer as this version of veneer does"
    report = found.report
    how = "writable" if report.writable else "read-only"
    lines = [
        f"{where} for {report.uptime_s:.0f} s ({how})",
        f"  backend {report.backend}: {report.backend_reason}",
    ]
    if (origin := _ORIGINS.get(report.index_origin)) is not None:
        lines.append(f"  {origin}")
    store, kernel = report.store, report.kernel
    if report.backend == "erofs-fanotify":
        lines.append(f"  {report.complete} of {len(report.layers)} layers complete, which need no daemon")
    else:
        if report.direct:
            of = f"{report.direct} of {len(report.layers)} layers"
            lines.append(f"  {of} were complete when it was mounted, which the kernel reads by itself")
        lines.append(
            f"  {kernel['reads']} reads, {store['misses']} of them waited, {kernel['failed_reads']} failed; "
            f"{store['requests']} requests for data, {size_text(store['bytes_fetched'])}"
        )
    if (pack := report.pack) is not None:
        lines.append(f"  {_describe_pack(pack)}")
    if (hint := report.hint) is not None:
        lines.append(f"  {_describe_hint(hint, len(report.layers))}")
    rows = [
        (
            f"  {layer.digest[:19]}",
            f"{size_text(layer.cached)} of {size_text(layer.size)}",
            f"{layer.percent:.0f} %",
        )
        for layer in report.layers
    ]
    return "\n".join([*lines, table(rows)]) if rows else "\n".join(lines)


#: How an image without a published index was loaded.
_ORIGINS = {
    "streamed": "no index: its layers were downloaded whole for this mount, where they were not here already",
    "local": "no index but the one that was made here when its layers were downloaded",
}


def _describe_pack(pack: "PackReport") -> str:
    of = {"annotation": "of the image", "local": "made by this host"}.get(pack.origin, pack.origin)
    if pack.image:
        of = f"made by this host for {pack.image[:19]}, whose layers it is of"
    kind = "static pack" if pack.static else "pack"
    which = f"{kind} of the workload {pack.workload}, {of}: "
    if not pack.mapped:
        return which + "only tells what to fetch first"
    how_much = f"{size_text(pack.cached)} of {size_text(pack.size)}"
    return which + how_much + (", which needs no daemon" if pack.complete else "")


def _describe_hint(hint: "HintReport", layers: int) -> str:
    of = ", ".join(image[:19] for image in hint.images)
    whose = "attached to the image" if hint.origin == "attached" else f"of {of}"
    kind = "static profile" if hint.static else "profile"
    return (
        f"{kind} of the workload {hint.workload}, {whose}: {size_text(hint.size)} of {hint.layers} "
        f"of {layers} layers, fetched first"
    )


def _describe_daemon(daemon: "dict[str, Any]") -> str:
    from veneer.daemon.instance import known_log

    events, stores = daemon["events"], daemon["stores"].values()
    lines = [
        (
            f"daemon: process {daemon['worker']} for {daemon['uptime_s']:.0f} s, {daemon['mounts']} mounts, "
            f"{size_text(daemon['memory'])} of memory, "
            f"{daemon['descriptors']} of {daemon['descriptors_limit']} descriptors"
        )
    ]
    if events:
        lines.append(
            f"  {events['events']} questions of the kernel, {events['waited']} of them waited, "
            f"{events['denied']} failed, {events['pending']} waiting now"
        )
    if daemon["decoder"]:
        spans = sum(store["entrusted"] for store in stores)
        lines.append(f"  process {daemon['decoder']} decodes: {spans} spans so far")
    requests, fetched = (sum(store[name] for store in stores) for name in ("requests", "bytes_fetched"))
    lines.append(f"  {requests} requests for data, {size_text(fetched)}; log: {known_log(daemon['log'])}")
    kept = [tree for tree in daemon["trees"] if tree["idle_s"] is not None]
    lines += [_describe_kept(tree) for tree in kept]
    for links in daemon["links"].values():
        lines += [_describe_link(host, link) for host, link in links.items()]
    return "\n".join(lines)


def _describe_kept(tree: "dict[str, Any]") -> str:
    """A tree that no mount has now."""
    line = f"  kept for another start for {tree['idle_s']:.0f} s: {tree['image']}"
    if (pack := tree["pack"]) is not None and pack["cached"] < pack["size"]:
        line += f", with {size_text(pack['cached'])} of {size_text(pack['size'])} of its pack"
    return line


#: What links are called whose times say nothing about the way to the registry: see veneer.source.ahead.
ASKED_AHEAD = "ahead:"


def _describe_link(host: str, link: "dict[str, Any]") -> str:
    """A registry: who has what of it, of how much."""
    classes = link["classes"]
    running = sum(one["running"] for one in classes.values())
    parts = []
    for name, one in classes.items():
        if one["requests"] or one["queued_spans"]:
            waiting = f", {one['queued_spans']} spans waiting" if one["queued_spans"] else ""
            parts.append(f"{name} {size_text(one['bytes'])} in {one['requests']} requests{waiting}")
    if host.startswith(ASKED_AHEAD):
        host = host.removeprefix(ASKED_AHEAD)
        return f"  {host}, asked for together with an index: {'; '.join(parts) or 'nothing'}"
    rate = link["background_bytes_per_s"]
    budget = f"background at most {size_text(rate)}/s" if rate else "background without a limit"
    speed = f"{link['rtt_ms']:.1f} ms, {size_text(link['bytes_per_s'])}/s" if parts else "not measured yet"
    return (
        f"  {host}: {speed}; {running} of {link['most_requests']} requests running, {budget}\n"
        f"    {'; '.join(parts) or 'nothing was asked of it'}"
    )


COMMAND = Command(run, CommonArguments)
