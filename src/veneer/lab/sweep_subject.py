"""The bytes that a sweep is over, and what compressing them in one way takes."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio
import zstandard

from veneer.errors import UsageError
from veneer.events import Progress, Reporter, silent
from veneer.image import Image
from veneer.index.model import ImageIndex
from veneer.lab.model import Touch
from veneer.lab.replay import steps_of
from veneer.mount.filetable import FileTable
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile
from veneer.store.attached import AttachedDevice
from veneer.store.fetch import Priority
from veneer.store.spanstore import SpanStore

__all__ = ["KIB", "MAX_SWEPT", "MIB", "Compressed", "Subject", "compress_spans", "read_subject", "size_name"]

KIB, MIB = 1 << 10, 1 << 20
#: Layers are held in memory.
MAX_SWEPT = 4 << 30
_READ = 8 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is swept over.

    Args:
        index: the tree of the image.
        layers: plain bytes by diffID, of the layers that the profile is about.
        touches: the trace.
        files: the read-ahead of mounts.
        keys: of the layers' devices.
    """

    index: ImageIndex
    layers: Mapping[Digest, bytes]
    touches: Sequence[Touch]
    files: FileTable
    keys: Mapping[Digest, Digest]

    def window(self, touch: Touch) -> tuple[int, int]:
        """What a mount would fetch with a miss."""
        return self.files.window(self.keys[touch.layer], touch.offset, touch.length)

    def fresh(self) -> "Subject":
        """The same for another start: what a read-ahead remembers is of one."""
        return Subject(self.index, self.layers, self.touches, FileTable(lambda: self.index), self.keys)


async def read_subject(
    image: Image,
    profile: Profile,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    *,
    think: float = 1.0,
    report: Reporter = silent,
) -> Subject:
    """Fetch the layers that a profile is about, verified. Raises UsageError for more than fits into memory."""
    touches = [
        Touch(step.think_s, step.layer, step.offset, step.length)
        for step in steps_of(profile, image, think=think)
    ]
    wanted = [one for one in attached if one.device.diff_id in {touch.layer for touch in touches}]
    total = sum(one.size for one in wanted)
    if not wanted:
        raise UsageError("the profile has no uses")
    if total > MAX_SWEPT:
        raise UsageError(
            f"the layers have {total} bytes, more than the {MAX_SWEPT} that a sweep holds in memory"
        )
    layers: dict[Digest, bytes] = {}
    done = 0
    for one in wanted:
        parts = []
        for start in range(0, one.size, _READ):
            length, window = min(_READ, one.size - start), (start, start + 4 * _READ)
            parts.append(await store.read(one, start, length, window=window, priority=Priority.COMPLETION))
            done += length
            report(Progress("read", "layers", done, total))
        layers[one.device.diff_id] = b"".join(parts)
    index = await image.load()
    keys = {device.diff_id: device.key for device in image.devices}
    subject = Subject(index, layers, touches, FileTable(lambda: index), keys)
    for layer in layers:
        await trio.to_thread.run_sync(subject.files.prepare, keys[layer])
    return subject


@dataclass(slots=True)
class Compressed:
    """Spans and what became of them; ``stored`` has an estimate where a span was not compressed."""

    stored: list[int]
    compress_s: float
    decode_s: float
    decoded: int
    sampled: float


def compress_spans(
    spans: Sequence[bytes],
    needed: Iterable[int],
    compressor: zstandard.ZstdCompressor,
    sample: int,
    reference: Sequence[int] = (),
) -> Compressed:
    """Compress the spans that a trace needs, and one in ``sample`` of the others; decode those needed.

    The others are estimated to be as much smaller than ``reference`` as those of the sample: bytes of each
    span, by default its plain ones. What compresses badly does so at every level.
    """
    reference = reference or [len(span) for span in spans]
    wanted = set(needed)
    stored = [0] * len(spans)
    frames: dict[int, bytes] = {}
    plain = taken = others = 0
    began = time.process_time()
    for number, span in enumerate(spans):
        if number in wanted or number % sample == 0:
            frame = compressor.compress(span)
            stored[number] = len(frame)
            plain += len(span)
            if number in wanted:
                frames[number] = frame
            else:
                taken += len(frame)
                others += reference[number]
    spent = time.process_time() - began
    ratio = taken / others if others else 0.0
    stored = [size or max(1, round(known * ratio)) for size, known in zip(stored, reference, strict=True)]
    decompressor = zstandard.ZstdDecompressor()
    began = time.process_time()
    for frame in frames.values():
        decompressor.decompress(frame)
    decode_s = time.process_time() - began
    whole = sum(map(len, spans)) or 1
    return Compressed(
        stored, spent * whole / max(1, plain), decode_s, sum(map(len, frames.values())), plain / whole
    )


def size_name(size: int) -> str:
    """A round size for people."""
    return f"{size >> 20} MiB" if size >= MIB else f"{size >> 10} KiB"
