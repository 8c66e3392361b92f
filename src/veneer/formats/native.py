"""Images with an index blob that says how all of their layers are cut.

The index of a converted image is named by the manifest annotation ``dev.veneer.index`` (the JSON text of its
descriptor, covered by whatever covers the manifest). That of an image as it is, its sidecar, was made by this
host, or is named by an artifact whose subject is the manifest, together with the windows of gzip layers and
with packs. The blob is specified in docs/reference/index-format.md.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from veneer.errors import (
    CacheError,
    IntegrityError,
    NotFound,
    RegistryError,
    UnsupportedFormat,
    UsageError,
)
from veneer.formats.base import ImageContents, IndexLocation, OpenedIndex
from veneer.formats.kept import KeptSidecars, Sidecar
from veneer.formats.refuted import Refutations
from veneer.formats.sections import MIN_INDEX_SIZE, SectionCache
from veneer.index.model import Device
from veneer.index.wire import PackedIndex
from veneer.oci.canonical import parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import (
    ANNOTATION_INDEX,
    VENEER_INDEX,
    VENEER_INDEX_ARTIFACT,
    VENEER_PACK_INDEX,
    VENEER_WINDOWS,
)
from veneer.source.base import BlobSource
from veneer.source.tasks import run_all

__all__ = ["ANNOTATION_HEADER", "MAX_INDEX_SIZE", "NativeFormat"]

#: On the index descriptor: digest of the index's header, so that it can be used before the rest is there.
ANNOTATION_HEADER = "dev.veneer.index.header"
#: The index of four million files; nothing larger is fetched.
MAX_INDEX_SIZE = 128 << 20
#: A descriptor with a few annotations.
_MAX_ANNOTATION = 4 << 10
#: Of the version in a media type.
_MAX_DIGITS = 6
#: Artifacts that are looked at: anybody who may push to the repository can add more.
_MAX_REFERRERS = 8
#: How long a sidecar that was found is used before it is looked whether there is a better one.
_FRESH_S = 24 * 3600

_log = logging.getLogger(__name__)


class NativeFormat:
    """Recognises and opens images with an index.

    Args:
        directory: keeps index sections.
        kept: the sidecars that this host knows.
        refuted: the indexes that it knows to be wrong.
        referrers: whether sidecars in the registry, which the manifest does not name, are used.
    """

    name = "native"

    def __init__(
        self, directory: Path, kept: KeptSidecars, refuted: Refutations, *, referrers: bool = True
    ) -> None:
        self._sections = SectionCache(directory)
        self._kept = kept
        self._refuted = refuted
        self._referrers = referrers

    @property
    def looked_for(self) -> str:
        """See :class:`~veneer.formats.base.LayerFormat`."""
        asked = f"and referrers of type {VENEER_INDEX_ARTIFACT}" if self._referrers else "but no referrers"
        return f"the annotation {ANNOTATION_INDEX} {asked}"

    async def detect(self, contents: ImageContents, manifest: Manifest) -> IndexLocation | None:
        """By the annotation or what is known here, which cost nothing, else by referrers: two requests."""
        if (text := manifest.annotations.get(ANNOTATION_INDEX)) is not None:
            return IndexLocation("annotation", _annotated(text))
        known = await trio.to_thread.run_sync(self._kept.find, manifest.digest)
        if known is not None and known.origin == "referrer" and not self._referrers:
            known = None
        if known is not None and known.origin == "referrer" and await self._is_refuted(known):
            known = None  # there may be a right one
        if self._referrers and (known is None or not _is_fresh(known)):
            try:
                known = await self._find_referrer(contents, manifest) or known
            except RegistryError as error:
                if known is None or not error.temporary:
                    raise
                _log.warning("using the sidecar known since %d: %s", known.seen_s, error)
        return None if known is None else IndexLocation(known.origin, known.index, known.packs)

    async def reject(self, manifest: Manifest) -> None:
        """Ask for referrers again the next time."""
        await trio.to_thread.run_sync(self._kept.forget, manifest.digest)

    async def _find_referrer(self, contents: ImageContents, manifest: Manifest) -> Sidecar | None:
        referrers = await contents.repository.referrers(manifest.digest, VENEER_INDEX_ARTIFACT)
        reads = [partial(_sidecar, contents, manifest, one) for one in referrers[:_MAX_REFERRERS]]
        found = [one for one in await run_all(reads) if one is not None]
        if not found:
            return None
        wrong = [one for one in found if await self._is_refuted(one)]
        # Whoever made one with more packs did so later, or knew more; among equals any, but always the same.
        sidecar = max(found, key=lambda one: (one not in wrong, len(one.packs), one.index.digest.hex))
        try:
            await trio.to_thread.run_sync(self._kept.keep, manifest.digest, sidecar)
        except CacheError as error:
            _log.warning("%s", error)
        return sidecar

    async def _is_refuted(self, sidecar: Sidecar) -> bool:
        return await trio.to_thread.run_sync(self._refuted.find, sidecar.index.digest) is not None

    async def open(self, contents: ImageContents, manifest: Manifest, location: IndexLocation) -> OpenedIndex:
        """Fetch the index, as little of it as possible, and decode all but the trees."""
        descriptor = location.descriptor
        if descriptor is None:
            raise ValueError("a native index is a blob")
        if not location.pinned:
            refutation = await trio.to_thread.run_sync(self._refuted.find, descriptor.digest)
            if refutation is not None:
                raise refutation.error(descriptor.digest)
        known = data = await contents.known(descriptor)
        if data is None and (blob := await trio.to_thread.run_sync(self._kept.blob, descriptor)) is not None:
            data = await blob.read(0, blob.size)
            descriptor.digest.check(data, f"index {blob.name}")
        if data is None:
            data = await self._fetch(contents, manifest, descriptor)
        packed = await trio.to_thread.run_sync(PackedIndex.parse, data)
        if known is None and descriptor.size >= MIN_INDEX_SIZE:
            await self._sections.keep(packed.header, data)
        sizes = tuple(
            sum(section.stored_length for section in (record.tree, record.spans, record.aux) if section)
            for record in packed.header.layers
        )
        windows = await trio.to_thread.run_sync(self._windows, contents, packed.devices)
        return OpenedIndex(
            packed.devices,
            packed.policy,
            sizes,
            packed.layers,
            descriptor.digest,
            artifact=data,
            windows=windows,
        )

    def _windows(self, contents: ImageContents, devices: Sequence[Device]) -> tuple[BlobSource | None, ...]:
        blobs = [one.windows.blob if one.windows is not None else None for one in devices]
        return tuple(
            None if blob is None else self._kept.blob(blob) or contents.repository.blob(blob) for blob in blobs
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


def _is_fresh(sidecar: Sidecar) -> bool:
    return sidecar.origin == "local" or 0 <= time.time() - sidecar.seen_s < _FRESH_S


async def _sidecar(contents: ImageContents, manifest: Manifest, referrer: Descriptor) -> Sidecar | None:
    """The sidecar that an artifact is, or None if it is something else."""
    try:
        raw = await contents.manifest(referrer, f"index artifact {referrer.digest}")
        artifact = Manifest.parse(raw, referrer.media_type)
    except (IntegrityError, NotFound, UnsupportedFormat) as error:
        _log.warning("left out a referrer of %s: %s", manifest.digest, error)
        return None
    blobs: dict[str, list[Descriptor]] = {VENEER_INDEX: [], VENEER_WINDOWS: [], VENEER_PACK_INDEX: []}
    for blob in artifact.layers:
        blobs.get(blob.media_type, []).append(blob)
    says_so = artifact.subject is not None and artifact.subject.digest == manifest.digest
    if not says_so or len(blobs[VENEER_INDEX]) != 1:
        return None
    windows, packs = tuple(blobs[VENEER_WINDOWS]), tuple(blobs[VENEER_PACK_INDEX])
    return Sidecar("referrer", blobs[VENEER_INDEX][0], windows, packs, int(time.time()))


def _annotated(text: str) -> Descriptor:
    """The descriptor in an annotation."""
    what = f"annotation {ANNOTATION_INDEX}"
    if len(text) > _MAX_ANNOTATION:
        raise IntegrityError(f"{what} has {len(text)} characters")
    descriptor = Descriptor.from_json(parse_json(text.encode(), what, limit=_MAX_ANNOTATION), what)
    if descriptor.media_type != VENEER_INDEX:
        kind, _, version = descriptor.media_type.rpartition(".v")
        known_kind, _, known = VENEER_INDEX.rpartition(".v")
        if kind == known_kind and version.isdecimal() and len(version) <= _MAX_DIGITS:
            raise UnsupportedFormat.of_version(f"{what} names an index", int(version), int(known))
        raise UnsupportedFormat(
            f"{what} names an index of type {descriptor.media_type!r}",
            hint=f"this version reads {VENEER_INDEX}; a newer one may have made it",
        )
    if descriptor.size > MAX_INDEX_SIZE:
        raise IntegrityError(f"{what} names an index of {descriptor.size} bytes, more than {MAX_INDEX_SIZE}")
    return descriptor
