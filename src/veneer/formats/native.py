"""Native images: ordinary zstd layers, and one index blob that says how all of them are cut.

The index is named by the manifest annotation ``dev.veneer.index`` (the JSON text of its descriptor, covered by
whatever covers the manifest), or by an artifact whose subject is the manifest. The blob is specified in
docs/reference/index-format.md.
"""

from pathlib import Path

import trio

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat, UsageError
from veneer.formats.base import ImageContents, IndexLocation, OpenedIndex
from veneer.formats.sections import MIN_INDEX_SIZE, SectionCache
from veneer.index.wire import PackedIndex
from veneer.oci.canonical import parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import ANNOTATION_INDEX, VENEER_INDEX, VENEER_INDEX_ARTIFACT

__all__ = ["ANNOTATION_HEADER", "MAX_INDEX_SIZE", "NativeFormat"]

#: On the index descriptor: digest of the index's header, so that it can be used before the rest is there.
ANNOTATION_HEADER = "dev.veneer.index.header"
#: The index of four million files; nothing larger is fetched.
MAX_INDEX_SIZE = 128 << 20
#: A descriptor with a few annotations.
_MAX_ANNOTATION = 4 << 10
#: Artifacts that are looked at: anybody who may push to the repository can add more.
_MAX_REFERRERS = 8


class NativeFormat:
    """Recognises and opens native images; ``directory`` keeps index sections."""

    name = "native"
    looked_for = f"the annotation {ANNOTATION_INDEX} and referrers of type {VENEER_INDEX_ARTIFACT}"

    def __init__(self, directory: Path) -> None:
        self._sections = SectionCache(directory)

    async def detect(self, contents: ImageContents, manifest: Manifest) -> IndexLocation | None:
        """By the annotation, which costs nothing, or else by referrers, which cost two requests."""
        if (text := manifest.annotations.get(ANNOTATION_INDEX)) is not None:
            return IndexLocation("annotation", _annotated(text))
        referrers = await contents.repository.referrers(manifest.digest, VENEER_INDEX_ARTIFACT)
        for referrer in referrers[:_MAX_REFERRERS]:
            raw = await contents.manifest(referrer, f"index artifact {referrer.digest}")
            artifact = Manifest.parse(raw, referrer.media_type)
            says_so = artifact.subject is not None and artifact.subject.digest == manifest.digest
            if says_so and len(artifact.layers) == 1 and artifact.layers[0].media_type == VENEER_INDEX:
                return IndexLocation("referrer", artifact.layers[0])
        return None

    async def open(self, contents: ImageContents, manifest: Manifest, location: IndexLocation) -> OpenedIndex:
        """Fetch the index, as little of it as possible, and decode all but the trees."""
        descriptor = location.descriptor
        if descriptor is None:
            raise ValueError("a native index is a blob")
        known = data = await contents.known(descriptor)
        if data is None:
            data = await self._fetch(contents, manifest, descriptor)
        packed = await trio.to_thread.run_sync(PackedIndex.parse, data)
        if known is None and descriptor.size >= MIN_INDEX_SIZE:
            await self._sections.keep(packed.header, data)
        sizes = tuple(
            sum(section.stored_length for section in (record.tree, record.spans, record.aux) if section)
            for record in packed.header.layers
        )
        return OpenedIndex(
            packed.devices, packed.policy, sizes, packed.layers, descriptor.digest, artifact=data
        )

    async def _fetch(self, contents: ImageContents, manifest: Manifest, descriptor: Descriptor) -> bytes:
        what = f"index of {contents.repository.name}@{manifest.digest}"
        try:
            data = await self._fetch_sections(contents, manifest, descriptor)
            if data is None:
                data = await contents.fetch(descriptor, what, MAX_INDEX_SIZE)
        except NotFound as error:
            raise NotFound(
                f"the {what} is missing: {error.message}",
                hint="tools that copy images leave the index behind; run veneer convert on the copy",
                status=error.status,
                codes=error.codes,
            ) from error
        return data

    async def _fetch_sections(
        self, contents: ImageContents, manifest: Manifest, descriptor: Descriptor
    ) -> bytes | None:
        """The index by its sections, or None when there is nothing to gain or a piece arrived damaged."""
        header_digest = descriptor.annotations.get(ANNOTATION_HEADER)
        if header_digest is None or not MIN_INDEX_SIZE <= descriptor.size <= MAX_INDEX_SIZE:
            return None
        if not await self._sections.knows_any(manifest.layers):
            return None
        blob = contents.repository.blob(descriptor)
        try:
            digest = Digest.parse(header_digest)
            data = await self._sections.assemble(blob, len(manifest.layers), digest, descriptor.digest)
        except (IntegrityError, UsageError):
            return None  # fetched as a whole next, which says what is wrong if it is wrong there too
        await contents.keep(descriptor, data)
        return data


def _annotated(text: str) -> Descriptor:
    """The descriptor in an annotation."""
    what = f"annotation {ANNOTATION_INDEX}"
    if len(text) > _MAX_ANNOTATION:
        raise IntegrityError(f"{what} has {len(text)} characters")
    descriptor = Descriptor.from_json(parse_json(text.encode(), what, limit=_MAX_ANNOTATION), what)
    if descriptor.media_type != VENEER_INDEX:
        raise UnsupportedFormat(
            f"{what} names an index of type {descriptor.media_type!r}",
            hint=f"this version reads {VENEER_INDEX}; a newer one may have made it",
        )
    if descriptor.size > MAX_INDEX_SIZE:
        raise IntegrityError(f"{what} names an index of {descriptor.size} bytes, more than {MAX_INDEX_SIZE}")
    return descriptor
