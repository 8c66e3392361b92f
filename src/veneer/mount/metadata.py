"""EROFS metadata images in files, kept from one mount to the next.

The kernel parses nothing but what our own writer has made: an image is used again only if its bytes have the
SHA-256 that was noted when it was written, the one that its UUID is made of, and is written anew otherwise. Its
name follows from the index it was made of, the packs it is mapped to and the writer's version, so mounts of one
image share one file.

What is kept stands for the tree: the index itself is asked for only when there is no image to use.

They are in the cache directory: EROFS does not take an image from tmpfs, which run directories are on. A file
may be deleted at any time; a mount of it goes on.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from veneer.erofs.chunks import Copy
from veneer.erofs.ondisk import HEAD_SIZE, TAG_SIZE, DeviceSlot, seal, unsealed
from veneer.erofs.writer import WRITER_VERSION, ErofsImage, write_erofs
from veneer.errors import MountError, NotFound
from veneer.formats.local import replace_file
from veneer.index.model import Extent, ImageIndex
from veneer.index.paths import ACCOUNT_FILES, find
from veneer.mount.hot import HotFile, hot_files
from veneer.mount.kernel import EROFS_SUFFIX
from veneer.oci.digest import Digest
from veneer.prefetch.pack import PackIndex
from veneer.prefetch.placement import placements

__all__ = [
    "KEPT",
    "MetadataImage",
    "PackFiles",
    "kept_image",
    "may_be_kept",
    "metadata_image",
    "mount_kept",
]

#: Bytes of images that are kept: some hundred images of usual size.
KEPT = 256 << 20

T = TypeVar("T")

#: How often an image is mounted whose file is deleted each time before that.
_ATTEMPTS = 5
_DIRECTORY = "erofs"
_FACTS = ".json"


class PackFiles(Protocol):
    """A pack as far as files are mapped to it."""

    @property
    def identity(self) -> Digest:
        """Digest of its index."""

    @property
    def index(self) -> PackIndex:
        """What it has."""


@dataclass(frozen=True, slots=True)
class MetadataImage:
    """One image on disk. See :class:`~veneer.erofs.writer.ErofsImage` for the facts about it."""

    path: Path
    devices: tuple[DeviceSlot, ...]
    copies: tuple[Copy, ...]
    dropped: int
    inodes: int
    #: Path -> where the file is that tells of users, in the order of its bytes; one that is missing is nowhere.
    accounts: Mapping[bytes, tuple[Extent, ...]]
    #: What packs have of files, in their order.
    hot: tuple[HotFile, ...]


def metadata_image(
    index: Callable[[], ImageIndex],
    identity: Digest,
    devices: int,
    cache_dir: Path,
    packs: Sequence[PackFiles] = (),
) -> MetadataImage:
    """The metadata image of an image, from the cache directory or new. Blocks.

    Args:
        index: gives the tree; not called when there is a good image of it.
        identity: digest of what the tree was made of.
        devices: number of devices that the tree is over.
        cache_dir: where images are kept.
        packs: what files are mapped to where they are in one.

    Raises:
        UnsupportedFormat: EROFS cannot hold this tree.
        MountError: there is no place for the image.
        IntegrityError: from ``index``.
    """
    if (found := kept_image(identity, devices, cache_dir, packs)) is not None:
        return found
    path = _path(identity, cache_dir, packs)
    image, accounts, hot = _write(index(), [pack.index for pack in packs])
    try:
        _save(path, image, accounts, hot)
    except OSError as error:
        raise MountError(
            f"cannot keep the metadata image {path}: {error.strerror}", hint="make room, or use --backend fuse"
        ) from error
    _prune(path)
    return MetadataImage(
        path, image.devices, image.copies, sum(image.dropped.values()), image.inodes, accounts, hot
    )


def kept_image(
    identity: Digest, devices: int, cache_dir: Path, packs: Sequence[PackFiles] = ()
) -> MetadataImage | None:
    """What :func:`metadata_image` would find. Blocks."""
    found = _load(_path(identity, cache_dir, packs))
    fits = found is not None and len(found.devices) - bool(found.copies) == devices + len(packs)
    return found if fits else None


def may_be_kept(identity: Digest, cache_dir: Path, packs: Sequence[PackFiles] = ()) -> bool:
    """Whether :func:`kept_image` would look at an image at all. Blocks."""
    return _path(identity, cache_dir, packs).exists()


def mount_kept(
    image: MetadataImage, again: Callable[[], MetadataImage], mount: Callable[[MetadataImage], T]
) -> T:
    """Mount an image although somebody may delete its file before that, as ``veneer cache clear`` does. Blocks.

    Args:
        image: what is mounted.
        again: writes the same image once more.
        mount: mounts it.

    Raises what ``again`` and ``mount`` raise.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return mount(image)
        except MountError:
            if image.path.exists():
                raise
            image = again()
    return mount(image)


def _path(identity: Digest, cache_dir: Path, packs: Sequence[PackFiles]) -> Path:
    made_of = " ".join(map(str, (WRITER_VERSION, identity, *(pack.identity for pack in packs))))
    name = hashlib.sha256(made_of.encode()).hexdigest()
    return cache_dir / _DIRECTORY / f"{name}{EROFS_SUFFIX}"


def _write(
    index: ImageIndex, packs: Sequence[PackIndex]
) -> tuple[ErofsImage, Mapping[bytes, tuple[Extent, ...]], tuple[HotFile, ...]]:
    slots = [DeviceSlot(pack.device.diff_id.hex[:TAG_SIZE].encode(), pack.device.spans.size) for pack in packs]
    placed = placements(index, packs)
    accounts = {
        path: where for path in ACCOUNT_FILES if (where := _whereabouts(index, placed, path)) is not None
    }
    return write_erofs(index, packs=slots, placements=placed), accounts, hot_files(index, placed)


def _whereabouts(
    index: ImageIndex, placed: Mapping[int, Sequence[Extent]], path: bytes
) -> tuple[Extent, ...] | None:
    """Where a file is, so that it can be read without the tree; None if that cannot be said so simply."""
    try:
        node = find(index, path, "the image")
    except NotFound:
        return ()
    if not stat.S_ISREG(index.mode[node]) or node in index.segments:
        return None
    return tuple(placed.get(node) or index.extents(node))


def _load(path: Path) -> MetadataImage | None:
    """What was kept, if it is what was written."""
    try:
        facts = json.loads(path.with_suffix(_FACTS).read_bytes())
        with path.open("rb") as file:
            head = file.read(HEAD_SIZE)
            digest = hashlib.sha256(blank := unsealed(head))
            hashlib.file_digest(file, lambda: digest)
            if digest.hexdigest() != facts["sha256"] or seal(blank, digest.digest()) != head:
                return None
            os.utime(file.fileno())  # for _prune
        devices = tuple(DeviceSlot(tag.encode("latin-1"), size) for tag, size in facts["devices"])
        copies = tuple(Copy(*fields) for fields in facts["copies"])
        accounts = {
            where.encode("latin-1"): tuple(Extent(*fields) for fields in extents)
            for where, extents in facts["accounts"].items()
        }
        hot = tuple(
            HotFile(where.encode("latin-1"), [(int(start), int(length)) for start, length in ranges])
            for where, ranges in facts["hot"]
        )
        return MetadataImage(path, devices, copies, int(facts["dropped"]), int(facts["inodes"]), accounts, hot)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(
    path: Path, image: ErofsImage, accounts: Mapping[bytes, Sequence[Extent]], hot: Iterable[HotFile]
) -> None:
    facts = {
        "sha256": image.digest.hex(),
        "devices": [(slot.tag.decode("latin-1"), slot.size) for slot in image.devices],
        "copies": image.copies,
        "dropped": sum(image.dropped.values()),
        "inodes": image.inodes,
        "accounts": {where.decode("latin-1"): extents for where, extents in accounts.items()},
        "hot": [(where.decode("latin-1"), ranges) for where, ranges in hot],
    }
    replace_file(path, image.data)
    replace_file(path.with_suffix(_FACTS), json.dumps(facts).encode())


def _prune(newest: Path) -> None:
    """Delete the images not used for longest, so that :data:`KEPT` bytes are left."""
    found = []
    for path in newest.parent.glob(f"*{EROFS_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((path != newest, -status.st_mtime_ns, status.st_size, path))
    total = 0
    for _, _, size, path in sorted(found):
        total += size
        if total > KEPT and path != newest:
            for victim in (path, path.with_suffix(_FACTS)):
                with contextlib.suppress(OSError):
                    victim.unlink()
