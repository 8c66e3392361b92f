"""Packs on their way into a destination: those that the source has, and new ones for profiles.

Places of packs name layers by diffID, which a conversion keeps: packs of the source stay true, and are copied.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from veneer.convert.pack import LEVEL, STATIC_LEVEL, BuiltPack, pack_tree
from veneer.convert.push import Pusher
from veneer.convert.result import ConvertedPack
from veneer.errors import IntegrityError, NotFound, UnsupportedFormat, UsageError
from veneer.events import Notice, Reporter
from veneer.image.open import ResolvedImage
from veneer.image.packs import NamedPack, annotated_packs, open_pack, packs_annotation
from veneer.image.static import command_of, look
from veneer.index.model import Device, ImageIndex
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.mediatypes import VENEER_PACK_ARTIFACT
from veneer.prefetch.profile import DEFAULT_WORKLOAD, Profile, merge_profiles
from veneer.prefetch.static.start import Command
from veneer.settings import Settings
from veneer.source.base import BlobSource
from veneer.store.spanstore import open_store

__all__ = ["PackedImage", "Packer", "build_packs"]


@dataclass(frozen=True, slots=True)
class PackedImage:
    """The packs of one image in the destination.

    Args:
        annotation: names them in the manifest; "" without any.
        packs: what they are.
        blobs: descriptors of each pack's index and data.
        new: whether any of them is new.
    """

    annotation: str
    packs: tuple[ConvertedPack, ...]
    blobs: tuple[tuple[Descriptor, Descriptor], ...]
    new: bool


class Packer:
    """Makes and copies packs for the images of one conversion.

    Args:
        profiles: what to make packs of; several of one workload are merged.
        directory: for what is read on the way.
        static: make one of what starting an image will read, for images without a default one; of these words
            in place of the image's Cmd, unless they are ().
    """

    def __init__(
        self,
        pusher: Pusher,
        settings: Settings,
        profiles: Sequence[Profile],
        directory: Path,
        report: Reporter,
        *,
        static: Sequence[str] | None = None,
    ) -> None:
        workloads = dict.fromkeys(profile.workload for profile in profiles)
        self._profiles = [
            merge_profiles([profile for profile in profiles if profile.workload == workload])
            for workload in workloads
        ]
        self._unused = set(workloads)
        self._pusher = pusher
        self._settings = settings
        self._directory = directory
        self._report = report
        self._static = static

    def check(self) -> None:
        """Raise UsageError when a profile was of no image."""
        if self._unused:
            raise UsageError(
                f"the profile of the workload {min(self._unused)!r} is about none of the layers",
                hint="it may be of another image, or of another version of it: record it again",
            )

    async def pack(
        self,
        resolved: ResolvedImage,
        devices: Sequence[Device],
        tree: Callable[[], ImageIndex],
        sources: Sequence[BlobSource],
        config: ImageConfig | None = None,
    ) -> PackedImage:
        """Put the packs of an image into the destination.

        Args:
            resolved: the image in the source.
            devices: of its layers in the destination.
            tree: gives what is on them; blocks, and is called only if need be.
            sources: their blobs.
            config: of an image that may get a static pack.
        """
        layers = {device.diff_id for device in devices}
        profiles = [profile for profile in self._profiles if profile.restricted(layers).uses]
        workloads = {profile.workload for profile in profiles}
        self._unused -= workloads
        packs: dict[str, tuple[ConvertedPack, Descriptor, Descriptor]] = {}
        for named, blob, size in await self._copy(resolved, workloads):
            converted = ConvertedPack(named.workload, size, blob.size, named.static)
            packs[named.workload] = converted, named.descriptor, blob
        if self._static is None or DEFAULT_WORKLOAD in workloads | packs.keys():
            config = None
        built: list[BuiltPack] = []
        if profiles or config is not None:
            index = await trio.to_thread.run_sync(tree)
            command = None if config is None else command_of(config, self._static or ())
            built = await build_packs(
                self._settings, self._directory, resolved.name, index, sources, profiles, command
            )
        for pack in built:
            await self._pusher.data(pack.descriptor, pack.index)
            await self._pusher.data(pack.blob, pack.data)
            size = pack.content.device.spans.size
            converted = ConvertedPack(pack.workload, size, pack.blob.size, pack.static)
            packs[pack.workload] = converted, pack.descriptor, pack.blob
        names = [NamedPack(workload, "annotation", one[1]) for workload, one in sorted(packs.items())]
        return PackedImage(
            packs_annotation(names) if names else "",
            tuple(one for one, _, _ in packs.values()),
            tuple((index, blob) for _, index, blob in packs.values()),
            bool(built),
        )

    async def refer(self, packed: PackedImage, manifest: Descriptor) -> None:
        """Make the packs known as referrers of the image, for registries that collect garbage."""
        for blobs in packed.blobs:
            await self._pusher.artifact(blobs, manifest, VENEER_PACK_ARTIFACT)

    async def _copy(self, resolved: ResolvedImage, but: set[str]) -> list[tuple[NamedPack, Descriptor, int]]:
        """Copy the packs of the source, other than those of some workloads. What is wrong is left out."""
        copied: list[tuple[NamedPack, Descriptor, int]] = []
        try:
            named = [pack for pack in annotated_packs(resolved.manifest) if pack.workload not in but]
        except IntegrityError as error:
            self._report(Notice(f"left out the packs of the source: {error.message}"))
            return copied
        for pack in named:
            try:
                found = await open_pack(resolved.contents, resolved.manifest, self._settings.cache_dir, pack)
                blob = found.index.device.blob
                await self._pusher.copy(pack.descriptor)
                await self._pusher.copy(blob)
            except (NotFound, IntegrityError, UnsupportedFormat) as error:
                self._report(Notice(f"left out the pack of the workload {pack.workload!r}: {error.message}"))
            else:
                copied.append((pack, blob, found.index.device.spans.size))
        return copied


async def build_packs(
    settings: Settings,
    directory: Path,
    name: str,
    index: ImageIndex,
    sources: Sequence[BlobSource],
    profiles: Sequence[Profile],
    command: Command | None,
) -> list[BuiltPack]:
    """A pack for each profile, and a static one of starting ``command`` if that is given.

    Args:
        settings: how to read.
        directory: for what is read on the way.
        name: of the image, for messages.
        index: its tree.
        sources: its layers' blobs.
        profiles: one a workload.
        command: what the image is started with.
    """
    packs: list[BuiltPack] = []
    await trio.to_thread.run_sync(lambda: directory.mkdir(parents=True, exist_ok=True))
    with tempfile.TemporaryDirectory(prefix="pack-", dir=directory) as scratch:
        # Not the usual cache: what is read here is of no use to mounts on this machine.
        async with open_store(replace(settings, cache_dir=Path(scratch))) as store:
            pairs = zip(index.devices, sources, strict=True)
            attached = [store.attach(device, source) for device, source in pairs]
            if command is not None:
                static = await look(index, store, attached, command)
                # An image of data has nothing to start.
                profiles = [*profiles, static] if static.uses else profiles
            for profile in profiles:
                level = STATIC_LEVEL if profile.static else LEVEL
                packs.append(await pack_tree(index, name, store, attached, profile, level=level))
    return packs
