"""Gzip layers as they are: windows are asked for beside the spans, verified, kept, and never taken on trust."""

import random
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import zstandard

from tests.store.rig import KIB, GzipSample, ScriptedSource, gzip_sample, sample, store_settings
from veneer.codec import check_and_decode
from veneer.errors import IntegrityError
from veneer.index.model import WINDOW_SIZE, Device
from veneer.index.wire import decode_spans, encode_spans
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import VENEER_WINDOWS
from veneer.source.base import WithWindows
from veneer.store.spanstore import AttachedDevice, Form, SpanStore, open_store
from veneer.store.twins import Twins


def words(length: int) -> bytes:
    rng = random.Random(7)
    return b" ".join(
        b"%d %s" % (rng.getrandbits(30), rng.choice((b"words", b"windows"))) for _ in range(length)
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> GzipSample:
    """Some 20 spans of 64 KiB and more; there is no span whose stored bytes need no window, but the first."""
    return gzip_sample(words(100_000), tmp_path_factory.mktemp("gzip"))


@dataclass
class Rig:
    store: SpanStore
    layer: ScriptedSource
    windows: ScriptedSource
    attached: AttachedDevice


@pytest.fixture
async def rig(one: GzipSample, tmp_path: Path) -> AsyncIterator[Rig]:
    layer, windows = ScriptedSource(one.blob), ScriptedSource(one.windows)
    async with open_store(store_settings(tmp_path)) as store:
        yield Rig(store, layer, windows, store.attach(one.device, WithWindows(layer, windows)))


async def test_a_span_and_its_windows_are_asked_for_at_once(one: GzipSample, rig: Rig) -> None:
    """Neither source answers before both have been asked."""
    asked = trio.Event()

    async def wait(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        if rig.layer.requests and rig.windows.requests:
            asked.set()
        await asked.wait()
        return answer

    rig.layer.fault = rig.windows.fault = wait
    middle = one.device.spans.starts[10] + 5
    assert await rig.store.read(rig.attached, middle, 100) == one.plain[middle : middle + 100]
    assert len(rig.layer.requests) == 1
    assert rig.store.stats.reads == 1


async def test_a_whole_layer_is_what_it_was(one: GzipSample, rig: Rig) -> None:
    assert await rig.store.fetch_rest(rig.attached)
    assert await rig.store.read(rig.attached, 0, len(one.plain)) == one.plain
    assert await rig.store.prove(rig.attached)
    assert len({number for number, _ in rig.windows.requests}) == len(rig.windows.requests)


async def test_what_was_evicted_is_fetched_again_with_the_windows_that_are_here(
    one: GzipSample, rig: Rig
) -> None:
    assert await rig.store.fetch_rest(rig.attached)
    file, requests = rig.attached.file, len(rig.windows.requests)
    assert file is not None
    rig.store._cache.evict(file, range(3, 9))
    start, end = one.device.spans.starts[3], one.device.spans.starts[9]
    before = len(rig.layer.requests)
    assert await rig.store.read(rig.attached, start, end - start) == one.plain[start:end]
    assert len(rig.layer.requests) > before
    assert len(rig.windows.requests) == requests


async def test_windows_survive_a_restart(one: GzipSample, tmp_path: Path) -> None:
    layer, windows = ScriptedSource(one.blob), ScriptedSource(one.windows)
    source = WithWindows(layer, windows)
    for _ in range(2):
        async with open_store(store_settings(tmp_path)) as store:
            attached = store.attach(one.device, source)
            assert await store.read(attached, 300 * KIB, 10) == one.plain[300 * KIB : 300 * KIB + 10]
            assert attached.file is not None
            store._cache.evict(attached.file, range(len(attached.spans)))
    assert len(layer.requests) == 2
    assert len(windows.requests) == 1


@pytest.mark.parametrize("where", ["layer", "windows"])
async def test_damaged_bytes_are_an_error_and_asked_for_again(one: GzipSample, rig: Rig, where: str) -> None:
    async def damage(_number: int, _offset: int, _length: int, answer: bytes) -> bytes:
        return answer[:-1] + bytes([answer[-1] ^ 1])

    source: ScriptedSource = getattr(rig, where)
    source.fault = damage
    with pytest.raises(IntegrityError, match="expected sha256"):
        await rig.store.read(rig.attached, 0, 100)
    assert len(source.requests) == 3
    source.fault = None
    assert await rig.store.read(rig.attached, 0, 100) == one.plain[:100]


def with_other_windows(one: GzipSample) -> tuple[Device, bytes]:
    """The device of a liar: in the windows that it names, every "o" is an "e"; and the blob with them."""
    windows = one.device.windows
    assert windows is not None
    frames = [
        zstandard.compress(
            check_and_decode(span, one.windows[span.stored_offset :][: span.stored_length], "").replace(
                b"o", b"e"
            )
        )
        for span in windows.spans
    ]
    blob, lengths = b"".join(frames), list(map(len, frames))
    spans = replace(
        windows.spans,
        stored_offsets=array("q", [sum(lengths[:number]) for number in range(len(lengths))]),
        stored_lengths=array("q", lengths),
        digests=b"".join(Digest.of(frame).raw for frame in frames),
    )
    descriptor = Descriptor(VENEER_WINDOWS, Digest.of(blob), len(blob))
    others = decode_spans(encode_spans(descriptor, windows.diff_id, spans))
    codecs = (replace(one.device.spans.codecs[0], parameters=others.key.raw),)
    section = encode_spans(
        one.device.blob, one.device.diff_id, replace(one.device.spans, codecs=codecs), others
    )
    return decode_spans(section, others), blob


async def test_an_index_with_wrong_windows_is_another_device_and_never_complete(
    one: GzipSample, rig: Rig
) -> None:
    """Its spans are what it says, which is wrong: that stays with it, and is not what the diffID promises."""
    device, blob = with_other_windows(one)
    assert device.key != one.device.key
    liar = rig.store.attach(device, WithWindows(rig.layer, ScriptedSource(blob)))
    start = device.spans.starts[5]
    assert await rig.store.read(liar, start, 50_000) != one.plain[start : start + 50_000]
    assert await rig.store.read(rig.attached, 0, len(one.plain)) == one.plain
    assert await rig.store.fetch_rest(liar)
    with pytest.raises(IntegrityError, match="contents of layer"):
        await rig.store.prove(liar)


async def test_windows_are_let_go_with_the_last_device_that_uses_them(rig: Rig) -> None:
    windows = rig.attached.windows
    assert windows is not None
    await rig.store.read(rig.attached, 0, WINDOW_SIZE)
    rig.store.detach(rig.attached)
    assert windows.detached
    assert not rig.store._attached


async def test_a_layer_cannot_be_attached_without_its_windows(one: GzipSample, rig: Rig) -> None:
    rig.store.detach(rig.attached)
    with pytest.raises(ValueError, match="windows"):
        rig.store.attach(one.device, rig.layer)
    with pytest.raises(ValueError, match="windows"):
        rig.store.attach(one.device, WithWindows(rig.layer, rig.windows), form=Form.STORED)


async def test_windows_do_not_wait_for_the_turns_of_what_waits_for_them(
    one: GzipSample, tmp_path: Path
) -> None:
    layer, windows = ScriptedSource(one.blob), ScriptedSource(one.windows)
    settings = replace(store_settings(tmp_path), most_requests=1)
    async with open_store(settings) as store:
        attached = store.attach(one.device, WithWindows(layer, windows))
        with trio.fail_after(60):
            assert await store.read(attached, 0, len(one.plain)) == one.plain


@pytest.mark.parametrize("alike", [True, False])
def test_the_same_stored_bytes_with_windows_are_no_twins(tmp_path: Path, alike: bool) -> None:
    """With another window they are other bytes."""
    gzip = gzip_sample(random.Random(0).randbytes(200 * KIB), tmp_path).device
    spans = sample([4 * KIB] * 3).device.spans if alike else gzip.spans
    twins, devices = Twins(), [SimpleNamespace(spans=spans, twins={}) for _ in range(2)]
    for device in devices:
        twins.add(cast("AttachedDevice", device))
    assert [bool(device.twins) for device in devices] == [alike, alike]
