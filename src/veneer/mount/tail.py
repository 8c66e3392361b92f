"""The tail of a metadata image as a local file.

EROFS cannot map data that are not aligned to blocks on their device; the writer gives them blocks of an extra
device, the tail, and lists what has to be copied there. A backend whose devices are local files needs that one
as a file too, complete before it is mounted: nobody fills it later.

Invariant: a file that is used has the content that was read, verified, through the store: what is kept from the
last time is used only if its bytes have the SHA-256 that was noted then. Files are as sparse as the tail is.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from veneer.erofs.chunks import Copy
from veneer.erofs.ondisk import BLOCK
from veneer.errors import MountError, UnsupportedFormat
from veneer.mount.kernel import EROFS_SUFFIX
from veneer.mount.metadata import MetadataImage
from veneer.source.tasks import open_nursery

__all__ = ["MOST_COPIED", "tail_file"]

#: More than this is worth no copy at every first mount: only odd sparse files need any.
MOST_COPIED = 64 << 20
#: Copies that are read at a time: the store makes few requests of what lies together.
_READERS = 16
#: Longest read.
_PIECE = 4 << 20
#: Hashed at a time; blocks of nothing but zeros are left out, so that holes make no difference.
_GRAIN = 4096

_SUFFIX, _NOTE = ".tail", ".tail.json"

D_contra = TypeVar("D_contra", contravariant=True)
D = TypeVar("D")


class Reading(Protocol[D_contra]):
    """What is asked of a store; see :class:`~veneer.store.spanstore.SpanStore`."""

    async def read(self, attached: D_contra, offset: int, length: int) -> bytes:
        """Exactly the bytes, verified, or a VeneerError."""


async def tail_file(metadata: MetadataImage, store: Reading[D], attached: Sequence[D]) -> Path | None:
    """The file with the tail of ``metadata``, from the last time or new; None if there is no tail.

    Args:
        metadata: the image; the file is next to it.
        store: has the bytes that are copied.
        attached: the devices of the image, in order.

    Raises:
        UnsupportedFormat: there is too much to copy.
        MountError: there is no place for the file.
        VeneerError: what reading reported.
    """
    if not metadata.copies:
        return None
    copied = sum(copy.length for copy in metadata.copies)
    if copied > MOST_COPIED:
        raise UnsupportedFormat(
            f"{copied >> 20} MiB of sparse files are not aligned to blocks: too much to copy",
            hint="use --backend erofs-fuse",
        )
    path, size = metadata.path.with_suffix(_SUFFIX), metadata.devices[-1].blocks * BLOCK
    if await trio.to_thread.run_sync(_is_right, path, size):
        return path
    try:
        handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        try:
            with open(handle, "r+b") as file:  # noqa: ASYNC230 - a local file
                file.truncate(size)
                await _copy(metadata.copies, store, attached, file.fileno())
            await trio.to_thread.run_sync(_keep, Path(temporary), path, size)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise MountError(
            f"cannot keep the tail {path}: {error.strerror}", hint="make room, or use --backend erofs-fuse"
        ) from error
    return path


async def _copy(copies: Sequence[Copy], store: Reading[D], attached: Sequence[D], fd: int) -> None:
    limit = trio.CapacityLimiter(_READERS)

    async def copy_one(device: D, source: int, offset: int, length: int) -> None:
        async with limit:
            data = await store.read(device, source, length)
        os.pwrite(fd, data, offset)

    async with open_nursery() as nursery:
        for copy in copies:
            for at in range(0, copy.length, _PIECE):
                length = min(_PIECE, copy.length - at)
                nursery.start_soon(copy_one, attached[copy.device], copy.source + at, copy.offset + at, length)


def _is_right(path: Path, size: int) -> bool:
    try:
        note = json.loads(path.with_suffix(_NOTE).read_bytes())
        return bool(path.stat().st_size == size and note["sha256"] == _digest(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _keep(temporary: Path, path: Path, size: int) -> None:
    """Put a new file in its place, with its note, and delete those whose image is gone."""
    note = json.dumps({"sha256": _digest(temporary)}).encode()
    # Dying in between leaves a note that does not match, and so a file that is made anew.
    path.with_suffix(_NOTE).write_bytes(note)
    os.replace(temporary, path)
    for tail in path.parent.glob(f"*{_SUFFIX}"):
        if not tail.with_suffix(EROFS_SUFFIX).exists():
            for victim in (tail, tail.with_suffix(_NOTE)):
                victim.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """SHA-256 of all blocks that are not zeros, each with its offset."""
    hasher = hashlib.sha256()
    nothing = bytes(_GRAIN)
    with path.open("rb", buffering=0) as file:
        for start, end in _data(file.fileno()):
            for at in range(start - start % _GRAIN, end, _GRAIN):
                block = os.pread(file.fileno(), _GRAIN, at)
                if block != nothing[: len(block)]:
                    hasher.update(at.to_bytes(8, "little") + block)
    return hasher.hexdigest()


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Ranges outside of which the file reads as zeros, by the word of its file system."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no more
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
