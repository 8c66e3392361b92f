"""The devices of an image as files of one FUSE file system, for EROFS to be mounted over.

A directory with a file ``0``, ``1``, ... for each device of the index, and one more for the tail when the
metadata image has one. Sizes are whole blocks, as the device slots say; what a device does not have of its last
block is zeros, and so is what no copy covers of the tail.

Invariant: a read is answered with every byte that was asked for and lies within the file, or with an errno.
EROFS takes a short answer for the end of the data and shows zeros in place of the rest.

Nothing here is made for anybody but the kernel, so only root can see it.
"""

import errno
import logging
import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, NoReturn, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from veneer.erofs.chunks import Copy
from veneer.erofs.ondisk import BLOCK, DeviceSlot
from veneer.errors import VeneerError
from veneer.index.model import Device
from veneer.mount.failures import FailureLog
from veneer.mount.filetable import FileTable
from veneer.mount.fuse import FOREVER_S, DeviceReader, FuseStats

__all__ = ["DeviceOperations"]

log = logging.getLogger(__name__)

D = TypeVar("D")

_FIRST_INODE = pyfuse3.ROOT_INODE + 1


class DeviceOperations(pyfuse3.Operations, Generic[D]):
    """FUSE requests for devices, answered from a store. Used by one event loop only.

    Args:
        devices: what the metadata image's tree is over.
        files: of that tree; asked with the first miss.
        store: where the bytes are.
        attached: what ``store`` calls the devices, in the same order.
        slots: all devices of the metadata image, ``devices`` first.
        copies: what the tail holds; there is one more slot than devices exactly if there are any.
        image: names the image in the log.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        files: FileTable,
        store: DeviceReader[D],
        attached: Sequence[D],
        *,
        slots: Sequence[DeviceSlot],
        copies: Sequence[Copy] = (),
        image: str = "",
    ) -> None:
        super().__init__()
        if len(attached) != len(devices) or len(slots) != len(attached) + bool(copies):
            raise ValueError(
                f"{len(attached)} attached devices and {len(slots)} slots for {len(devices)} devices"
            )
        self.stats = FuseStats()
        self._store = store
        self._attached = attached
        self._sizes = [slot.blocks * BLOCK for slot in slots]
        self._real = [device.spans.size for device in devices]
        self._copies = copies
        self._copy_ends = [copy.offset + copy.length for copy in copies]
        self._files = files
        self._keys = [device.key for device in devices]
        self._image = image
        self._failures: FailureLog | None = None
        self._preparing = trio.Lock()

    # Names and attributes

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The entry of a device number."""
        self.stats.lookups += 1
        if parent_inode != pyfuse3.ROOT_INODE or not name.isdigit():
            raise FUSEError(errno.ENOENT)
        number = int(name)
        if number >= len(self._sizes) or b"%d" % number != name:
            raise FUSEError(errno.ENOENT)
        return self._attributes(_FIRST_INODE + number)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes of the directory or of a device."""
        self.stats.getattrs += 1
        return self._attributes(inode)

    def _attributes(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = FOREVER_S
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o500, 2
            return entry
        size = self._sizes[self._device(inode)]
        entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o400, 1
        entry.st_size, entry.st_blocks = size, size // BLOCK
        return entry

    def _device(self, inode: int) -> int:
        number = inode - _FIRST_INODE
        if not 0 <= number < len(self._sizes):
            raise FUSEError(errno.ESTALE)
        return number

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """There is one directory only."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """All devices, for people who look: EROFS knows the names."""
        self.stats.readdirs += 1
        for number in range(start_id, len(self._sizes)):
            entry = self._attributes(_FIRST_INODE + number)
            if not pyfuse3.readdir_reply(token, b"%d" % number, entry, number + 1):
                return

    # Contents

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """A handle without a page cache of its own: EROFS has one, of files, above it."""
        self.stats.opens += 1
        number = self._device(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        return FileInfo(fh=number, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Every byte of the range that lies within the file."""
        length = min(size, self._sizes[fh] - off)
        self.stats.reads += 1
        if length <= 0:
            return b""
        data = await (self._read_device if fh < len(self._real) else self._read_tail)(fh, off, length)
        if len(data) != length:
            raise RuntimeError(f"{len(data)} bytes for {length} of device {fh}")
        self.stats.read_bytes += length
        return data

    async def _read_device(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a device, and zeros for the rest of its last block."""
        have = min(length, self._real[number] - offset)
        if have <= 0:
            return bytes(length)
        attached = self._attached[number]
        data = self._store.cached(attached, offset, have)
        if data is None:
            await self._prepare(number)
            window = self._files.window(self._keys[number], offset, have)
            try:
                data = await self._store.read(attached, offset, have, window=window)
            except VeneerError as error:
                self._fail(number, offset, have, error)
        return data if have == length else data + bytes(length - have)

    async def _read_tail(self, _number: int, offset: int, length: int) -> bytes:
        """What copies hold of the range, and zeros between them."""
        out = bytearray(length)
        end = offset + length
        for copy in self._copies[bisect_right(self._copy_ends, offset) :]:
            if copy.offset >= end:
                break
            low, high = max(offset, copy.offset), min(end, copy.offset + copy.length)
            data = await self._read_device(copy.device, copy.source + low - copy.offset, high - low)
            out[low - offset : high - offset] = data
        return bytes(out)

    async def _prepare(self, number: int) -> None:
        """Find out about the files of a device, which may take the decoding of the tree, once."""
        key = self._keys[number]
        if self._files.is_prepared(key):
            return
        try:
            async with self._preparing:  # one thread for all who wait
                if not self._files.is_prepared(key):
                    await trio.to_thread.run_sync(self._files.prepare, key)
        except VeneerError as error:
            self.stats.failed_reads += 1
            count = self.stats.failed_reads
            if count & (count - 1) == 0:
                log.error("reads failed image=%s so_far=%d cause=%r", self._image, count, error.message)
            raise FUSEError(error.errno) from error

    def _fail(self, number: int, offset: int, length: int, error: VeneerError) -> NoReturn:
        self.stats.failed_reads += 1
        node, start = self._files.at(self._keys[number], offset, length)
        if self._failures is None:
            self._failures = FailureLog(self._image, self._files.index)
        self._failures.record(node, offset - start, length, error)
        raise FUSEError(error.errno) from error
