"""The tree of an :class:`~veneer.index.model.ImageIndex` as FUSE operations.

This is the only place where FUSE errors are made. Nothing here can change: the kernel may keep every
entry, attribute and page it has seen for as long as it likes, so time-outs are practically infinite and
pages survive ``close``. Inode numbers follow from nodes (the root is 1, any other node is ``node + 2``), so
there is nothing to count and ``forget`` has nothing to do.

Invariant: a read returns exactly the bytes that the index promises, or an errno. Non-goals: fetching,
verifying and caching (the store does), and writing (an overlay does).
"""

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Generic, NoReturn, Protocol, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from veneer.errors import VeneerError
from veneer.index.model import ImageIndex
from veneer.mount.failures import FailureLog
from veneer.mount.readahead import ReadAhead

__all__ = ["DeviceReader", "FuseStats", "TreeOperations"]

D = TypeVar("D")
D_contra = TypeVar("D_contra", contravariant=True)

#: How long the kernel may keep names and attributes: the image cannot change, so ten years.
FOREVER_S = 10 * 365 * 86_400
#: What a directory says of its size, like a directory of one block elsewhere.
DIRECTORY_SIZE = 4096

_OFFSET = 2
_BLOCK = 512


class DeviceReader(Protocol[D_contra]):
    """What the tree needs of the span store."""

    def cached(self, attached: D_contra, offset: int, length: int) -> bytes | None:
        """The bytes, when all of them are at hand; never waits."""

    async def read(
        self, attached: D_contra, offset: int, length: int, *, window: tuple[int, int] | None = None
    ) -> bytes:
        """Exactly the bytes, or a VeneerError before the read deadline has passed.

        ``window`` is the device range worth fetching along with a miss.
        """


@dataclass(slots=True)
class FuseStats:
    """Requests that reached this process; a warm mount adds nothing to them."""

    lookups: int = 0
    getattrs: int = 0
    readdirs: int = 0
    readlinks: int = 0
    xattrs: int = 0
    opens: int = 0
    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0

    def to_json(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


@dataclass(slots=True)
class _Handle:
    """One open file, and where its reader seems to be going."""

    node: int
    device: int
    start: int
    size: int
    sparse: bool
    ahead: ReadAhead


class TreeOperations(pyfuse3.Operations, Generic[D]):
    """FUSE requests answered from an index and a store. Used by one event loop only.

    Args:
        index: the tree; must not change any more.
        store: where file contents come from.
        attached: what ``store`` calls the devices of the index, in the same order.
        image: names the image in the log.
    """

    def __init__(
        self, index: ImageIndex, store: DeviceReader[D], attached: Sequence[D], *, image: str = ""
    ) -> None:
        super().__init__()
        if len(attached) != len(index.devices):
            raise ValueError(f"{len(attached)} attached devices for an index of {len(index.devices)}")
        self.stats = FuseStats()
        self.index = index
        self.enable_acl = any(
            name.startswith(b"system.posix_acl_") for pairs in index.xattrs.values() for name, _ in pairs
        )
        self._store = store
        self._attached = attached
        self._failures = FailureLog(image, index)
        self._xattrs = {node: dict(pairs) for node, pairs in index.xattrs.items() if pairs}
        self._handles: dict[int, _Handle] = {}
        self._listings: dict[int, list[tuple[bytes, int]]] = {}
        self._next_handle = 1
        self._parents: dict[int, int] | None = None
        self._statfs: StatvfsData | None = None

    # Names and attributes

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The entry of a name; a missing one is an entry without an inode, which the kernel remembers."""
        self.stats.lookups += 1
        parent = self._node(parent_inode)
        if name == b".":
            return self._attributes(parent)
        if name == b"..":
            return self._attributes(self._parent(parent))
        kids = self.index.children.get(parent)
        child = None if kids is None else kids.get(name)
        if child is None:
            missing = EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = FOREVER_S
            return missing
        return self._attributes(child)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Attributes of an inode."""
        self.stats.getattrs += 1
        return self._attributes(self._node(inode))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Target of a symlink."""
        self.stats.readlinks += 1
        target = self.index.targets.get(self._node(inode))
        if target is None:
            raise FUSEError(errno.EINVAL)
        return target

    def _node(self, inode: int) -> int:
        if inode == pyfuse3.ROOT_INODE:
            return self.index.root
        node = inode - _OFFSET
        # Only a made-up file handle (open_by_handle_at) can name a node that no name leads to.
        if not 0 <= node < len(self.index.mode) or not self.index.nlink[node]:
            raise FUSEError(errno.ESTALE)
        return node

    def _inode(self, node: int) -> int:
        return pyfuse3.ROOT_INODE if node == self.index.root else node + _OFFSET

    def _parent(self, node: int) -> int:
        if self._parents is None:
            self._parents = {
                child: parent
                for parent, kids in self.index.children.items()
                for child in kids.values()
                if stat.S_ISDIR(self.index.mode[child])
            }
        return self._parents.get(node, self.index.root)

    def _attributes(self, node: int) -> EntryAttributes:
        index = self.index
        mode = index.mode[node]
        entry = EntryAttributes()
        entry.st_ino = self._inode(node)
        entry.entry_timeout = entry.attr_timeout = FOREVER_S
        entry.st_mode = mode
        entry.st_nlink = index.nlink[node]
        entry.st_uid = index.uid[node]
        entry.st_gid = index.gid[node]
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = index.mtime_ns[node]
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFREG:
            entry.st_size = index.size[node]
            entry.st_blocks = -(-self._stored(node) // _BLOCK)
        elif kind == stat.S_IFDIR:
            entry.st_size = DIRECTORY_SIZE
            entry.st_blocks = DIRECTORY_SIZE // _BLOCK
        elif kind == stat.S_IFLNK:
            entry.st_size = len(index.targets[node])
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            entry.st_rdev = os.makedev(*index.rdevs[node])
        return entry

    def _stored(self, node: int) -> int:
        segments = self.index.segments.get(node)
        return self.index.size[node] if segments is None else sum(length for _, length in segments)

    # Directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """A handle on a snapshot of the listing."""
        node = self._node(inode)
        kids = self.index.children.get(node, {})
        handle = self._new_handle()
        self._listings[handle] = [(b".", node), (b"..", self._parent(node)), *kids.items()]
        return handle

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Entries from ``start_id`` with their attributes, until the kernel's buffer is full."""
        self.stats.readdirs += 1
        listing = self._listings[fh]
        for number in range(start_id, len(listing)):
            name, node = listing[number]
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), number + 1):
                return

    async def releasedir(self, fh: int) -> None:
        """Forget the listing."""
        del self._listings[fh]

    # Extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One attribute's value.

        An image without any answers ENOSYS, once: the kernel then stops asking, and asking for
        ``security.capability`` before every exec would cost more than all other look-ups.
        """
        self.stats.xattrs += 1
        if not self._xattrs:
            raise FUSEError(errno.ENOSYS)
        value = self._xattrs.get(self._node(inode), {}).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Names of all attributes."""
        self.stats.xattrs += 1
        return list(self._xattrs.get(self._node(inode), ()))

    # Contents

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """A handle; the pages read through it stay in the page cache for whoever opens next."""
        self.stats.opens += 1
        node, index = self._node(inode), self.index
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        handle, start = self._new_handle(), index.data[node]
        self._handles[handle] = _Handle(
            node=node,
            device=index.device_of(node),
            start=start,
            size=index.size[node],
            sparse=node in index.segments,
            ahead=ReadAhead(start, start + self._stored(node)),
        )
        return FileInfo(fh=handle, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Exactly the bytes of the range that lie within the file."""
        handle = self._handles[fh]
        length = min(size, handle.size - off)
        self.stats.reads += 1
        if length <= 0:
            return b""
        try:
            if handle.sparse:
                data = await self._read_sparse(handle, off, length)
            else:
                data = await self._read_range(handle, handle.start + off, length)
        except VeneerError as error:
            self._fail(handle, off, length, error)
        self.stats.read_bytes += length
        return data

    async def release(self, fh: int) -> None:
        """Forget the handle."""
        del self._handles[fh]

    async def _read_range(self, handle: _Handle, offset: int, length: int) -> bytes:
        attached = self._attached[handle.device]
        data = self._store.cached(attached, offset, length)
        if data is None:
            window = handle.ahead.window(offset, length)
            data = await self._store.read(attached, offset, length, window=window)
        if len(data) != length:
            raise RuntimeError(f"the store returned {len(data)} bytes for {length}")
        return data

    async def _read_sparse(self, handle: _Handle, off: int, length: int) -> bytes:
        """Holes are zeros; the data of all segments is one run on the device, so one read gets it."""
        extents = self.index.extents(handle.node, off, length)
        if not extents:
            return bytes(length)
        low = extents[0].offset
        high = extents[-1].offset + extents[-1].length
        data = await self._read_range(handle, low, high - low)
        out = bytearray(length)
        for extent in extents:
            start, place = extent.offset - low, extent.file_offset - off
            out[place : place + extent.length] = data[start : start + extent.length]
        return bytes(out)

    def _fail(self, handle: _Handle, off: int, length: int, error: VeneerError) -> NoReturn:
        self.stats.failed_reads += 1
        self._failures.record(handle.node, off, length, error)
        raise FUSEError(error.errno) from error

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        return handle

    # The file system as a whole

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Size of the image; nothing is free."""
        if self._statfs is None:
            seen = {node for _, node in self.index.walk()}
            data = StatvfsData()
            data.f_bsize = data.f_frsize = _BLOCK
            data.f_blocks = sum(-(-self._stored(node) // _BLOCK) for node in seen)
            data.f_files = len(seen)
            data.f_namemax = 255
            self._statfs = data
        return self._statfs
