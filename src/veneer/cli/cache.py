"""``veneer cache``: what is kept on this machine, and getting rid of it."""

import datetime as dt

from veneer.cli.command import Command, CommonArguments, Invocation, group_of
from veneer.cli.render import size_text, table

__all__ = ["COMMAND"]


def list_(invocation: Invocation, _args: CommonArguments) -> int:
    """List the cached layers, most recently used first."""
    from veneer.store.maintenance import list_devices

    devices = list_devices(invocation.settings.cache_dir)
    rows = [("LAYER", "PRESENT", "SIZE", "SPANS", "LAST USED", "")]
    for device in devices:
        when = dt.datetime.fromtimestamp(device.last_used_ns / 1e9, tz=dt.UTC).astimezone()
        rows.append(
            (
                device.blob or f"(damaged) {device.key}",
                size_text(device.present),
                size_text(device.size),
                f"{device.present_spans}/{device.spans}",
                when.strftime("%Y-%m-%d %H:%M") if device.last_used_ns else "never",
                "mounted" if device.mounted else "in use" if device.in_use else "",
            )
        )
    invocation.output.result([device.to_json() for device in devices], table(rows) if devices else "")
    return 0


def du(invocation: Invocation, _args: CommonArguments) -> int:
    """Say how much the cache takes, and how much it may."""
    from veneer.store.maintenance import usage

    used, quota = usage(invocation.settings.cache_dir), invocation.settings.cache_quota
    text = table(
        [
            ("in all", f"{size_text(used.bytes)} of {size_text(quota)}"),
            (
                "layers",
                f"{size_text(used.bytes - sum(size for _, size in used.kept.values()))}, {used.devices} layers",
            ),
            *((f"kept {kind}", f"{size_text(size)}, {count}") for kind, (count, size) in used.kept.items()),
            ("documents of images, not counted", size_text(used.metadata_bytes)),
        ]
    )
    invocation.output.result(used.to_json() | {"quota": quota}, text)
    return 0


def gc(invocation: Invocation, _args: CommonArguments) -> int:
    """Evict what was not used for longest, down to the quota (--cache-quota)."""
    from veneer.daemon.lifecycle import let_go
    from veneer.store.maintenance import collect

    let_go(invocation.settings.run_dir)
    collected = collect(invocation.settings.cache_dir, invocation.settings.cache_quota)
    text = f"freed {size_text(collected.bytes)}" + _left_alone(collected.mounted)
    invocation.output.result(collected.to_json(), text)
    return 0


def check(invocation: Invocation, _args: CommonArguments) -> int:
    """Verify every cached span again and drop what is damaged; it is fetched again when it is read."""
    from veneer.daemon.lifecycle import let_go
    from veneer.store.maintenance import check as check_all

    let_go(invocation.settings.run_dir)
    with invocation.output.reporting() as report:
        checked = check_all(invocation.settings.cache_dir, report)
    text = f"{checked.spans} spans, {size_text(checked.bytes)} are right"
    if checked.damaged or checked.discarded:
        text += f"; dropped {checked.damaged} damaged spans and {checked.discarded} layers with damaged maps"
    invocation.output.result(checked.to_json(), text + _left_alone(checked.mounted))
    return 0


def clear(invocation: Invocation, _args: CommonArguments) -> int:
    """Delete everything that can be fetched again. Writable layers stay."""
    from veneer.daemon.lifecycle import let_go
    from veneer.store.maintenance import clear as clear_all

    let_go(invocation.settings.run_dir)
    cleared = clear_all(invocation.settings.cache_dir)
    text = f"freed {size_text(cleared.bytes)}: {cleared.removed} layers removed"
    if cleared.emptied:
        text += f", {cleared.emptied} in use emptied"
    invocation.output.result(cleared.to_json(), text + _left_alone(cleared.mounted))
    return 0


def _left_alone(mounted: int) -> str:
    """Layers whose bytes the kernel reads by itself are their daemon's."""
    return f"; left {mounted} mounted layers alone" if mounted else ""


COMMAND = group_of(
    "Look after the local cache. Nothing here disturbs what is mounted.",
    {
        "ls": Command(list_, CommonArguments),
        "du": Command(du, CommonArguments),
        "gc": Command(gc, CommonArguments),
        "check": Command(check, CommonArguments),
        "clear": Command(clear, CommonArguments),
    },
)
