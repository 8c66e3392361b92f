"""Making a pack: the chunks of files that a profile touches, in its order, in independent zstd frames.

The bytes come through the store, so they are verified; the pack's index says where each of them is from. Equal
profiles of equal images give equal packs.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import trio

from veneer.convert.frames import Frame, compress
from veneer.errors import NotFound, UsageError
from veneer.image import Image
from veneer.image.packs import STATIC
from veneer.index.model import Codec, Device, ImageIndex, SpanTable
from veneer.index.paths import ACCOUNT_FILES, find
from veneer.index.wire_spans import encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import ANNOTATION_PACK_BLOB, ANNOTATION_PROFILE, VENEER_PACK, VENEER_PACK_INDEX
from veneer.prefetch.pack import MAX_PACK_SIZE, PackIndex, Place, encode_pack_index
from veneer.prefetch.placement import Range, hot_ranges
from veneer.prefetch.profile import Profile
from veneer.source.tasks import run_all
from veneer.store.fetch import Priority
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["LEVEL", "STATIC_LEVEL", "BuiltPack", "build_pack", "pack_tree"]

#: A pack is made once and fetched at every first start; 9 MB take three seconds of one core.
LEVEL = 19
#: The same for one that a conversion makes unasked: a tenth larger, in a tenth of the time.
STATIC_LEVEL = 9
#: Spans grow with what is before them: the first ones are waited for, the later ones should compress well.
_FIRST_SPAN, _LAST_SPAN, _GROWTH = 256 << 10, 1 << 20, 4
#: Frames that are compressed at a time.
_CORES = 2
#: Of a file of accounts; longer ones are none.
_MOST_ACCOUNTS = 64 << 10
#: How far ahead ranges are asked for while a pack is put together.
_AHEAD = 64


@dataclass(frozen=True, slots=True, eq=False)
class BuiltPack:
    """A pack in memory.

    Args:
        workload: what it is for.
        index: the blob with its index.
        data: the blob with its bytes.
        content: what the index says.
        static: nothing was run for its profile.
    """

    workload: str
    index: bytes
    data: bytes
    content: PackIndex
    static: bool = False

    @property
    def descriptor(self) -> Descriptor:
        """Of the index."""
        annotations = {ANNOTATION_PACK_BLOB: f"{self.blob.digest} {self.blob.size}"}
        if self.static:
            annotations[ANNOTATION_PROFILE] = STATIC
        return Descriptor(VENEER_PACK_INDEX, Digest.of(self.index), len(self.index), annotations)

    @property
    def blob(self) -> Descriptor:
        """Of the data."""
        return self.content.device.blob


async def build_pack(
    image: Image,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    profile: Profile,
    *,
    level: int = LEVEL,
) -> BuiltPack:
    """The pack of an image for a profile.

    Args:
        image: where the files are.
        store: where its bytes are read.
        attached: its devices, in order.
        profile: what to pack, in which order.
        level: of zstd.

    Raises:
        UsageError: the profile touches no file of the image.
        VeneerError: as reading does.
    """
    return await pack_tree(await image.load(), image.name, store, attached, profile, level=level)


async def pack_tree(
    index: ImageIndex,
    name: str,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    profile: Profile,
    *,
    level: int = LEVEL,
) -> BuiltPack:
    """The same for a tree; ``name`` names the image in errors."""
    ranges = [*_accounts(index), *(Range(use.layer, use.offset, use.length) for use in profile.uses)]
    hot = await trio.to_thread.run_sync(hot_ranges, index, ranges, MAX_PACK_SIZE)
    if not hot or not profile.restricted(device.diff_id for device in index.devices).uses:
        raise UsageError(
            f"the profile of the workload {profile.workload!r} touches no file of {name}",
            hint="it may be of another image; record one: veneer profile record IMAGE",
        )
    plain = await _gather(hot, store, {one.device.diff_id: one for one in attached})
    spans = [plain[start:end] for start, end in _cuts(len(plain))]
    calls = [partial(_compressed, span, level) for span in spans]
    frames = await run_all(calls, at_once=_CORES)
    content = PackIndex(_device(plain, frames), _places(hot))
    data = b"".join(frame.stored for frame in frames)
    return BuiltPack(profile.workload, encode_pack_index(content), data, content, profile.static)


def _accounts(index: ImageIndex) -> Iterator[Range]:
    """What is read before the container begins, and so is in no profile."""
    for path in ACCOUNT_FILES:
        try:
            node = find(index, path, "the image")
        except NotFound:
            continue
        for extent in index.extents(node):
            yield Range(index.devices[extent.device].diff_id, extent.offset, min(extent.length, _MOST_ACCOUNTS))


async def _gather(hot: Sequence[Range], store: SpanStore, devices: dict[Digest, AttachedDevice]) -> bytes:
    pieces = []
    for number, (layer, offset, length) in enumerate(hot):
        if number % _AHEAD == 0:
            for ahead in hot[number : number + 2 * _AHEAD]:
                store.prefetch(
                    devices[ahead.layer], ahead.offset, ahead.offset + ahead.length, priority=Priority.PROFILE
                )
        pieces.append(await store.read(devices[layer], offset, length, priority=Priority.PROFILE))
    return b"".join(pieces)


def _cuts(size: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of each span. All but the last are whole pages."""
    start = 0
    while start < size:
        length = min(max(_FIRST_SPAN, start // _GROWTH & -4096), _LAST_SPAN)
        end = min(size, start + length)
        yield start, end
        start = end


async def _compressed(span: bytes, level: int) -> Frame:
    frames = await trio.to_thread.run_sync(compress, [span], level)
    return frames[0]


def _device(plain: bytes, frames: Sequence[Frame]) -> Device:
    lengths = [len(frame.stored) for frame in frames]
    spans = SpanTable(
        array("q", accumulate((frame.length for frame in frames), initial=0)),
        array("q", list(accumulate(lengths, initial=0))[:-1]),
        array("q", lengths),
        b"".join(frame.digest for frame in frames),
        (Codec("zstd"),),
    )
    hasher = hashlib.sha256()
    for frame in frames:
        hasher.update(frame.stored)
    blob = Descriptor(VENEER_PACK, Digest.from_bytes(hasher.digest()), sum(lengths))
    diff_id = Digest.of(plain)
    return Device(blob, diff_id, spans, Digest.of(encode_spans(blob, diff_id, spans)))


def _places(hot: Sequence[Range]) -> tuple[Place, ...]:
    starts = accumulate((one.length for one in hot), initial=0)
    return tuple(sorted(Place(*one, at) for one, at in zip(hot, starts, strict=False)))
