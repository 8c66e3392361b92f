"""What a worker writes down for the one that comes after it: of each mount, and of what is in no mount.

A mount's record names everything that is needed to serve it again; with it lies the request, whose image is
pinned to the manifest that was mounted. Devices of a tree that was only kept are named by no record: their
marks are found by the cache directories, which are noted before anything there is marked. All functions block.
"""

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from veneer.daemon.place import Place
from veneer.daemon.request import MountRequest
from veneer.errors import IntegrityError, MountError
from veneer.image import Image
from veneer.image.packs import NamedPack
from veneer.image.pinned import PinnedIndex
from veneer.mount import kernel
from veneer.mount.base import Choice
from veneer.mount.resident import Existing
from veneer.mount.state import MountRecord

__all__ = ["Restorable", "is_there", "note_cache", "noted_caches", "read_state", "write_state"]

log = logging.getLogger(__name__)

_STATE = "resident.json"
_CACHES = "caches.json"


@dataclass(frozen=True, slots=True)
class Restorable(Existing):
    """What a record tells of a mount besides its request.

    Args:
        pack: which one the kernel reads, if any.
        index: which one it was mounted with.
    """

    pack: NamedPack | None
    index: PinnedIndex


def write_state(
    place: Place, request: MountRequest, choice: Choice, image: Image, superblocks: tuple[str, ...]
) -> None:
    """Write down what is needed to serve a mount again. Raises OSError."""
    pinned = replace(image.reference, digest=image.manifest.digest)
    state = {
        "request": replace(request, image=str(pinned)).to_json(),
        "backend": choice.backend,
        "reason": choice.reason,
        "superblocks": superblocks,
        "pack": image.pack and image.pack.named.to_json(),
        "index": PinnedIndex.of(image).to_json(),
    }
    new = place.directory / f".{_STATE}"
    new.write_text(json.dumps(state))
    new.replace(place.directory / _STATE)


def read_state(place: Place) -> tuple[MountRequest, Choice, "Restorable"] | None:
    """What is needed to serve a mount again; None when it was never finished, so that nobody has it.

    Raises IntegrityError when that cannot be read any more.
    """
    try:
        state = json.loads((place.directory / _STATE).read_bytes())
        return (
            MountRequest.from_json(state["request"]),
            Choice(state["backend"], state["reason"]),
            Restorable(
                tuple(state["superblocks"]),
                NamedPack.from_json(pack) if (pack := state["pack"]) else None,
                PinnedIndex.from_json(state["index"]),
            ),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"what was written down of it cannot be read: {error!r}") from error


def note_cache(run_dir: Path, cache_dir: Path) -> None:
    """Remember a cache directory for whoever comes after this process. Raises MountError."""
    known = noted_caches(run_dir)
    if cache_dir in known:
        return
    new = run_dir / f".{_CACHES}"
    try:
        new.write_text(json.dumps([os.fspath(path) for path in (*known, cache_dir)]))
        new.replace(run_dir / _CACHES)
    except OSError as error:
        raise MountError(f"cannot write below {run_dir}: {error.strerror}") from error


def noted_caches(run_dir: Path) -> list[Path]:
    """What :func:`note_cache` was told."""
    try:
        return [Path(str(path)) for path in json.loads((run_dir / _CACHES).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        log.warning("cannot read %s cause=%r", run_dir / _CACHES, str(error))
        return []


def is_there(place: Place, existing: Existing | None) -> bool:
    """Whether the kernel has the mount still, as far as can be told without what was written down of it."""
    if any(entry.ours for entry in kernel.mounts_at(place.tree)):
        return True
    if existing is None:
        return False
    listed = os.listdir("/sys/fs/erofs") if existing.superblocks else ()
    return bool(set(listed).intersection(existing.superblocks)) and _same_boot(place.record)


def _same_boot(record: MountRecord) -> bool:
    return record.process.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
