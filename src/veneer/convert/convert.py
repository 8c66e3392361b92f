"""``veneer convert``: an image, or all images of a multi-platform one, made lazily loadable.

The result is an ordinary OCI image: same config, same diffIDs, zstd layers that every runtime unpacks. It is
deterministic, so converting again gives the same digests and pushes nothing. Work that was interrupted,
even by kill -9, is continued layer by layer (:mod:`veneer.convert.work`).
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import trio

from veneer.convert.image import ImageConverter, NewImage
from veneer.convert.packing import Packer
from veneer.convert.push import Pusher
from veneer.convert.result import ConvertResult
from veneer.convert.work import WorkDirectory
from veneer.errors import UnsupportedFormat, UsageError
from veneer.events import Notice, Reporter, silent
from veneer.image.contents import Contents
from veneer.image.image import Reference
from veneer.image.open import MAX_NESTING, ResolvedImage, check_image, open_repository
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.manifest import Index, Manifest, build_index, parse_manifest
from veneer.oci.mediatypes import INDEXES, MANIFESTS, OCI_INDEX
from veneer.oci.reference import LayoutReference, parse_reference
from veneer.prefetch.profile import Profile
from veneer.settings import Settings
from veneer.source.base import Repository
from veneer.source.layout import OCILayout
from veneer.transport import Transport

__all__ = ["convert"]

_UNKNOWN_OS = "unknown"


async def convert(
    source_text: str,
    destination_text: str,
    settings: Settings,
    *,
    devices: str = "drop",
    profiles: Sequence[Profile] = (),
    static: Sequence[str] | None = None,
    platform: Platform | None = None,
    cores: int | None = None,
    report: Reporter = silent,
) -> ConvertResult:
    """Convert the image that ``source_text`` names and push it as ``destination_text``.

    Args:
        source_text: reference of the image to read.
        destination_text: reference of the result; its tag is pushed last.
        settings: where work is kept, and how registries are spoken to.
        devices: ``keep`` to have device nodes in the index; the layers have them either way.
        profiles: what to make packs of.
        static: make a pack of what starting the image will read, unless there is one for the default workload;
            of these words in place of the image's Cmd, unless they are (). None makes none.
        platform: convert only this one of a multi-platform image; None converts all of them.
        cores: how many to compress on; None takes all that this process may use.
        report: told of progress and of what is left out.

    Raises:
        UsageError: a reference is malformed, the destination has a digest, or a profile is of another image.
        UnsupportedFormat: not an image, or one with layers that cannot be read.
        IntegrityError: a blob, its compression, its tar or its diffID is wrong.
    """
    started = time.monotonic()
    source, destination = parse_reference(source_text), parse_reference(destination_text)
    if destination.digest is not None:
        raise UsageError(
            f"the destination {destination} has a digest",
            hint="the digest is the result: give a tag or nothing",
        )
    work_directory = settings.cache_dir / "convert"
    work = WorkDirectory(work_directory)
    await trio.to_thread.run_sync(work.sweep)
    async with Transport(settings) as transport:
        origin = open_repository(source, settings, transport)
        target = _open_destination(destination, settings, transport)
        pusher = Pusher(origin, target, work_directory, report)
        packer = Packer(pusher, settings, profiles, work_directory, report, static=static)
        converter = ImageConverter(
            pusher,
            work,
            settings,
            transport.stats,
            cores=cores or len(os.sched_getaffinity(0)),
            devices=devices,
            packer=packer,
            report=report,
        )
        pushed = False
        try:
            conversion = _Conversion(source, origin, converter, pusher, packer, settings, report)
            top = await conversion.run(platform, destination.tag)
            pushed = True
        finally:
            converter.finish(pushed=pushed)
            with trio.CancelScope(shield=True):
                await origin.aclose()
                await target.aclose()
    return ConvertResult(
        destination=str(replace(destination, digest=top.digest)),
        manifest=top.digest,
        images=tuple(image.converted for image in conversion.images),
        seconds=time.monotonic() - started,
    )


def _open_destination(reference: Reference, settings: Settings, transport: Transport) -> Repository:
    if isinstance(reference, LayoutReference):
        return OCILayout(reference.path, create=True)
    return open_repository(reference, settings, transport)


class _Conversion:
    """One walk over the manifests that a reference leads to."""

    def __init__(
        self,
        source: Reference,
        origin: Repository,
        converter: ImageConverter,
        pusher: Pusher,
        packer: Packer,
        settings: Settings,
        report: Reporter,
    ) -> None:
        self._source = source
        self._contents = Contents(origin, settings.cache_dir / "blobs")
        self._converter = converter
        self._pusher = pusher
        self._packer = packer
        self._report = report
        self.images: list[NewImage] = []

    async def run(self, platform: Platform | None, tag: str) -> Descriptor:
        """Convert everything, then push what the destination names under ``tag``."""
        media_type: str | None = None
        if self._source.digest is not None:
            data = await self._contents.pinned(self._source.digest)
        else:
            data, media_type = await self._contents.named(self._source.reference)
        document = parse_manifest(data, media_type)
        for _ in range(MAX_NESTING):
            if platform is None or isinstance(document, Manifest):
                break
            document = await self._entry(document.select(platform, str(self._source)))
        data, media_type, _ = await self._convert(document, MAX_NESTING)
        self._packer.check()
        return await self._pusher.manifest(data, media_type, tag)

    async def _convert(self, document: Manifest | Index, depth: int) -> tuple[bytes, str, Descriptor]:
        """The new manifest or index, whose blobs and entries are in the destination."""
        if isinstance(document, Manifest):
            check_image(document, str(self._source))
            image = await self._converter.convert(ResolvedImage(self._source, self._contents, document))
            self.images.append(image)
            return image.data, image.descriptor.media_type, image.descriptor
        if depth == 0:
            raise UnsupportedFormat(f"{self._source}: image indexes nested more than {MAX_NESTING} deep")
        entries = []
        for entry in document.manifests:
            if not self._wanted(entry):
                continue
            data, media_type, new = await self._convert(await self._entry(entry), depth - 1)
            await self._pusher.manifest(data, media_type)
            entries.append(replace(new, annotations=entry.annotations, platform=entry.platform))
        if not entries:
            raise UnsupportedFormat(f"{self._source} is an image index without images")
        data = build_index(entries, annotations=document.annotations, subject=document.subject)
        return data, OCI_INDEX, parse_manifest(data, OCI_INDEX).descriptor

    def _wanted(self, entry: Descriptor) -> bool:
        """Leave out what is not an image: attestations and such say something about the old digests."""
        is_image = entry.media_type in MANIFESTS + INDEXES and not entry.artifact_type
        if is_image and (entry.platform is None or entry.platform.os != _UNKNOWN_OS):
            return True
        self._report(Notice(f"left out {entry.digest}: it is not an image for a platform"))
        return False

    async def _entry(self, entry: Descriptor) -> Manifest | Index:
        data = await self._contents.manifest(entry, f"manifest of {self._source}")
        return parse_manifest(data, entry.media_type)
