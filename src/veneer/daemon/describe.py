"""What whoever serves a mount tells about it: facts of image, store and backend, gathered."""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from veneer.daemon.report import HintReport, LayerReport, MountReport, PackReport
from veneer.daemon.request import MountInfo
from veneer.image import Image
from veneer.image.packs import FoundPack
from veneer.mount.base import Choice
from veneer.mount.state import MountRecord
from veneer.store.attached import AttachedDevice

__all__ = ["mount_info", "mount_report"]


def mount_info(
    record: MountRecord,
    image: Image,
    *,
    choice: Choice,
    log: Path,
    directory: Path,
    transport: Mapping[str, int],
    seconds: float,
) -> MountInfo:
    """A mount that is up, served by this process."""
    return MountInfo(
        id=record.id,
        image=record.image,
        digest=str(image.manifest.digest),
        mountpoint=os.fspath(record.mountpoint),
        pid=os.getpid(),
        backend=choice.backend,
        backend_reason=choice.reason,
        writable=record.upper is not None,
        upper=None if record.upper is None or record.upper.private else os.fspath(record.upper.directory),
        index_origin=image.index_origin,
        log=os.fspath(log),
        bundle=os.fspath(directory) if record.container else None,
        requests=transport["requests"],
        bytes_received=transport["bytes_received"],
        seconds=round(seconds, 4),
    )


def mount_report(
    record: MountRecord,
    image: Image,
    attached: Sequence[AttachedDevice],
    *,
    choice: Choice,
    inodes: int,
    store: Mapping[str, int],
    kernel: Mapping[str, int],
    transport: Mapping[str, int],
    direct: Collection[int],
    packed: AttachedDevice | None = None,
    hint: HintReport | None = None,
) -> MountReport:
    """A mount and its counters."""
    return MountReport(
        digest=str(image.manifest.digest),
        backend=choice.backend,
        backend_reason=choice.reason,
        index_origin=image.index_origin,
        writable=record.upper is not None,
        uptime_s=round(time.time() - record.since, 1),
        inodes=inodes,
        layers=tuple(
            LayerReport(
                digest=str(device.device.blob.digest),
                size=device.size,
                cached=device.cached,
                spans=len(device.spans),
                cached_spans=0 if device.file is None else device.file.map.present_spans,
                complete=device.complete,
                direct=number in direct,
            )
            for number, device in enumerate(attached)
        ),
        store=store,
        kernel=kernel,
        transport=transport,
        pack=_pack_report(image.pack, packed) if image.pack else None,
        hint=hint,
    )


def _pack_report(pack: FoundPack, packed: AttachedDevice | None) -> PackReport:
    named = pack.named
    return PackReport(
        workload=named.workload,
        origin=named.origin,
        digest=str(named.descriptor.digest),
        size=pack.index.device.spans.size,
        cached=0 if packed is None else packed.cached,
        mapped=packed is not None,
        complete=packed is not None and packed.complete,
        static=named.static,
        image="" if named.image is None else str(named.image),
    )
