"""From a reference to an :class:`Image`: everything that is known before the first byte of data is fetched.

Requests, all in sequence that must be: one for the manifest (two when a platform has to be chosen), then config
and index at once. What the local copy has is not asked for; a digest reference seen before needs no request.

Invariant: an :class:`Image`'s index describes exactly the layers that its manifest and config name.

A little longer than other modules here: the order of the requests is to be seen in one place.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.events import Notice, Reporter, silent
from veneer.formats.base import DeviceKeeper, IndexLocation, LayerFormat, OpenedIndex
from veneer.formats.kept import KeptSidecars
from veneer.formats.native import NativeFormat
from veneer.formats.plain import KnownFormat, StreamedFormat
from veneer.image.contents import Contents
from veneer.image.image import Image, Reference
from veneer.image.notes import layer_notes
from veneer.image.packs import (
    FoundPack,
    NamedPack,
    check_fits,
    find_pack,
    find_pack_by_layer,
    open_pack,
    report_unused,
)
from veneer.image.pinned import PinnedIndex
from veneer.image.refute import refutations, when_malformed
from veneer.index.model import Device
from veneer.oci.config import IMAGE_CONFIGS, MAX_CONFIG_SIZE, ImageConfig
from veneer.oci.descriptor import Platform
from veneer.oci.manifest import Manifest, parse_manifest
from veneer.oci.mediatypes import FOREIGN_LAYERS, LAYER_COMPRESSION
from veneer.oci.reference import LayoutReference, parse_reference
from veneer.registry.client import RegistryRepository
from veneer.registry.keychain import Keychain
from veneer.settings import Settings
from veneer.source.base import Repository
from veneer.source.layout import OCILayout
from veneer.source.tasks import open_nursery
from veneer.timing import UNTIMED, Timing
from veneer.transport import Connections, Transport, TransportStats

__all__ = [
    "MAX_NESTING",
    "ResolvedImage",
    "find_manifest",
    "kept_sidecars",
    "load_image",
    "open_image",
    "open_repository",
    "resolve_image",
]

#: Indexes inside of indexes: real ones have one level, layouts of multi-platform images two.
MAX_NESTING = 4


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedImage:
    """What a reference names, for one platform, before an index has been looked for."""

    reference: Reference
    contents: Contents
    manifest: Manifest

    @property
    def name(self) -> str:
        """For messages: repository and manifest digest."""
        return f"{self.contents.repository.name}@{self.manifest.digest}"


def open_repository(reference: Reference, settings: Settings, transport: Transport) -> Repository:
    """The repository that a reference is in. Nothing is asked of it yet."""
    if isinstance(reference, LayoutReference):
        return OCILayout(reference.path)
    return RegistryRepository(
        reference.host,
        reference.repository,
        transport=transport,
        keychain=Keychain(settings),
        settings=settings,
    )


@asynccontextmanager
async def open_image(
    text: str,
    settings: Settings,
    *,
    keeper: DeviceKeeper | None = None,
    pack: str | NamedPack | None = None,
    report: Reporter = silent,
    timing: Timing = UNTIMED,
    connections: Connections | None = None,
) -> AsyncIterator[Image]:
    """Open the image that ``text`` names; its connections live as long as the context.

    Args:
        text: the reference.
        settings: where copies are kept, and how registries are spoken to.
        keeper: where the layers of an image without an index may be put, all of them; None: nowhere.
        pack: look for the pack of this workload, and do without if there is none; or have exactly this one.
        report: notices about the image, and progress of what takes long.
        timing: notes the phases.
        connections: kept from one image to the next, in place of some of its own. Whoever keeps connections is
            out for speed: what is likely to be needed is asked for ahead.

    Raises:
        UsageError: not a reference.
        NotFound: no such image, or none for the platform.
        UnsupportedFormat: the image has no index, and there is no ``keeper``.
        CacheError: the ``keeper`` cannot take its layers.
        IntegrityError: something is not what its digest, or the manifest, says.
    """
    async with resolve_image(text, settings, timing, connections) as (resolved, stats):
        yield await load_image(resolved, settings, stats, report, pack, timing, keeper)


@asynccontextmanager
async def resolve_image(
    text: str, settings: Settings, timing: Timing = UNTIMED, connections: Connections | None = None
) -> AsyncIterator[tuple[ResolvedImage, TransportStats]]:
    """The manifest that ``text`` names for the platform of the settings.

    ``connections`` is that of :func:`open_image`.
    """
    reference = parse_reference(text)
    async with Transport(settings, connections=connections) as transport:
        repository = open_repository(reference, settings, transport)
        try:
            async with open_nursery() as nursery:
                ahead = None if connections is None else nursery
                if ahead is not None and isinstance(repository, RegistryRepository):
                    ahead.start_soon(repository.open_ahead)
                contents = Contents(repository, settings.cache_dir / "blobs", ahead)
                with timing.phase("resolve"):
                    manifest = await find_manifest(
                        contents, reference, settings.platform, ask=settings.pull == "always"
                    )
                yield ResolvedImage(reference, contents, manifest), transport.stats
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await repository.aclose()


async def find_manifest(
    contents: Contents, reference: Reference, platform: Platform, *, ask: bool = True
) -> Manifest:
    """Follow a reference through indexes to the manifest of one platform.

    Unless it is to ``ask``, what a tag named last is good enough if that is here.
    """
    media_type: str | None = None
    if reference.digest is not None:
        data = await contents.pinned(reference.digest)
    elif not ask and (before := await contents.named_before(reference.reference)) is not None:
        data = before
    else:
        data, media_type = await contents.named(reference.reference)
    for _ in range(MAX_NESTING):
        document = parse_manifest(data, media_type)
        if isinstance(document, Manifest):
            check_image(document, str(reference))
            return document
        entry = document.select(platform, str(reference))
        data, media_type = await contents.manifest(entry, f"manifest of {reference}"), entry.media_type
    raise UnsupportedFormat(f"{reference}: image indexes nested more than {MAX_NESTING} deep")


def check_image(manifest: Manifest, what: str) -> None:
    """Raise UnsupportedFormat unless the manifest is of a runnable image whose layers can be read."""
    if manifest.config.media_type not in IMAGE_CONFIGS:
        kind = manifest.artifact_type or manifest.config.media_type
        raise UnsupportedFormat(f"{what} is not an image but an artifact of type {kind!r}")
    for layer in manifest.layers:
        if layer.media_type in FOREIGN_LAYERS:
            raise UnsupportedFormat(
                f"layer {layer.digest} of {what} is not in the registry ({layer.media_type})",
                hint="its licence forbids that; use an image without foreign layers",
            )
        if layer.media_type not in LAYER_COMPRESSION:
            raise UnsupportedFormat(f"layer {layer.digest} of {what} is of unknown type {layer.media_type!r}")


async def load_image(
    resolved: ResolvedImage,
    settings: Settings,
    stats: TransportStats,
    report: Reporter = silent,
    pack: str | NamedPack | None = None,
    timing: Timing = UNTIMED,
    keeper: DeviceKeeper | None = None,
    pinned: PinnedIndex | None = None,
) -> Image:
    """Find the index of an image and open it, or exactly the one that is ``pinned``.

    ``pack``, ``timing`` and ``keeper`` are those of :func:`open_image`. Raises UnsupportedFormat when there is
    no index.
    """
    contents, manifest = resolved.contents, resolved.manifest
    search = _Search(resolved, settings, report, timing, pinned)
    async with open_nursery() as nursery:
        nursery.start_soon(search.index, layer_formats(settings, keeper, report))
        nursery.start_soon(search.config)
        if pack is not None:
            nursery.start_soon(search.pack, pack)
    layer_format, location, opened, image_config = search.result()
    if pinned is not None:
        pinned.check(opened.identity, resolved.name)
    if isinstance(pack, str):
        await search.pack_by_layer(pack, image_config)
    found_pack = search.fitting(opened.devices, location, exactly=isinstance(pack, NamedPack))
    if not image_config.platform.matches(settings.platform):
        report(Notice(f"{resolved.reference} is for {image_config.platform}, not for {settings.platform}"))
    return Image(
        reference=resolved.reference,
        name=resolved.name,
        repository=contents.repository,
        manifest=manifest,
        config=image_config,
        index_origin=location.origin,
        index_descriptor=location.descriptor,
        opened=opened,
        layers=layer_notes(layer_format, manifest, location, opened),
        transport_stats=stats,
        pack=found_pack,
        malformed=when_malformed(settings.cache_dir, resolved.name, manifest.digest, location),
    )


class _Search:
    """What is looked for at the same time: the index of an image, its config, a pack."""

    def __init__(
        self,
        resolved: ResolvedImage,
        settings: Settings,
        report: Reporter,
        timing: Timing,
        pinned: PinnedIndex | None,
    ) -> None:
        self._pinned = pinned
        self._resolved = resolved
        self._settings = settings
        self._report = report
        self._timing = timing
        self._found: tuple[LayerFormat, IndexLocation, OpenedIndex] | None = None
        self._config: ImageConfig | None = None
        self._pack: FoundPack | None = None
        self._configured, self._located = trio.Event(), trio.Event()
        self._location: IndexLocation | None = None

    async def config(self) -> None:
        with self._timing.phase("config"):
            self._config = await load_config(self._resolved)
        self._configured.set()

    async def index(self, formats: Sequence[LayerFormat]) -> None:
        """Find the index, in the first of the formats that has a right one."""
        with self._timing.phase("index"):
            self._found = await self._find_index(formats)

    async def pack(self, wanted: str | NamedPack) -> None:
        """Find a pack: this one, or the one for a workload."""
        where = self._resolved.contents, self._resolved.manifest, self._settings.cache_dir
        with self._timing.phase("pack index"):
            if isinstance(wanted, NamedPack):
                self._pack = await open_pack(*where, wanted)
                return
            # It is known where the index is before any of it has come, and packs may be named there.
            await self._located.wait()
            beside = self._location.packs if self._location is not None else ()
            self._pack = await find_pack(*where, wanted, self._report, beside)

    async def pack_by_layer(self, workload: str, config: ImageConfig) -> None:
        """Where the image has no pack, take one that is known of its layers."""
        if self._pack is None:
            where = self._resolved.contents, self._resolved.manifest
            cache_dir = self._settings.cache_dir
            self._pack = await find_pack_by_layer(*where, config.diff_ids, cache_dir, workload)

    def result(self) -> tuple[LayerFormat, IndexLocation, OpenedIndex, ImageConfig]:
        """The index and the config, once both have been found."""
        if self._found is None or self._config is None:
            raise AssertionError("a search that failed has raised")
        return *self._found, self._config

    def fitting(self, devices: Sequence[Device], location: IndexLocation, *, exactly: bool) -> FoundPack | None:
        """The pack if there is one and it is about these layers; or its error, if it is to be that one."""
        if (pack := self._pack) is None:
            return None
        try:
            check_fits(pack, devices)
            if pack.named.origin == "referrer" and location.origin != "referrer":
                raise IntegrityError("the index that it came with is not used")
        except IntegrityError as error:
            if exactly:
                raise
            report_unused(pack.named.workload, error, self._report)
            return None
        return pack

    async def _find_index(
        self, formats: Sequence[LayerFormat]
    ) -> tuple[LayerFormat, IndexLocation, OpenedIndex]:
        resolved = self._resolved
        contents, manifest = resolved.contents, resolved.manifest
        try:
            for layer_format in formats:
                location = await self._locate(layer_format)
                if location is None:
                    continue
                self._location = self._location or location
                self._located.set()
                try:
                    opened = await layer_format.open(contents, manifest, location)
                    await self._check(opened)
                except (IntegrityError, NotFound, UnsupportedFormat) as error:
                    if location.origin != "referrer" or location.pinned:
                        raise
                    # Whoever may push can add a referrer: a bad one must not make an image worse than without.
                    notice = f"the index that refers to {resolved.name} is not used: {error.message}"
                    self._report(Notice(notice))
                    await layer_format.reject(manifest)
                    continue
                return layer_format, location, opened
        finally:
            self._located.set()
        looked_for = "; ".join(layer_format.looked_for for layer_format in formats)
        raise UnsupportedFormat(
            f"{resolved.name} has no index (looked for {looked_for})",
            hint=f"make one: veneer index {resolved.reference}, "
            f"or a lazily loadable copy: veneer convert {resolved.reference} DESTINATION; "
            "or mount it as it is, which downloads all of its layers once",
        )

    async def _locate(self, layer_format: LayerFormat) -> IndexLocation | None:
        if self._pinned is not None and (location := self._pinned.location) is not None:
            return location if layer_format.name == NativeFormat.name else None
        return await layer_format.detect(self._resolved.contents, self._resolved.manifest)

    async def _check(self, opened: OpenedIndex) -> None:
        await self._configured.wait()
        if self._config is not None:
            what = f"index of {self._resolved.name}"
            check_binding(opened.devices, self._resolved.manifest, self._config, what)


async def load_config(resolved: ResolvedImage) -> ImageConfig:
    """The image config, which must name as many layers as the manifest."""
    manifest = resolved.manifest
    what = f"config of {resolved.name}"
    config = ImageConfig.parse(await resolved.contents.fetch(manifest.config, what, MAX_CONFIG_SIZE))
    if len(config.diff_ids) != len(manifest.layers):
        raise IntegrityError(
            f"{what} names {len(config.diff_ids)} layers, but the manifest has {len(manifest.layers)}"
        )
    return config


def layer_formats(settings: Settings, keeper: DeviceKeeper | None, report: Reporter) -> tuple[LayerFormat, ...]:
    """All formats, in the order in which they are tried: what is here comes first, what costs most last."""
    records = settings.cache_dir / "layers"
    formats: tuple[LayerFormat, ...] = (
        KnownFormat(records, keeper),
        NativeFormat(
            settings.cache_dir / "sections",
            kept_sidecars(settings),
            refutations(settings.cache_dir),
            referrers=settings.referrers == "accept",
        ),
    )
    return formats if keeper is None else (*formats, StreamedFormat(records, keeper, report))


def kept_sidecars(settings: Settings) -> KeptSidecars:
    """The sidecars that this host knows."""
    return KeptSidecars(settings.cache_dir / "sidecars")


def check_binding(devices: Sequence[Device], manifest: Manifest, config: ImageConfig, what: str) -> None:
    """Raise IntegrityError unless the index is about exactly these layers, in this order."""
    if len(devices) != len(manifest.layers):
        raise IntegrityError(f"{what} describes {len(devices)} layers, the image has {len(manifest.layers)}")
    stated = zip(devices, manifest.layers, config.diff_ids, strict=True)
    for number, (device, layer, diff_id) in enumerate(stated, 1):
        blob = device.blob
        if (blob.digest, blob.size) != (layer.digest, layer.size):
            raise IntegrityError(
                f"{what} describes {blob.digest} ({blob.size} bytes) as layer {number}, "
                f"the image has {layer.digest} ({layer.size} bytes)"
            )
        if device.diff_id != diff_id:
            raise IntegrityError(
                f"{what} says that layer {number} unpacks to {device.diff_id}, the config says {diff_id}"
            )
