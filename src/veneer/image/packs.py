"""Packs of an image: which there are, and whom they are believed.

A pack's bytes stand for those of layers, so it is used only if its index is named by the image's manifest (the
annotation ``dev.veneer.pack``: what covers the manifest covers it), if it came in one artifact with the index
that is used (both can lie until a layer is complete, so it is believed as much), or if this host made it (it is
below ``packs`` in the cache directory). It has to be about layers that the image has. A pack that is missing,
damaged or stale is told and left out: it costs time and nothing else.
"""

import glob
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final

import trio

from veneer.errors import IntegrityError, NotFound, UsageError, VeneerError
from veneer.events import Notice, Reporter
from veneer.image.by_layer import images_knowing, note_layers
from veneer.image.contents import Contents
from veneer.index.model import Device
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest
from veneer.oci.mediatypes import (
    ANNOTATION_PACK,
    ANNOTATION_PACK_BLOB,
    ANNOTATION_PROFILE,
    ANNOTATION_WORKLOAD,
    VENEER_PACK,
    VENEER_PACK_INDEX,
)
from veneer.prefetch.pack import MAX_PACK_INDEX_SIZE, PackIndex, decode_pack_index
from veneer.prefetch.profile import DEFAULT_WORKLOAD, check_workload
from veneer.source.ahead import AheadBlob
from veneer.source.base import BlobSource
from veneer.source.layout_file import FileBlob
from veneer.store.kept import note_use

__all__ = [
    "STATIC",
    "FoundPack",
    "NamedPack",
    "annotated_packs",
    "check_fits",
    "find_pack",
    "find_pack_by_layer",
    "keep_local_pack",
    "local_pack",
    "local_pack_note",
    "local_packs",
    "open_pack",
    "packs_annotation",
    "report_unused",
]

log = logging.getLogger(__name__)

#: Some hundred workloads.
_MAX_ANNOTATION: Final = 64 << 10
_NOTE: Final = "pack.json"
#: Of the size of a blob, in an annotation.
_MAX_DIGITS: Final = 15
#: Of a pack for what was told from the image's files alone.
STATIC: Final = "static"


@dataclass(frozen=True, slots=True)
class NamedPack:
    """A pack that somebody who is believed names.

    Args:
        workload: what it is for.
        origin: ``annotation``, ``referrer`` (beside an index that refers to the image) or ``local``.
        descriptor: of its index.
        image: of one that this host made for another image: digest of the manifest of that.
    """

    workload: str
    origin: str
    descriptor: Descriptor
    image: Digest | None = None

    @property
    def static(self) -> bool:
        """Whether nothing was run for it."""
        return self.descriptor.annotations.get(ANNOTATION_PROFILE) == STATIC

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        image = {} if self.image is None else {"image": str(self.image)}
        return {
            "workload": self.workload,
            "origin": self.origin,
            "index": self.descriptor.to_json(),
            **image,
        }

    @classmethod
    def from_json(cls, value: object) -> "NamedPack":
        """Read what :meth:`to_json` wrote. Raises IntegrityError."""
        match value:
            case {"workload": str(workload), "origin": str(origin), "index": index, **more}:
                image = more.get("image")
                of = Digest.parse(image) if isinstance(image, str) else None
                return cls(workload, origin, Descriptor.from_json(index, "index of a pack"), of)
        raise IntegrityError("this names no pack")


@dataclass(frozen=True, slots=True, eq=False)
class FoundPack:
    """A pack with its index at hand.

    Args:
        named: which one.
        index: what it has.
        source: its blob.
        data: the index as it is stored.
    """

    named: NamedPack
    index: PackIndex
    source: BlobSource
    data: bytes


def annotated_packs(manifest: Manifest) -> tuple[NamedPack, ...]:
    """The packs that a manifest names. Raises IntegrityError when its annotation is malformed."""
    text = manifest.annotations.get(ANNOTATION_PACK)
    if text is None:
        return ()
    what = f"annotation {ANNOTATION_PACK}"
    entries = parse_json(text.encode(), what, limit=_MAX_ANNOTATION)
    if not isinstance(entries, list):
        raise IntegrityError(f"{what} is not an array")
    named: dict[str, NamedPack] = {}
    for entry in entries:
        descriptor = Descriptor.from_json(entry, what)
        workload = _workload(descriptor)
        if workload in named:
            raise IntegrityError(f"{what} names the workload {workload[:64]!r} twice")
        named[workload] = NamedPack(workload, "annotation", descriptor)
    return tuple(named.values())


def _workload(descriptor: Descriptor) -> str:
    return descriptor.annotations.get(ANNOTATION_WORKLOAD, DEFAULT_WORKLOAD)


def packs_annotation(packs: Sequence[NamedPack]) -> str:
    """The annotation that names these packs."""
    return canonical_json(
        [
            Descriptor(
                pack.descriptor.media_type,
                pack.descriptor.digest,
                pack.descriptor.size,
                {**pack.descriptor.annotations, ANNOTATION_WORKLOAD: pack.workload},
            ).to_json()
            for pack in packs
        ]
    ).decode()


async def find_pack(
    contents: Contents,
    manifest: Manifest,
    cache_dir: Path,
    workload: str,
    report: Reporter,
    beside: Sequence[Descriptor] = (),
) -> FoundPack | None:
    """The pack for a workload: one that the manifest names, else one that this host made, else None.

    Those ``beside`` an index that refers to the image count as named by it. A static one that the manifest
    names comes last: converting makes one unasked. What is wrong with a pack is reported. Raises UsageError for
    what is no name of a workload.
    """
    check_workload(workload)
    try:
        every = (*annotated_packs(manifest), *(NamedPack(_workload(one), "referrer", one) for one in beside))
        named = next((pack for pack in every if pack.workload == workload), None)
        if named is None or named.static:
            named = await trio.to_thread.run_sync(local_pack, cache_dir, manifest.digest, workload) or named
        return None if named is None else await open_pack(contents, manifest, cache_dir, named)
    except VeneerError as error:
        report_unused(workload, error, report)
        return None


async def find_pack_by_layer(
    contents: Contents, manifest: Manifest, layers: Sequence[Digest], cache_dir: Path, workload: str
) -> FoundPack | None:
    """A pack that this host made for another image, of no layers but those of this one, if there is one."""

    def names() -> list[NamedPack]:
        found = []
        for image in images_knowing(cache_dir / "packs", reversed(layers), workload):
            with suppress(IntegrityError):
                if image != manifest.digest and (named := local_pack(cache_dir, image, workload)) is not None:
                    found.append(replace(named, image=image))
        return found

    for named in await trio.to_thread.run_sync(names):
        try:
            pack = await open_pack(contents, manifest, cache_dir, named)
        except VeneerError as error:
            log.info("pack of=%s is not used cause=%r", named.image, error.message)
            continue
        if pack.index.layers <= set(layers):
            return pack
    return None


async def open_pack(contents: Contents, manifest: Manifest, cache_dir: Path, named: NamedPack) -> FoundPack:
    """A pack by its name; no request when its index was seen before. Raises VeneerError."""
    descriptor = named.descriptor
    what = f"index of the pack {named.workload}"
    directory = _directory(cache_dir, named.image or manifest.digest, named.workload)
    data = await contents.known(descriptor)
    ahead = None if data is not None else _fetched_ahead(contents, descriptor)
    if data is None and named.origin == "local":
        data = await trio.to_thread.run_sync(_read, directory / descriptor.digest.hex, what)
    elif data is None:
        data = await contents.fetch(descriptor, what, MAX_PACK_INDEX_SIZE)
    index = await trio.to_thread.run_sync(decode_pack_index, data, descriptor)
    blob = index.device.blob
    if named.origin != "local":
        source: BlobSource = contents.repository.blob(blob)
        if ahead is not None and ahead[0] == (blob.digest, blob.size):
            source = ahead[1]
        return FoundPack(named, index, source, data)
    await trio.to_thread.run_sync(note_use, directory / _NOTE)
    # A mount that is restored after a new pack has been made needs the old index.
    await contents.keep(descriptor, data)
    name = f"local/pack/{named.workload}@{blob.digest}"
    return FoundPack(named, index, FileBlob(directory / blob.digest.hex, name, blob.size), data)


def _fetched_ahead(contents: Contents, descriptor: Descriptor) -> tuple[tuple[Digest, int], AheadBlob] | None:
    """The pack that the descriptor of an index names besides, asked for already; None when it names none.

    A wrong name costs what it makes us fetch: what is used follows from the index.
    """
    digest, _, size = descriptor.annotations.get(ANNOTATION_PACK_BLOB, "").partition(" ")
    if contents.background is None or not (size.isascii() and size.isdecimal() and len(size) <= _MAX_DIGITS):
        return None
    try:
        blob = Descriptor(VENEER_PACK, Digest.parse(digest), int(size))
    except UsageError:
        return None
    ahead = AheadBlob(contents.repository.blob(blob))
    contents.background.start_soon(ahead.fetch)
    return (blob.digest, blob.size), ahead


def report_unused(workload: str, error: VeneerError, report: Reporter) -> None:
    """Tell that a start goes on without its pack."""
    report(Notice(f"the pack of the workload {workload!r} is not used: {error.message}"))
    log.warning("pack=%s is not used cause=%r", workload, error.message)


def check_fits(pack: FoundPack, devices: Sequence[Device]) -> None:
    """Raise IntegrityError unless every byte of a pack is one of these devices'."""
    what = f"the pack {pack.named.descriptor.digest}"
    sizes = {device.diff_id: device.spans.size for device in devices}
    for layer, places in groupby(pack.index.places, attrgetter("layer")):
        if (size := sizes.get(layer)) is None:
            raise IntegrityError(f"{what} is stale: it has bytes of {layer}, which is none of the layers")
        *_, last = places
        if last.offset + last.length > size:
            raise IntegrityError(f"{what} has bytes after the end of {layer}")


def local_pack(cache_dir: Path, manifest: Digest, workload: str) -> NamedPack | None:
    """The pack of this host for an image. Blocks."""
    path = local_pack_note(cache_dir, manifest, workload)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
    return NamedPack.from_json(parse_json(data, str(path), limit=_MAX_ANNOTATION))


def local_pack_note(cache_dir: Path, manifest: Digest, workload: str) -> Path:
    """The file that says which pack of this host there is for an image, if it exists."""
    return _directory(cache_dir, manifest, workload) / _NOTE


def local_packs(cache_dir: Path, manifest: Digest) -> list[NamedPack]:
    """All packs of this host for an image. Blocks."""
    # Not Path.glob, which raises for a directory that is deleted meanwhile.
    notes = glob.glob(f"*/{_NOTE}", root_dir=cache_dir / "packs" / manifest.hex)
    found = (local_pack(cache_dir, manifest, os.path.dirname(note)) for note in sorted(notes))
    return [pack for pack in found if pack is not None]


def keep_local_pack(
    cache_dir: Path, manifest: Digest, workload: str, index: bytes, data: bytes, *, static: bool = False
) -> Path:
    """Make a pack that of this host, in place of an earlier one. Blocks; raises OSError."""
    check_workload(workload)
    directory = _directory(cache_dir, manifest, workload)
    directory.mkdir(parents=True, exist_ok=True)
    annotations = {ANNOTATION_PROFILE: STATIC} if static else {}
    descriptor = Descriptor(VENEER_PACK_INDEX, Digest.of(index), len(index), annotations)
    names = {descriptor.digest.hex: index, Digest.of(data).hex: data}
    note = canonical_json(NamedPack(workload, "local", descriptor).to_json())
    # The note comes last: what it names is whole.
    for name, content in [*names.items(), (_NOTE, note)]:
        new = directory / f".{name}"
        new.write_bytes(content)
        new.replace(directory / name)
    for path in directory.iterdir():
        if path.name not in {*names, _NOTE}:
            with suppress(OSError):
                path.unlink()
    note_layers(cache_dir / "packs", decode_pack_index(index, descriptor).layers, workload, manifest)
    return directory


def _directory(cache_dir: Path, manifest: Digest, workload: str) -> Path:
    return cache_dir / "packs" / manifest.hex / workload


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PACK_INDEX_SIZE + 1)
    except OSError as error:
        raise NotFound(f"{what}: cannot read {path}: {error.strerror}") from error
