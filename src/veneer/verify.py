"""Does an image keep all its promises? Reads every byte once and compares what is stated at every level.

For each layer: the stored blob has its digest and size; every span has its digest and decodes to its length;
the spans together are the tar that the config's diffID names; and the index's tree is the one that this tar
describes. That the index is the one the manifest names was checked when the image was opened. A pack of the
image, or one that this host made for it, has to hold the same bytes as the layers that it names.

It collects what is wrong instead of stopping, because whoever asks wants to know how much. Reads from the
source, never from the cache. Not for: repairing anything.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import trio

from veneer.codec import check_and_decode
from veneer.errors import IntegrityError, NotFound
from veneer.events import Progress, Reporter, silent
from veneer.image import Image
from veneer.image.pack_check import PackCheck, pack_checks
from veneer.image.refute import note_refuted
from veneer.index.build import TreeBuilder
from veneer.index.model import WINDOW_SIZE, Device, LayerIndex, LayerTree, Span
from veneer.index.tar import TarParser
from veneer.index.wire import encode_tree
from veneer.source.base import BlobSource, WithWindows
from veneer.source.tasks import run_all

__all__ = ["LayerVerdict", "PackVerdict", "VerifyReport", "verify_image"]

#: Problems that are listed for a layer; the rest is counted.
MAX_PROBLEMS = 20
#: Layers that are read at once: one waits for the network while another one is decoded.
LAYERS_AT_ONCE = 2
#: Stored bytes that are decoded in one go.
_BATCH_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """What was found out about one layer.

    Args:
        device: the layer.
        spans: how many were checked.
        problems: what is wrong, at most MAX_PROBLEMS of it.
        problem_count: how many there were in all.
    """

    device: Device
    spans: int
    problems: tuple[str, ...]
    problem_count: int

    def to_json(self) -> dict[str, object]:
        """As ``veneer verify --json`` shows it."""
        return {
            "digest": str(self.device.blob.digest),
            "diff_id": str(self.device.diff_id),
            "stored_size": self.device.blob.size,
            "size": self.device.spans.size,
            "spans": self.spans,
            "problems": list(self.problems),
            "problem_count": self.problem_count,
        }


@dataclass(frozen=True, slots=True)
class PackVerdict:
    """What was found out about one pack; the fields are as for a layer.

    Args:
        workload: what it is for.
        origin: who names it.
        digest: of its index.
        size: plain bytes that were checked.
    """

    workload: str
    origin: str
    digest: str
    size: int
    problems: tuple[str, ...]
    problem_count: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict on an image; ``problems`` are those that concern no single layer or pack."""

    image: str
    layers: tuple[LayerVerdict, ...]
    problems: tuple[str, ...]
    packs: tuple[PackVerdict, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as promised."""
        bad = [layer.problem_count for layer in self.layers] + [pack.problem_count for pack in self.packs]
        return not self.problems and not any(bad)

    @property
    def exit_code(self) -> int:
        """0, or that of an IntegrityError."""
        return 0 if self.ok else IntegrityError.exit_code

    def to_json(self) -> dict[str, object]:
        """As ``veneer verify --json`` shows it."""
        return {
            "image": self.image,
            "ok": self.ok,
            "problems": list(self.problems),
            "layers": [layer.to_json() for layer in self.layers],
            "packs": [asdict(pack) for pack in self.packs],
        }


async def verify_image(
    image: Image, report: Reporter = silent, *, cache_dir: Path | None = None
) -> VerifyReport:
    """Check every byte of ``image``. What is wrong is in the result; what cannot be read is raised.

    With ``cache_dir`` its packs are checked, too, and those that are there; and it is noted there when the
    index makes something else of a layer.
    """
    await image.load()  # layers that cannot be merged are bad, whatever they hold
    layers = await image.layer_indexes()
    packs = [] if cache_dir is None else await pack_checks(image, cache_dir)
    checks = [
        _LayerCheck(index, source, blob, image.policy.devices, packs)
        for index, source, blob in zip(layers, image.sources, image.blobs, strict=True)
    ]
    verdicts = await run_all([partial(check.run, report) for check in checks], at_once=LAYERS_AT_ONCE)
    for number, check in enumerate(checks):
        if cache_dir is not None and check.refuted is not None:
            await trio.to_thread.run_sync(note_refuted, image, cache_dir, number, check.refuted)
    problems: list[str] = []
    dropped: Counter[str] = Counter()
    for check in checks:
        dropped.update(check.dropped)
    if all(not verdict.problem_count for verdict in verdicts) and dropped != Counter(image.policy.dropped):
        stated = dict(image.policy.dropped)
        problems.append(f"the index says that it left out {stated}, but it left out {dict(dropped)}")
    return VerifyReport(image.name, tuple(verdicts), tuple(problems), tuple(map(_verdict, packs)))


def _verdict(check: PackCheck) -> PackVerdict:
    named, problems = check.named, check.problems
    digest = str(named.descriptor.digest)
    shown = tuple(problems[:MAX_PROBLEMS])
    return PackVerdict(named.workload, named.origin, digest, check.size, shown, len(problems))


@dataclass(slots=True)
class _LayerCheck:
    """The check of one layer.

    ``dropped`` is what its tree should not hold, ``refuted`` what is wrong though every span is right.
    """

    index: LayerIndex
    source: BlobSource
    blob: BlobSource
    devices: str
    packs: Sequence[PackCheck] = ()
    dropped: Counter[str] = field(default_factory=Counter)
    refuted: IntegrityError | None = None
    _problems: list[str] = field(default_factory=list)
    _count: int = 0

    async def run(self, report: Reporter) -> LayerVerdict:
        """Read the layer from its source and judge it."""
        device = self.index.device
        item, total = device.blob.digest.hex[:12], device.blob.size
        source = self.source.blob if isinstance(self.source, WithWindows) else self.source
        reader = _SpanReader(
            self.index,
            self.source.name,
            self.devices,
            self.packs,
            self._problem,
            is_blob=source is self.blob,
        )
        try:
            if device.windows is not None and isinstance(self.source, WithWindows):
                windows = self.source.windows
                reader.windows = _Windows(device.windows, await windows.read(0, windows.size), windows.name)
            await self._read(reader, item, report)
            self.dropped = await trio.to_thread.run_sync(reader.finish)
            self.refuted = reader.refuted
            if source is not self.blob:
                await self._read_blob(device)
        except (
            IntegrityError,
            NotFound,
        ) as error:  # the source itself knows that the blob is not there as stated
            self._problem(error.message)
        report(Progress("verify", item, total, total))
        return LayerVerdict(device, reader.checked, tuple(self._problems), self._count)

    async def _read(self, reader: "_SpanReader", item: str, report: Reporter) -> None:
        held: list[bytes] = []
        size = done = 0
        async with self.source.stream() as chunks:
            async for chunk in chunks:
                held.append(chunk)
                size += len(chunk)
                if size < _BATCH_SIZE:
                    continue
                await trio.to_thread.run_sync(reader.feed, b"".join(held))
                done += size
                held, size = [], 0
                if done < self.source.size:
                    report(Progress("verify", item, done, self.source.size))
        await trio.to_thread.run_sync(reader.feed, b"".join(held))

    async def _read_blob(self, device: Device) -> None:
        """The spans say nothing of the blob as it is stored: it is read for itself."""
        hasher = device.blob.digest.hasher()
        async with self.blob.stream() as chunks:
            async for chunk in chunks:
                await trio.to_thread.run_sync(hasher.update, chunk)
        device.blob.digest.check_hash(hasher, self.blob.name)

    def _problem(self, message: str) -> None:
        self._count += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(message)


class _Windows:
    """The windows of a layer's spans, from the whole blob that has them: a hundredth of the layer.

    Raises IntegrityError when the blob is another one.
    """

    def __init__(self, device: Device, data: bytes, name: str) -> None:
        device.blob.digest.check(data, name)
        self._spans = device.spans
        self._data = data
        self._name = name
        self._latest = -1, b""

    def of(self, number: int) -> bytes:
        """The window of a span. Raises IntegrityError."""
        offset = number * WINDOW_SIZE
        frame = self._spans[self._spans.covering(offset, 1)[0]]
        if self._latest[0] != frame.number:
            stored = self._data[frame.stored_offset : frame.stored_offset + frame.stored_length]
            self._latest = frame.number, check_and_decode(frame, stored, f"{self._name}: span {frame.number}")
        return self._latest[1][offset - frame.offset :][:WINDOW_SIZE]


class _SpanReader:
    """Takes a stored layer apart as it streams by. For one thread at a time."""

    def __init__(
        self,
        index: LayerIndex,
        name: str,
        devices: str,
        packs: Sequence[PackCheck],
        problem: Callable[[str], None],
        *,
        is_blob: bool,
    ) -> None:
        self._index = index
        self._name = name
        self._packs = packs
        self._problem = problem
        self._is_blob = is_blob
        self._blob_hasher = index.device.blob.digest.hasher()
        self._tar_hasher = index.device.diff_id.hasher()
        self._parser = TarParser()
        self._builder = TreeBuilder(devices)
        self._tar_is_whole = True
        self._spans = iter(index.device.spans)
        self._span: Span | None = next(self._spans, None)
        self._buffer = bytearray()
        self._base = 0  # blob offset of the buffer
        self.windows: _Windows | None = None
        self.checked = 0
        #: Why the layer is another one although every span is what the index says.
        self.refuted: IntegrityError | None = None

    def feed(self, data: bytes) -> None:
        """Take the next stored bytes."""
        self._blob_hasher.update(data)
        self._buffer += data
        while (span := self._span) is not None:
            start = span.stored_offset - self._base
            if start + span.stored_length > len(self._buffer):
                break
            self._check(span, bytes(self._buffer[start : start + span.stored_length]))
            del self._buffer[: start + span.stored_length]
            self._base = span.stored_offset + span.stored_length
            self._span = next(self._spans, None)
        if self._span is None:
            self._base += len(self._buffer)
            self._buffer.clear()

    def finish(self) -> Counter[str]:
        """Judge the layer as a whole; what its tree leaves out."""
        device = self._index.device
        if self._is_blob:
            self._check_blob(device)
        if self._span is not None:
            self._tar_is_whole = False
            self._problem(f"{self._name}: ends before span {self._span.number} of {len(device.spans)}")
        if self._tar_is_whole:
            self._check_tar()
        return self._builder.dropped

    def _check_blob(self, device: Device) -> None:
        size = self._base + len(self._buffer)
        if size != device.blob.size:
            self._problem(f"{self._name}: expected {device.blob.size} bytes, got {size}")
        try:
            device.blob.digest.check_hash(self._blob_hasher, self._name)
        except IntegrityError as error:
            self._problem(error.message)

    def _check(self, span: Span, stored: bytes) -> None:
        self.checked += 1
        try:
            window = b"" if self.windows is None else self.windows.of(span.number)
            plain = check_and_decode(span, stored, f"{self._name}: span {span.number}", window)
        except IntegrityError as error:
            self._problem(error.message)
            self._tar_is_whole = False
            return
        for pack in self._packs:
            pack.compare(self._index.device.diff_id, span.offset, plain)
        if self._tar_is_whole:
            self._tar_hasher.update(plain)
            self._parse(plain)

    def _parse(self, plain: bytes) -> None:
        try:
            for entry in self._parser.feed(plain):
                self._builder.add(entry)
        except IntegrityError as error:
            self._problem(f"{self._name}: {error.message}")
            self._tar_is_whole = False

    def _check_tar(self) -> None:
        device = self._index.device
        try:
            self._check_diff_id(device)
            self._parser.finish()
            tree = self._builder.finish()
        except IntegrityError as error:
            self._problem(f"{self._name}: {error.message}")
            return
        if encode_tree(tree) != encode_tree(self._index.tree):
            difference = _first_difference(self._index.tree, tree)
            self._problem(f"{self._name}: the index does not describe this layer: {difference}")

    def _check_diff_id(self, device: Device) -> None:
        try:
            device.diff_id.check_hash(self._tar_hasher, f"{self._name}: uncompressed bytes (diffID)")
        except IntegrityError as error:
            if self._span is None:
                self.refuted = error
            raise


def _first_difference(stated: LayerTree, actual: LayerTree) -> str:
    """Where two trees that are not equal differ first, for people."""
    if len(stated) != len(actual):
        return f"it has {len(stated)} names, the layer has {len(actual)}"
    for column in fields(LayerTree):
        ours, theirs = getattr(stated, column.name), getattr(actual, column.name)
        if ours == theirs:
            continue
        if isinstance(ours, list | array):
            row = next(row for row, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        else:
            row = min(set(ours) | set(theirs), key=lambda row: (_fact(ours, row) == _fact(theirs, row), row))
        name = actual.names[row].decode(errors="backslashreplace")
        return f"{column.name} of row {row} ({name!r})"
    return "its columns are stored in another way"


def _fact(facts: object, row: int) -> object:
    """The fact of a row in a rare column: a dict, or a set of rows."""
    if isinstance(facts, dict):
        return facts.get(row)
    return isinstance(facts, frozenset) and row in facts
