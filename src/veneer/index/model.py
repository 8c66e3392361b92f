"""The one internal model: a device per layer, cut into spans, and a tree of names over the devices.

A :class:`LayerIndex` is what one layer says: a :class:`LayerTree` (with whiteouts still in it) and a
:class:`Device`. An :class:`ImageIndex` is the merged result that mounts, listings and comparisons use.

Trees are columns, not objects: an image of 50,000 files costs a few arrays, and 10,000 rows decode and
merge in milliseconds. Rows of a :class:`LayerTree` are in breadth-first order, children of one directory
next to each other and sorted by name, so a directory is a slice. In an :class:`ImageIndex` a row of layer k
keeps its place at ``base_of_layer_k + row`` and is called a *node*; rows that a higher layer hides are
simply not reachable.
"""

import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = [
    "DEFLATE",
    "IMPLICIT_DIR",
    "LINK",
    "OVERLAY_XATTRS",
    "WHITEOUT",
    "WINDOW_SIZE",
    "Codec",
    "Device",
    "Extent",
    "ImageIndex",
    "LayerIndex",
    "LayerTree",
    "MetadataPolicy",
    "Span",
    "SpanTable",
    "Xattrs",
    "pack_carry",
]

# Kinds of rows that st_mode has no type for; the numbers are unused values of S_IFMT.
#: Hides the same name of the layers below.
WHITEOUT = 0
#: Another name for the inode of a row of this layer (``links``) or of a path below (``far_links``).
LINK = 0o030000
#: A directory that the layer implies but does not describe: keeps the attributes it has below.
IMPLICIT_DIR = 0o050000

Xattrs = tuple[tuple[bytes, bytes], ...]
#: What overlayfs obeys in the layers that it shows, where whiteouts and redirections can be written like this,
#: begins with one of these. No tree has such attributes.
OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")


@dataclass(frozen=True, slots=True)
class Codec:
    """How the stored bytes of a span become plain bytes.

    Args:
        name: ``raw``, ``zstd`` (one frame that states its content size), ``zstd-frames`` (whole frames),
            ``gzip`` (one member) or ``deflate`` (a stretch of a gzip stream, see :data:`DEFLATE`).
        seal: the authenticated cipher around it, "" for none. Readers refuse ciphers they do not know.
        parameters: of the codec. Those of ``deflate`` are the key of the device with the windows.
    """

    name: str
    seal: str = ""
    parameters: bytes = b""


#: Codec of a stretch of a gzip stream that begins at a block boundary, which may be inside of a byte. Such a
#: span is decoded with the bits that the byte before it has left (:func:`pack_carry`) and with the
#: :data:`WINDOW_SIZE` plain bytes before it, or what it needs of them: its window.
DEFLATE = "deflate"
#: Bytes that deflate can refer back to (RFC 1951).
WINDOW_SIZE = 32 << 10


class Span(NamedTuple):
    """One row of a :class:`SpanTable`.

    Offsets and lengths are in bytes, ``digest`` is the SHA-256 of what is stored, ``carry`` the bits before
    that.
    """

    number: int
    offset: int
    length: int
    stored_offset: int
    stored_length: int
    codec: Codec
    digest: bytes
    carry: int = 0


def pack_carry(count: int, bits: int) -> int:
    """``count`` bits (0 to 7), the first of the stream lowest, as one byte; 0 for none of them."""
    return 1 << count | bits if count else 0


@dataclass(frozen=True, slots=True, eq=False)
class SpanTable:
    """The spans of one device. They tile it: span i is ``starts[i]`` to ``starts[i + 1]``.

    Args:
        starts: n + 1 device offsets, strictly ascending from 0 to the size of the device.
        stored_offsets: n offsets in the blob, ascending, not overlapping.
        stored_lengths: n lengths in the blob, each at least 1.
        digests: n times 32 bytes: SHA-256 of each span's stored bytes.
        codecs: the distinct codecs in use.
        codec_of: n indexes into ``codecs``; empty when there is only one.
        carries: of ``deflate``: n bytes, the bits that belong to each span and are in the byte before its first
            one (:func:`pack_carry`). Empty for other codecs, and when there are none anywhere.
    """

    starts: "array[int]"
    stored_offsets: "array[int]"
    stored_lengths: "array[int]"
    digests: bytes
    codecs: tuple[Codec, ...]
    codec_of: bytes = b""
    carries: bytes = b""

    def __len__(self) -> int:
        return len(self.stored_lengths)

    @property
    def size(self) -> int:
        """Size of the device in bytes."""
        return self.starts[-1]

    def __getitem__(self, number: int) -> Span:
        start = self.starts[number]
        return Span(
            number,
            start,
            self.starts[number + 1] - start,
            self.stored_offsets[number],
            self.stored_lengths[number],
            self.codecs[self.codec_of[number] if self.codec_of else 0],
            self.digests[32 * number : 32 * number + 32],
            self.carries[number] if self.carries else 0,
        )

    def __iter__(self) -> Iterator[Span]:
        return map(self.__getitem__, range(len(self)))

    def covering(self, offset: int, length: int) -> range:
        """Numbers of the spans that hold ``length`` bytes from ``offset``; the range must lie in the device."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"range {offset}+{length} outside the device of {self.size} bytes")
        if length == 0:
            return range(0)
        return range(bisect_right(self.starts, offset) - 1, bisect_right(self.starts, offset + length - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """One layer's data: where it is stored, and what the whole of it must hash to.

    Args:
        blob: descriptor of the stored layer.
        diff_id: digest of the device's bytes, as the image config states it.
        spans: how the blob is cut.
        key: names the device in the cache: SHA-256 of its canonical span section (which names the blob),
            so a cache entry can never be taken for one with other spans. Where spans have windows, their codec
            names those, and so does the key.
        windows: the device with the windows of the spans if those have any: that of span n is the
            :data:`WINDOW_SIZE` bytes from n times that on.
    """

    blob: Descriptor
    diff_id: Digest
    spans: SpanTable
    key: Digest
    windows: "Device | None" = None


@dataclass(slots=True, eq=False)
class LayerTree:
    """What one layer adds, changes and hides. Row 0 is the root; all columns have one item a row.

    Sizes and offsets are bytes, times are nanoseconds since the epoch. Rare facts are dicts by row.

    Args:
        names: last component of the path; ``b""`` for the root.
        mode: ``st_mode`` with its type bits, or WHITEOUT, LINK, or ``IMPLICIT_DIR | permissions``.
        uid: owner.
        gid: group.
        mtime_ns: modification time.
        size: of a regular file; 0 otherwise.
        data: device offset of a non-empty regular file's first stored byte; 0 otherwise.
        first_child: row of a directory's first child; 0 when it has none.
        child_count: number of a directory's children, whiteouts included.
        targets: symlinks.
        links: LINK rows whose inode is a row of this layer (never itself a LINK, WHITEOUT or directory).
        far_links: LINK rows whose inode is in a layer below: the target's path, ``b"a/b"``.
        rdevs: (major, minor) of device nodes.
        xattrs: sorted by name, of any row that has them.
        segments: sparse files: (file offset, length) of the data, stored back to back from ``data``.
        opaque: directories that hide everything below them.
    """

    names: list[bytes]
    mode: "array[int]"
    uid: "array[int]"
    gid: "array[int]"
    mtime_ns: "array[int]"
    size: "array[int]"
    data: "array[int]"
    first_child: "array[int]"
    child_count: "array[int]"
    targets: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, int] = field(default_factory=dict)
    far_links: dict[int, bytes] = field(default_factory=dict)
    rdevs: dict[int, tuple[int, int]] = field(default_factory=dict)
    xattrs: dict[int, Xattrs] = field(default_factory=dict)
    segments: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    opaque: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class MetadataPolicy:
    """What an index kept of the metadata in its tars, and how much it did not.

    Args:
        devices: ``drop`` or ``keep``: device nodes. (0, 0) character devices are never kept: overlayfs
            would read them as whiteouts.
        dropped: what was left out or clamped -> how many, such as ``{"device node": 3}``.
    """

    devices: str = "drop"
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LayerIndex:
    """One layer: its tree and its device."""

    tree: LayerTree
    device: Device


class Extent(NamedTuple):
    """``length`` bytes of a file at ``file_offset`` are at ``offset`` of device ``device``."""

    file_offset: int
    device: int
    offset: int
    length: int


@dataclass(slots=True, eq=False)
class ImageIndex:
    """An image as one tree over its devices; what mounts and listings read. Nothing changes it once made.

    Columns are by node; nodes of LINK, WHITEOUT and hidden rows exist but no name leads to them.

    Args:
        devices: one a layer, lowest first.
        bases: first node of each layer's rows, ascending; ``bases[0] == 0``.
        root: node of the root directory.
        children: directory node -> name -> node, in name order (iteration order is the readdir order), of every
            directory that a name leads to, breadth first.
        nlink: by node; of a directory 2 + its subdirectories, of others the names that lead to it.
    """

    devices: tuple[Device, ...]
    bases: Sequence[int]
    root: int
    children: dict[int, dict[bytes, int]]
    mode: "array[int]"
    uid: "array[int]"
    gid: "array[int]"
    mtime_ns: "array[int]"
    size: "array[int]"
    data: "array[int]"
    nlink: "array[int]"
    targets: dict[int, bytes]
    rdevs: dict[int, tuple[int, int]]
    xattrs: dict[int, Xattrs]
    segments: dict[int, tuple[tuple[int, int], ...]]
    policy: MetadataPolicy = field(default_factory=MetadataPolicy)

    def device_of(self, node: int) -> int:
        """Number of the device that a regular file's data are on."""
        return bisect_right(self.bases, node) - 1

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Every (path, node), parents first, names in order; the root is ``b""``."""
        stack = [(b"", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            if kids := self.children.get(node):
                prefix = path + b"/" if path else b""
                stack.extend((prefix + name, child) for name, child in reversed(kids.items()))

    def extents(self, node: int, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where a regular file's bytes in the given range are; what no extent covers is a hole (zeros)."""
        size = self.size[node]
        end = size if length is None else min(size, offset + length)
        if offset >= end or not stat.S_ISREG(self.mode[node]):
            return []
        device, place = self.device_of(node), self.data[node]
        segments = self.segments.get(node)
        if segments is None:
            return [Extent(offset, device, place + offset, end - offset)]
        out = []
        for start, count in segments:
            low, high = max(start, offset), min(start + count, end)
            if low < high:
                out.append(Extent(low, device, place + low - start, high - low))
            place += count
        return out
