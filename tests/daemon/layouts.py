"""Images in OCI layouts, small enough to convert in a test, and what a test needs to mount them."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer.container.runtime import delete_container
from veneer.convert.convert import convert
from veneer.daemon.lifecycle import stop_daemon
from veneer.mount import kernel
from veneer.mount.state import detach, mount_records
from veneer.oci.descriptor import Platform
from veneer.settings import Settings
from veneer.testing.images import Layer, write_image
from veneer.testing.tars import TarItem, tar

#: One static program with hundreds of names: a complete user land.
BUSYBOX = Path("/bin/busybox")
#: Bytes that no compression makes less of, so that a part of them is a part of what is fetched.
LARGE = random.Random(1).randbytes(5_000_000)


def settings_in(directory: Path, **changes: object) -> Settings:
    values: dict[str, object] = {
        "cache_dir": directory / "cache",
        "run_dir": directory / "run",
        "cache_quota": 1 << 30,
        "read_deadline_s": 10.0,
        "platform": Platform.host(),
    }
    return Settings(**values | changes)  # type: ignore[arg-type] # fields of Settings


def busybox_layer(*more: TarItem) -> bytes:
    applets = [
        b"sh",
        b"cat",
        b"ls",
        b"id",
        b"env",
        b"pwd",
        b"sleep",
        b"true",
        b"false",
        b"hostname",
        b"tty",
        b"mount",
    ]
    applets += [b"touch", b"kill", b"stat", b"echo", b"grep", b"test", b"ulimit"]
    return tar(
        [
            *(TarItem(name, "dir", 0o755) for name in (b"bin", b"etc", b"proc", b"dev", b"sys", b"home")),
            TarItem(b"tmp", "dir", 0o1777),
            TarItem(b"bin/busybox", mode=0o755, content=BUSYBOX.read_bytes()),
            *(TarItem(b"bin/" + name, "symlink", 0o777, link=b"busybox") for name in applets),
            *more,
        ]
    )


async def lazy_image(
    directory: Path,
    settings: Settings,
    layers: Sequence[Layer | bytes],
    config: Mapping[str, object] | None = None,
    *,
    devices: str = "drop",
) -> str:
    """The reference of an image that can be mounted."""
    write_image(layers, directory, "plain", "none", config)
    await convert(f"oci:{directory}:plain", f"oci:{directory}:lazy", settings, devices=devices)
    return f"oci:{directory}:lazy"


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """Whatever the test does, no mount below ``directory`` outlives it; leaving one is a failure."""
    try:
        yield
        left = [entry.mountpoint for entry in kernel.mount_table() if directory in entry.mountpoint.parents]
        assert not left
    finally:
        if (directory / "run").exists():
            stop_daemon(directory / "run", force=True)
        for record in mount_records(directory / "run"):
            if record.container is not None:
                delete_container(*record.container)
            detach(record)
        for entry in reversed(kernel.mount_table()):
            if directory in entry.mountpoint.parents and entry.ours:
                kernel.unmount_ours(entry.mountpoint, lazy=True)
