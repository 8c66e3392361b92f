"""Images in OCI layouts, small enough to convert in a test, and what a test needs to mount them."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer.convert.convert import convert
from veneer.mount import kernel
from veneer.mount.state import detach, mount_records
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from veneer.settings import Settings
from veneer.source.layout import OCILayout
from veneer.testing.tars import TarItem, tar

#: One static program with hundreds of names: a complete user land.
BUSYBOX = Path("/bin/busybox")


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
    applets = [b"sh", b"cat", b"ls", b"id", b"env", b"pwd", b"sleep", b"true", b"false", b"hostname", b"tty", b"mount"]
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


async def write_image(
    directory: Path, layers: Sequence[bytes], config: Mapping[str, object] | None = None
) -> None:
    """An ordinary image of uncompressed layers, as ``oci:directory:plain``."""
    layout = OCILayout(directory, create=True)

    async def push(data: bytes, media_type: str) -> Descriptor:
        descriptor = Descriptor(media_type, _digest(data), len(data))
        await layout.push_blob(descriptor, lambda: io.BytesIO(data))
        return descriptor

    platform = Platform.host()
    document = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [str(_digest(layer)) for layer in layers]},
    }
    described = await push(json.dumps(document).encode(), OCI_CONFIG)
    manifest = build_manifest(described, [await push(layer, OCI_LAYER) for layer in layers])
    await layout.push_manifest(manifest, OCI_MANIFEST, "plain")


async def lazy_image(
    directory: Path,
    settings: Settings,
    layers: Sequence[bytes],
    config: Mapping[str, object] | None = None,
    *,
    devices: str = "drop",
) -> str:
    """The reference of an image that can be mounted."""
    await write_image(directory, layers, config)
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
        for record in mount_records(directory / "run"):
            detach(record)
        for entry in reversed(kernel.mount_table()):
            if directory in entry.mountpoint.parents and entry.ours:
                kernel.unmount_ours(entry.mountpoint, lazy=True)


def _digest(data: bytes) -> Digest:
    return Digest.parse("sha256:" + hashlib.sha256(data).hexdigest())
