"""Devices of random bytes, and a source in memory whose faults are scripted."""

import gzip
import io
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
import zstandard

from veneer.convert.checkpoints import IndexingGunzip
from veneer.convert.stretches import Stretches
from veneer.convert.work import BlobFile
from veneer.index.model import Codec, Device, SpanTable
from veneer.index.wire_spans import encode_spans
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_GZIP, OCI_LAYER_ZSTD, VENEER_WINDOWS
from veneer.settings import Settings

KIB, MIB = 1 << 10, 1 << 20
RAW, ZSTD, GZIP = Codec("raw"), Codec("zstd"), Codec("gzip")


@dataclass(frozen=True)
class Sample:
    """A device, the bytes of its blob, and the oracle: its plain bytes."""

    device: Device
    blob: bytes
    plain: bytes


def sample(lengths: Sequence[int], *, codecs: Sequence[Codec] = (ZSTD,), seed: int = 0, gap: int = 0) -> Sample:
    """Spans of the given plain lengths, their codecs in turn, ``gap`` unused bytes in front of each."""
    rng = random.Random(seed)
    return sample_of([rng.randbytes(length) for length in lengths], codecs=codecs, gap=gap)


def sample_of(pieces: Sequence[bytes], *, codecs: Sequence[Codec] = (ZSTD,), gap: int = 0) -> Sample:
    blob = bytearray()
    starts, offsets, lengths, digests = [0], [], [], []
    for i, piece in enumerate(pieces):
        blob += b"-" * gap
        stored = _encode(codecs[i % len(codecs)], piece)
        starts.append(starts[-1] + len(piece))
        offsets.append(len(blob))
        lengths.append(len(stored))
        digests.append(Digest.of(stored).raw)
        blob += stored
    plain = b"".join(pieces)
    spans = SpanTable(
        array("Q", starts),
        array("Q", offsets),
        array("Q", lengths),
        b"".join(digests),
        tuple(codecs),
        bytes(i % len(codecs) for i in range(len(pieces))) if len(codecs) > 1 else b"",
    )
    descriptor = Descriptor(OCI_LAYER_ZSTD, Digest.of(blob), len(blob))
    sealed = any(codec.seal for codec in codecs)
    key = Digest.of(
        repr((spans.starts, offsets, digests)).encode()
        if sealed
        else encode_spans(descriptor, Digest.of(plain), spans)
    )
    return Sample(Device(descriptor, Digest.of(plain), spans, key), bytes(blob), plain)


def _encode(codec: Codec, piece: bytes) -> bytes:
    if codec.name == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(piece)
    return gzip.compress(piece, 1, mtime=0) if codec.name == "gzip" else piece


#: What becomes of a request: its number (from 0), offset, length and right answer -> its answer.
Fault = Callable[[int, int, int, bytes], Awaitable[bytes]]


class ScriptedSource:
    """A BlobSource over bytes; counts requests and lets a fault decide about each."""

    def __init__(
        self, blob: bytes, fault: Fault | None = None, name: str = "registry.test/app@sha256:12ab"
    ) -> None:
        self._blob = blob
        self._name = name
        self.fault = fault
        self.requests: list[tuple[int, int]] = []
        self.running = 0
        self.most_running = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return len(self._blob)

    async def read(self, offset: int, length: int) -> bytes:
        number = len(self.requests)
        self.requests.append((offset, length))
        answer = self._blob[offset : offset + length]
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await trio.lowlevel.checkpoint()
            return await self.fault(number, offset, length, answer) if self.fault else answer
        finally:
            self.running -= 1

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            yield await self.read(offset, self.size - offset if length is None else length)

        yield chunks()


def store_settings(directory: Path, *, quota: int = 1 << 30, deadline_s: float = 30.0) -> Settings:
    return Settings(
        cache_dir=directory / "cache",
        run_dir=directory / "run",
        cache_quota=quota,
        read_deadline_s=deadline_s,
        platform=Platform("linux", "amd64"),
    )


@dataclass(frozen=True)
class GzipSample:
    """A gzip layer as it is: its device, its blob and that of its windows, and the oracle."""

    device: Device
    blob: bytes
    windows: bytes
    plain: bytes


def gzip_sample(plain: bytes, directory: Path, *, spacing: int = 64 * KIB) -> GzipSample:
    """One gzip stream, cut about every ``spacing`` plain bytes; ``directory`` is for files on the way."""
    blob = gzip.compress(plain, 6, mtime=0)
    with (
        IndexingGunzip(io.BytesIO(blob), "layer", spacing=spacing) as gunzip,
        (directory / "checkpoints").open("w+b") as exported,
        BlobFile(directory / "windows", VENEER_WINDOWS) as windows,
    ):
        for _ in gunzip.pieces():
            pass
        stretches = Stretches(io.BytesIO(blob), gunzip.export(exported), windows, "layer")
        for _ in stretches.pieces():
            pass
        descriptor = Descriptor(OCI_LAYER_GZIP, Digest.of(blob), len(blob))
        device = stretches.device(descriptor, Digest.of(plain))
    return GzipSample(device, blob, (directory / "windows").read_bytes(), plain)
