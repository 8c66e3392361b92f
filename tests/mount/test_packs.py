"""Mounts with packs: every byte is the layers', whatever the pack is like, and a right one spares requests."""

import random
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.daemon.layouts import lazy_image, settings_in
from tests.mount.guarding import guards
from veneer.convert.pack import BuiltPack, build_pack
from veneer.errors import IntegrityError, NotFound, Unavailable, UsageError, VeneerError
from veneer.image import Image, open_image
from veneer.index.paths import find
from veneer.mount import packed as packed_module
from veneer.mount.backends import Subject
from veneer.mount.base import Choice
from veneer.mount.bdi import ASKED_KB, NORMAL_KB, read_ahead_setting
from veneer.mount.filetable import FileTable
from veneer.mount.packed import Packed
from veneer.mount.precontent import PreContentStats
from veneer.mount.resident import ResidentMounter
from veneer.mount.session import mounted
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import VENEER_PACK_INDEX
from veneer.prefetch.pack import PackIndex, encode_pack_index
from veneer.prefetch.profile import Profile, Use
from veneer.settings import Settings
from veneer.store.spanstore import SpanStore, open_store
from veneer.testing.images import Layer, random_layers
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import difference, scan
from veneer.testing.unpack import unpack_layers

pytestmark = [pytest.mark.root]

LARGEST = 32 << 20
#: What a source does instead of answering: fails, waits, or gives other bytes.
Fault = Callable[[int, bytes], Awaitable[bytes]]


@dataclass
class Blob:
    """The blob of a pack, with faults; counts what it is asked for."""

    data: bytes
    fault: Fault | None = None
    name: str = "somewhere/pack"
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        await trio.lowlevel.checkpoint()
        data = self.data[offset : offset + length]
        return data if self.fault is None else await self.fault(offset, data)

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        data = await self.read(offset, self.size - offset if length is None else length)

        async def chunks() -> AsyncIterator[bytes]:
            for at in range(0, len(data), 10_000):
                yield data[at : at + 10_000]

        pieces = chunks()
        try:
            yield pieces
        finally:
            await pieces.aclose()  # type: ignore[attr-defined] # a generator


def profile_of(image: Image, chance: random.Random) -> Profile:
    """Some pages of some files, in any order, not cut at anything."""
    uses = []
    for _, node in image.index.walk():
        for extent in image.index.extents(node) if stat.S_ISREG(image.index.mode[node]) else ():
            device = image.devices[extent.device]
            for _ in range(chance.randrange(3)):
                start = chance.randrange(extent.length)
                length = chance.randrange(1, extent.length - start + 1)
                uses.append(Use(device.diff_id, extent.offset + start, length, 0.0, 0.0))
    chance.shuffle(uses)
    return Profile("default", "", (), 1, tuple(uses))


@dataclass
class Place:
    """An image in a layout, and what is made of it."""

    directory: Path
    settings: Settings
    text: str

    async def pack(self, chance: random.Random | None = None, profile: Profile | None = None) -> BuiltPack:
        """A pack of the image, made without the cache that mounts use."""
        apart = replace(self.settings, cache_dir=self.directory / "apart")
        packs: list[BuiltPack] = []
        async with open_store(apart) as store, open_image(self.text, apart) as image:
            await image.load()
            attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
            profile = profile or profile_of(image, chance or random.Random(1))
            packs.append(await build_pack(image, store, attached, profile, level=1))
        return packs[0]

    @asynccontextmanager
    async def shown(
        self, index: PackIndex, blob: Blob
    ) -> AsyncIterator[tuple[Path, ResidentMounter, SpanStore, Packed]]:
        mountpoint = self.directory / "mnt"
        mountpoint.mkdir(exist_ok=True)
        async with open_store(self.settings) as store, open_image(self.text, self.settings) as image:
            attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
            data = encode_pack_index(index)
            descriptor = Descriptor(VENEER_PACK_INDEX, Digest.of(data), len(data))
            packed = Packed.attach(descriptor, data, index, blob, store, attached)
            identity = image.identity
            subject = Subject(image.name, image.devices, lambda: image.index, identity, store, attached)
            async with guards() as shared:
                mounter = ResidentMounter(
                    shared,
                    subject,
                    store,
                    FileTable(subject.index),
                    cache_dir=self.settings.cache_dir,
                    choice=Choice("erofs-fanotify", ""),
                    packed=packed,
                )
                async with mounted(mounter, mountpoint):
                    yield mountpoint, mounter, store, packed


async def image_in(directory: Path, layers: list[Layer], **changes: object) -> Place:
    configured = settings_in(directory, **changes)
    return Place(directory, configured, await lazy_image(directory / "image", configured, layers))


async def packed_tree(layers: list[Layer], chance: random.Random, directory: Path) -> list[str]:
    (directory / "unpacked").mkdir()
    unpack_layers([tar(layer) for layer in layers], directory / "unpacked", "drop")
    place = await image_in(directory, layers)
    try:
        pack = await place.pack(chance)
    except UsageError:
        return []  # there is not one page in it
    async with place.shown(pack.content, Blob(pack.data)) as (mountpoint, mounter, _, packed):
        found = await trio.to_thread.run_sync(scan, mountpoint)
        assert mounter.packed is packed
    return difference(scan(directory / "unpacked"), found)


@given(layers=random_layers(), seed=st.integers(0, 1 << 32))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
def test_a_random_image_with_a_random_pack(layers: list[Layer], seed: int) -> None:
    assume(all(item.size <= LARGEST for layer in layers for item in layer))
    with tempfile.TemporaryDirectory() as name:
        assert trio.run(packed_tree, layers, random.Random(seed), Path(name)) == []


# One image with files of many pages, half of which are packed

BYTES = random.Random(3)
BASE = tuple(TarItem(b"f%d" % number, content=BYTES.randbytes(150_000 + number)) for number in range(9))
UPPER = (TarItem(b"f0", content=BYTES.randbytes(99_999)), TarItem(b"g", content=BYTES.randbytes(500_000)))
CONTENTS = {item.path: item.content for item in (*BASE, *UPPER)}


def read_all(mountpoint: Path) -> None:
    for path, content in CONTENTS.items():
        assert (mountpoint / path.decode()).read_bytes() == content, path


@asynccontextmanager
async def shown(
    directory: Path, fault: Fault | None = None, *, change: Callable[[bytes], bytes] = bytes, **changes: object
) -> AsyncIterator[tuple[Path, ResidentMounter, SpanStore, Packed, Blob]]:
    place = await image_in(directory, [BASE, UPPER], **changes)
    pack = await place.pack()
    blob = Blob(change(pack.data), fault)
    async with place.shown(pack.content, blob) as (mountpoint, mounter, store, packed):
        yield mountpoint, mounter, store, packed, blob


async def until_complete(packed: Packed) -> None:
    with trio.fail_after(30):
        while not packed.attached.complete:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.01)


async def test_a_whole_pack_is_read_without_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However long it takes here until the pack has been read, that is no pause.
    monkeypatch.setattr(packed_module, "QUIET_S", 3600.0)
    async with shown(tmp_path) as (mountpoint, mounter, store, packed, blob):
        await until_complete(packed)
        stats: PreContentStats = mounter.stats
        assert stats.unmarked_complete == 1
        requests, events = store.stats.requests, stats.events
        assert requests == len(blob.asked), "nothing is asked of the layers"
        setting = await trio.to_thread.run_sync(read_ahead_setting, mountpoint, mounter.superblocks)
        assert setting.read_text().strip() == str(ASKED_KB)
        await trio.to_thread.run_sync(read_packed, mountpoint, packed)
        assert (store.stats.requests, stats.events) == (requests, events)
        await trio.to_thread.run_sync(read_all, mountpoint)
        assert stats.events > events
        monkeypatch.setattr(packed_module, "QUIET_S", 0.1)
        with trio.fail_after(30):
            while setting.read_text().strip() != str(NORMAL_KB):  # noqa: ASYNC110 - sysfs tells nobody
                await trio.sleep(0.05)


async def test_who_reads_something_else_gets_the_kernel_to_read_ahead_before_it_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount with a pack is not only there for its start: without read-ahead every page is a question."""
    monkeypatch.setattr(packed_module, "QUIET_S", 3600.0)
    monkeypatch.setattr(packed_module, "MISFIT", 3)
    async with shown(tmp_path) as (mountpoint, mounter, _, packed, _):
        await until_complete(packed)
        setting = await trio.to_thread.run_sync(read_ahead_setting, mountpoint, mounter.superblocks)
        await trio.to_thread.run_sync(read_packed, mountpoint, packed)
        assert setting.read_text().strip() == str(ASKED_KB), "as long as it is the start that was recorded"
        await trio.to_thread.run_sync(read_all, mountpoint)
        with trio.fail_after(30):
            while setting.read_text().strip() != str(NORMAL_KB):  # noqa: ASYNC110 - sysfs tells nobody
                await trio.sleep(0.05)


async def test_what_is_read_in_order_during_a_start_is_not_asked_for_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by who has opened it before the start turns out to be another one."""
    monkeypatch.setattr(packed_module, "QUIET_S", 3600.0)
    place = await image_in(tmp_path, [BASE, UPPER])
    async with open_image(place.text, place.settings) as image:
        await image.load()
        node = find(image.index, b"f1", "the image")
        uses = [
            Use(image.devices[one.device].diff_id, one.offset, one.length, 0.0, 0.0)
            for one in image.index.extents(node)
        ]
        pack = await place.pack(profile=Profile("default", "", (), 1, tuple(uses)))
    async with place.shown(pack.content, Blob(pack.data)) as (mountpoint, mounter, _, packed):
        await until_complete(packed)
        stats: PreContentStats = mounter.stats
        before = stats.events
        assert await trio.to_thread.run_sync((mountpoint / "g").read_bytes) == CONTENTS[b"g"]
        assert 1 <= stats.events - before <= len(CONTENTS[b"g"]) >> 16


def read_packed(mountpoint: Path, packed: Packed) -> None:
    """The pages of files that the pack has."""
    found = 0
    data = {path: (mountpoint / path.decode()) for path in CONTENTS}
    plain = packed.attached.file
    assert plain is not None
    for place in packed.index.places:
        expected = plain.read(place.at, min(place.length, 4096))
        assert expected is not None
        page = expected.rstrip(b"\0")
        for path, content in CONTENTS.items():
            if (at := content.find(page)) >= 0 and at % 4096 == 0:
                with data[path].open("rb", buffering=0) as file:
                    file.seek(at)
                    assert file.read(len(page)) == page
                found += 1
    assert found >= len(packed.index.places) // 2


def failing(error: VeneerError, after: int = 0) -> Fault:
    """An answer that fails, from some byte of the blob on."""

    async def fault(offset: int, data: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        if offset + len(data) > after:
            raise error
        return data

    return fault


async def waiting(_offset: int, data: bytes) -> bytes:
    await trio.Event().wait()
    return data


def flipped(data: bytes) -> bytes:
    """One bit in the middle of each span or so."""
    out = bytearray(data)
    for at in range(1000, len(out), 200_000):
        out[at] ^= 1
    return bytes(out)


@pytest.mark.parametrize(
    "fault",
    [
        failing(NotFound("no such blob")),
        failing(Unavailable("come back later")),
        failing(IntegrityError("shorter than it says"), 300_000),
        waiting,
    ],
    ids=["missing", "unavailable", "truncated", "stalled"],
)
async def test_a_pack_that_cannot_be_had_costs_time_only(tmp_path: Path, fault: Fault) -> None:
    async with shown(tmp_path, fault, read_deadline_s=2.0) as (mountpoint, mounter, store, packed, _):
        assert mounter.packed is packed
        await trio.to_thread.run_sync(read_all, mountpoint)
        assert store.stats.replaced > 0
        assert mounter.stats.denied == 0


async def test_a_pack_with_flipped_bits_costs_time_only(tmp_path: Path) -> None:
    async with shown(tmp_path, change=flipped) as (mountpoint, mounter, store, packed, _):
        await trio.to_thread.run_sync(read_all, mountpoint)
        assert store.stats.replaced > 0
        assert store.stats.verify_failures > 0
        assert mounter.stats.denied == 0
        # What was made of the layers is what the pack promises as a whole.
        await until_complete(packed)


async def test_a_pack_that_comes_late_is_used_then(tmp_path: Path) -> None:
    there = trio.Event()

    async def late(_offset: int, data: bytes) -> bytes:
        await there.wait()
        return data

    async with shown(tmp_path, late) as (mountpoint, mounter, store, packed, blob):
        assert blob.asked, "it was asked for before the mount was made"
        assert store.stats.bytes_fetched == 0, "the mount has not waited for it"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_all, mountpoint)
            there.set()
        assert store.stats.replaced == 0
        await until_complete(packed)
        assert mounter.stats.denied == 0
