"""From a reference to an :class:`Image`: everything that is known before the first byte of data is fetched.

Requests, all in sequence that must be: one for the manifest (two when a platform has to be chosen), then config
and index at once. What the local copy has is not asked for; a digest reference seen before needs no request.

Invariant: an :class:`Image`'s index describes exactly the layers that its manifest and config name.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from veneer.errors import IntegrityError, UnsupportedFormat
from veneer.events import Notice, Reporter, silent
from veneer.formats.base import DeviceKeeper, IndexLocation, LayerFormat, OpenedIndex
from veneer.formats.native import NativeFormat
from veneer.formats.plain import KnownFormat, StreamedFormat
from veneer.image.contents import Contents
from veneer.image.image import Image, LayerNote, Reference
from veneer.image.packs import (
    FoundPack,
    NamedPack,
    check_fits,
    find_pack,
    find_pack_by_layer,
    open_pack,
    report_unused,
)
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
                    manifest = await find_manifest(contents, reference, settings.platform)
                yield ResolvedImage(reference, contents, manifest), transport.stats
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await repository.aclose()


async def find_manifest(contents: Contents, reference: Reference, platform: Platform) -> Manifest:
    """Follow a reference through indexes to the manifest of one platform."""
    media_type: str | None = None
    if reference.digest is not None:
        data = await contents.pinned(reference.digest)
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
) -> Image:
    """Find the index of an image and open it. Raises UnsupportedFormat when there is none.

    ``pack``, ``timing`` and ``keeper`` are those of :func:`open_image`.
    """
    contents, manifest = resolved.contents, resolved.manifest
    found: list[tuple[LayerFormat, IndexLocation, OpenedIndex]] = []
    configs: list[ImageConfig] = []
    packs: list[FoundPack] = []

    async def index() -> None:
        with timing.phase("index"):
            found.append(await _find_index(resolved, layer_formats(settings, keeper, report)))

    async def config() -> None:
        with timing.phase("config"):
            configs.append(await load_config(resolved))

    async def pack_index(pack: str | NamedPack) -> None:
        with timing.phase("pack index"):
            await _find_pack(resolved, settings, pack, report, packs)

    async with open_nursery() as nursery:
        nursery.start_soon(index)
        nursery.start_soon(config)
        if pack is not None:
            nursery.start_soon(pack_index, pack)
    (layer_format, location, opened), image_config = found[0], configs[0]
    check_binding(opened.devices, manifest, image_config, f"index of {resolved.name}")
    if not packs and isinstance(pack, str):
        by_layer = await find_pack_by_layer(contents, manifest, image_config.diff_ids, settings.cache_dir, pack)
        packs += [by_layer] if by_layer is not None else []
    found_pack = _fitting(packs, opened.devices, report, exactly=isinstance(pack, NamedPack))
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
        layers=_notes(layer_format, manifest, location, opened),
        transport_stats=stats,
        pack=found_pack,
    )


async def _find_pack(
    resolved: ResolvedImage,
    settings: Settings,
    wanted: str | NamedPack,
    report: Reporter,
    found: list[FoundPack],
) -> None:
    where = resolved.contents, resolved.manifest, settings.cache_dir
    if isinstance(wanted, NamedPack):
        found.append(await open_pack(*where, wanted))
    elif (pack := await find_pack(*where, wanted, report)) is not None:
        found.append(pack)


def _fitting(
    found: Sequence[FoundPack], devices: Sequence[Device], report: Reporter, *, exactly: bool
) -> FoundPack | None:
    """The pack if there is one and it is about these layers; the error is raised when it is to be that one."""
    for pack in found:
        try:
            check_fits(pack, devices)
        except IntegrityError as error:
            if exactly:
                raise
            report_unused(pack.named.workload, error, report)
        else:
            return pack
    return None


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
        NativeFormat(settings.cache_dir / "sections"),
    )
    return formats if keeper is None else (*formats, StreamedFormat(records, keeper, report))


async def _find_index(
    resolved: ResolvedImage, formats: Sequence[LayerFormat]
) -> tuple[LayerFormat, IndexLocation, OpenedIndex]:
    for layer_format in formats:
        location = await layer_format.detect(resolved.contents, resolved.manifest)
        if location is not None:
            opened = await layer_format.open(resolved.contents, resolved.manifest, location)
            return layer_format, location, opened
    looked_for = "; ".join(layer_format.looked_for for layer_format in formats)
    raise UnsupportedFormat(
        f"{resolved.name} has no index (looked for {looked_for})",
        hint=f"make a lazily loadable copy: veneer convert {resolved.reference} DESTINATION; "
        "or mount it as it is, which downloads all of its layers once",
    )


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


def _notes(
    layer_format: LayerFormat, manifest: Manifest, location: IndexLocation, opened: OpenedIndex
) -> tuple[LayerNote, ...]:
    reason = {
        "annotation": "the manifest names an index that covers it",
        "referrer": "an index that covers it refers to the manifest",
        "local": "this host has streamed and indexed it before",
        "streamed": "no index covers it: this host has streamed and indexed it",
    }[location.origin]
    return tuple(
        LayerNote(
            blob=layer,
            format=layer_format.name,
            spans=len(device.spans),
            codecs=tuple(codec.name for codec in device.spans.codecs),
            size=device.spans.size,
            index_size=size,
            reason=reason,
        )
        for layer, device, size in zip(manifest.layers, opened.devices, opened.section_sizes, strict=True)
    )
