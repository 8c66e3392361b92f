"""Images and stores that the mounts of one daemon share.

One store for each cache directory: two would wait for one another at the kernel's questions about one file.
An image is open once, however often it is mounted. A device that several images have is attached once, and the
image that brought it stays open as long as any of them: its connections are what the device is read through.
"""

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from veneer.daemon.open_images import Asked, Holding, Identity, OpenImages, found, identity
from veneer.events import Event, Notice, Reporter
from veneer.image import Image
from veneer.image.open import load_image, resolve_image
from veneer.image.packs import NamedPack
from veneer.image.pinned import PinnedIndex
from veneer.image.refute import watch_layers
from veneer.mount.filetable import FileTable
from veneer.mount.packed import Packed
from veneer.oci.digest import Digest
from veneer.settings import Settings
from veneer.store.attached import AttachedDevice
from veneer.store.decoder import Decoder
from veneer.store.spanstore import SpanStore, open_store
from veneer.timing import UNTIMED, Timing
from veneer.transport import Connections, TransportStats

__all__ = ["Holding", "Holdings"]


class _Telling:
    """Passes on what is reported, and knows whether there was anything."""

    def __init__(self, report: Reporter) -> None:
        self.told = False
        self._report = report

    def __call__(self, event: Event) -> None:
        self.told = True
        self._report(event)


@dataclass(slots=True, eq=False)
class _Device:
    attached: AttachedDevice
    provider: Holding
    users: int = 0


class Holdings:
    """What is open. Belongs to one event loop.

    Args:
        nursery: owns stores and images.

    Attributes:
        let_go: ends whatever uses a store and could do without.
        let_go_soon: the same, for whoever cannot wait.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.let_go: Callable[[SpanStore], Awaitable[object]] = _nothing
        self.let_go_soon: Callable[[SpanStore], None] = _nothing_soon
        self._nursery = nursery
        self._opening = trio.Lock()
        self._connections = Connections()
        #: Works for all stores.
        self.decoder = Decoder(nursery)
        nursery.start_soon(self._keep_connections)
        self._stores: dict[Path, _Store] = {}
        self._open = OpenImages()
        self._images: dict[tuple[Digest, str, Digest | None, SpanStore], Holding] = {}
        self._devices: dict[tuple[SpanStore, bytes], _Device] = {}

    @property
    def stores(self) -> dict[str, SpanStore]:
        """All stores, by their cache directories."""
        return {os.fspath(path): one.store for path, one in self._stores.items()}

    async def take(
        self,
        text: str,
        settings: Settings,
        report: Reporter,
        pack: str | NamedPack | None = None,
        timing: Timing = UNTIMED,
        opened: Callable[[Image], None] = lambda _image: None,
        index: PinnedIndex | None = None,
    ) -> tuple[Holding, Mapping[str, int]]:
        """The image that ``text`` names, open, for one more user. Raises VeneerError.

        ``pack`` says which pack to take with it, as for :func:`~veneer.image.open_image`; ``opened`` is called
        with the image as soon as it is known. ``index`` is the only one that will do, if it is given.

        Returns it, and the counts of its transport without what opening it for this user took.
        """
        if isinstance(pack, str):
            began = time.monotonic()
            known = await self._open.recall(text, settings, pack, self._is_store)
            if known is not None:
                timing.add("resolve", began, time.monotonic())
                return known, _one_more(known, TransportStats())
        taken: tuple[Holding, Mapping[str, int]]
        counted: list[Holding] = []
        what = text, settings, report, pack, timing, opened, index, counted
        try:
            taken = await self._nursery.start(self._keep_image, *what)
        except BaseException:
            # It may have been counted for this user just as he left.
            for holding in counted:
                self.give_back(holding)
            raise
        return taken

    async def _keep_connections(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await self._connections.aclose()

    def _is_store(self, store: SpanStore, settings: Settings, path: Path, there: Identity) -> bool:
        """Whether this is the store for a cache directory that is there now."""
        kept = self._stores.get(path)
        return kept is not None and (kept.store, kept.identity) == (store, there) and kept.fits(settings)

    def keep(self, holding: Holding) -> None:
        """One more user of what is in use."""
        holding.users += 1

    def give_back(self, holding: Holding) -> None:
        """Tell that one user has gone."""
        holding.users -= 1
        if not holding.users:
            holding.unused.set()

    async def _keep_image(
        self,
        text: str,
        settings: Settings,
        report: Reporter,
        pack: str | NamedPack | None,
        timing: Timing,
        opened: Callable[[Image], None],
        index: PinnedIndex | None,
        counted: list[Holding],
        *,
        task_status: trio.TaskStatus[tuple[Holding, Mapping[str, int]]],
    ) -> None:
        with timing.phase("store"):
            kept = await self._store(settings, report)
        holding = None
        try:
            what = text, settings, report, pack, timing, opened, index, counted
            holding = await self._keep_in(kept.store, *what, task_status)
        finally:
            kept.users -= 1
            if holding is not None:
                holding.closed.set()

    async def _keep_in(
        self,
        store: SpanStore,
        text: str,
        settings: Settings,
        report: Reporter,
        pack: str | NamedPack | None,
        timing: Timing,
        opened: Callable[[Image], None],
        index: PinnedIndex | None,
        counted: list[Holding],
        task_status: trio.TaskStatus[tuple[Holding, Mapping[str, int]]],
    ) -> Holding | None:
        """Open an image and keep it open; None when it was. ``counted`` gets it with its new user."""
        async with resolve_image(text, settings, timing, self._connections) as (resolved, stats):
            workload = pack if isinstance(pack, str) else None
            asked = Asked(resolved.name, settings, workload, store)
            self._open.note_name(text, asked, resolved)
            if (holding := await self._open.unchanged(asked)) is not None:
                counted.append(holding)
                task_status.started((holding, _one_more(holding, stats)))
                return None
            telling = _Telling(report)
            image = await load_image(resolved, settings, stats, telling, pack, timing, store, index)
            opened(image)
            pack_digest = image.pack.named.descriptor.digest if image.pack else None
            key = image.identity, image.name, pack_digest, store
            holding = self._images.get(key)
            if holding is not None and holding.users:
                counted.append(holding)
                task_status.started((holding, _one_more(holding, stats)))
                if not telling.told:
                    await self._open.remember(asked, holding)
                return None
            with timing.phase("attach"):
                holding = self._images[key] = self._attach(image, store, settings.cache_dir)
            counted.append(holding)
            try:
                task_status.started((holding, {}))
                if not telling.told:
                    await self._open.remember(asked, holding)
                await holding.unused.wait()
            finally:
                # Also when whoever asked for it has left just now, and it is nobody's.
                if self._images[key] is holding:
                    del self._images[key]
                self._detach(holding)
                self._open.forget(holding)
            return holding

    def _attach(self, image: Image, store: SpanStore, cache_dir: Path) -> Holding:
        holding = Holding(image, store, (), FileTable(lambda: image.index))
        holding.attached = tuple(
            self._note(holding, store.attach(device, source))
            for device, source in zip(image.devices, image.sources, strict=True)
        )
        watch_layers(image, holding.attached, cache_dir)
        if (pack := image.pack) is not None:
            holding.packed = Packed.attach(
                pack.named.descriptor, pack.data, pack.index, pack.source, store, holding.attached
            )
            self._note(holding, holding.packed.attached)
        return holding

    def _note(self, holding: Holding, attached: AttachedDevice) -> AttachedDevice:
        """Count a user of a device that is attached, maybe since another image brought it."""
        key = holding.store, attached.device.key.raw
        known = self._devices.get(key)
        if known is None:
            known = self._devices[key] = _Device(attached, holding)
        elif known.provider is not holding:
            known.provider.users += 1
            holding.providers.append(known.provider)
        known.users += 1
        return attached

    def _detach(self, holding: Holding) -> None:
        packs = [holding.packed.attached] if holding.packed else []
        for attached in [*packs, *holding.attached]:
            key = holding.store, attached.device.key.raw
            device = self._devices[key]
            device.users -= 1
            if not device.users:
                del self._devices[key]
                holding.store.detach(attached)
        for provider in holding.providers:
            self.give_back(provider)

    async def _store(self, settings: Settings, report: Reporter) -> "_Store":
        """The store of a cache directory, for one more user, who takes one from its ``users`` at the end."""
        path, there = await trio.to_thread.run_sync(found, settings.cache_dir)
        async with self._opening:
            known = self._stores.get(path)
            if known is not None and (there != known.identity or not known.fits(settings)):
                await self.let_go(known.store)
                if not known.users:
                    known.unused.set()
                    await known.closed.wait()
                    del self._stores[path]
                    known = None
            if known is None:
                known = await self._nursery.start(self._keep_store, replace(settings, cache_dir=path))
                self._stores[path] = known
            known.users += 1
        if not known.fits(settings):
            first = known.settings
            report(
                Notice(
                    f"the daemon uses {path} with a quota of {first.cache_quota} bytes and waits "
                    f"{first.read_deadline_s:g} s for a read, until nothing there is mounted any more"
                )
            )
        return known

    async def _keep_store(self, settings: Settings, *, task_status: trio.TaskStatus["_Store"]) -> None:
        async with open_store(settings, decoder=self.decoder) as store:
            there = await trio.to_thread.run_sync(identity, settings.cache_dir)
            opened = _Store(store, settings, there)
            loop = trio.lowlevel.current_trio_token()

            def make_room() -> None:
                with suppress(trio.RunFinishedError):
                    loop.run_sync_soon(self.let_go_soon, store)

            store.on_futility(make_room)
            task_status.started(opened)
            await opened.unused.wait()
        opened.closed.set()


@dataclass(slots=True, eq=False)
class _Store:
    """An open store, what it was opened with, and who uses it.

    Between mounts it stays open, unless its directory is another one by then: somebody may have deleted it.
    """

    store: SpanStore
    settings: Settings
    identity: Identity
    users: int = 0
    unused: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)

    def fits(self, settings: Settings) -> bool:
        """Whether it does what these settings say."""
        mine = self.settings
        return (mine.cache_quota, mine.read_deadline_s) == (settings.cache_quota, settings.read_deadline_s)


def _one_more(holding: Holding, spent: TransportStats) -> dict[str, int]:
    """Count a user of an open image, and what finding it took. Returns what was counted before."""
    holding.users += 1
    total = holding.image.transport_stats
    before = total.to_json()
    total.requests += spent.requests
    total.bytes_received += spent.bytes_received
    total.retries += spent.retries
    return before


def _nothing_soon(_store: SpanStore) -> None:
    """Nothing could do without the store."""


async def _nothing(_store: SpanStore) -> None:
    """Nothing could do without the store."""
    await trio.lowlevel.checkpoint()
