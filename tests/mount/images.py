"""Small images by hand, and a store that holds their bytes in memory and can be told to fail."""

import hashlib
import stat
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio

from veneer.errors import VeneerError
from veneer.index.model import Codec, Device, ImageIndex, SpanTable, Xattrs
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest


@dataclass(slots=True)
class Entry:
    """One inode; what its type does not need stays at its default."""

    mode: int
    content: bytes = b""
    target: bytes = b""
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_600_000_000_123_456_789
    rdev: tuple[int, int] | None = None
    xattrs: Xattrs = ()
    #: Of a sparse file: its size and where ``content`` lies in it.
    sparse: tuple[int, tuple[tuple[int, int], ...]] | None = None


def directory(mode: int = 0o755, **more: object) -> Entry:
    return Entry(stat.S_IFDIR | mode, **more)  # type: ignore[arg-type] # keywords of Entry


def file(content: bytes, mode: int = 0o644, **more: object) -> Entry:
    return Entry(stat.S_IFREG | mode, content, **more)  # type: ignore[arg-type] # keywords of Entry


def symlink(target: bytes) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target=target)


def digest(data: bytes) -> Digest:
    return Digest.parse("sha256:" + hashlib.sha256(data).hexdigest())


def image(tree: Mapping[bytes, Entry | bytes], root: Entry | None = None) -> tuple[ImageIndex, bytes]:
    """An index over one device, and the device's bytes. ``tree`` is in parents-first order; a value of
    bytes is the path of an inode that the name is another link to."""
    entries, nodes, data = [root or directory()], {b"": 0}, bytearray()
    children: dict[int, dict[bytes, int]] = {}
    for path, entry in tree.items():
        parent, _, name = path.rpartition(b"/")
        if isinstance(entry, bytes):
            nodes[path] = nodes[entry]
        else:
            nodes[path] = len(entries)
            entries.append(entry)
        children.setdefault(nodes[parent], {})[name] = nodes[path]
    reached = [0]
    for node in reached:
        kids = dict(sorted(children.pop(node, {}).items()))
        children[node] = kids
        reached += [kid for kid in kids.values() if stat.S_ISDIR(entries[kid].mode)]
    places, segments = array("q"), {}
    for node, entry in enumerate(entries):
        places.append(len(data) if entry.content else 0)
        data += entry.content + bytes(-len(entry.content) % 512)
        if entry.sparse:
            segments[node] = entry.sparse[1]
    nlink = array("q", bytes(8 * len(entries)))
    nlink[0] = 2
    for parent_node, kids in children.items():
        for kid in kids.values():
            is_dir = stat.S_ISDIR(entries[kid].mode)
            nlink[kid] += 2 if is_dir else 1
            nlink[parent_node] += is_dir
    size, data_digest = max(1, len(data)), digest(bytes(data))
    spans = SpanTable(array("q", [0, size]), array("q", [0]), array("q", [size]), bytes(32), (Codec("raw"),))
    device = Device(Descriptor("application/x", data_digest, size), data_digest, spans, data_digest)
    index = ImageIndex(
        devices=(device,),
        bases=[0],
        root=0,
        children=children,
        mode=array("q", (entry.mode for entry in entries)),
        uid=array("q", (entry.uid for entry in entries)),
        gid=array("q", (entry.gid for entry in entries)),
        mtime_ns=array("q", (entry.mtime_ns for entry in entries)),
        size=array("q", (entry.sparse[0] if entry.sparse else len(entry.content) for entry in entries)),
        data=places,
        nlink=nlink,
        targets={n: e.target for n, e in enumerate(entries) if e.target},
        rdevs={n: e.rdev for n, e in enumerate(entries) if e.rdev},
        xattrs={n: e.xattrs for n, e in enumerate(entries) if e.xattrs},
        segments=segments,
    )
    return index, bytes(data)


@dataclass(slots=True)
class MemoryStore:
    """A reader over devices in memory.

    ``warm`` False makes every read a miss; ``failure`` ends misses, ``blocked`` keeps them waiting.
    """

    devices: Sequence[bytes]
    warm: bool = True
    failure: VeneerError | None = None
    blocked: trio.Event | None = None
    misses: list[tuple[int, int, tuple[int, int] | None]] = field(default_factory=list)
    #: Set and made anew by each miss.
    missed: trio.Event = field(default_factory=trio.Event)

    def cached(self, attached: int, offset: int, length: int) -> bytes | None:
        return self.devices[attached][offset : offset + length] if self.warm else None

    async def read(
        self, attached: int, offset: int, length: int, *, window: tuple[int, int] | None = None
    ) -> bytes:
        self.misses.append((offset, length, window))
        self.missed.set()
        self.missed = trio.Event()
        if self.blocked is not None:
            await self.blocked.wait()
        if self.failure:
            raise self.failure
        return self.devices[attached][offset : offset + length]
