"""``veneer index``: a sidecar for an image as it is, so that it mounts lazily without being converted.

A sidecar is an index of all layers, the windows of gzip layers, and packs. It is kept for this host, or pushed
as one artifact that refers to the image's manifest. The image itself is not touched.

Layers are fetched whole, checked, and indexed from a local copy (:mod:`veneer.convert.as_is`); what is pushed
is a function of the layers, the profiles and this version.
"""

import io
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

from veneer.convert.as_is import LARGE_SPAN, IndexedLayer, index_layer
from veneer.convert.pack import BuiltPack
from veneer.convert.packing import build_packs
from veneer.convert.push import EMPTY_CONFIG, download
from veneer.convert.result import ConvertedPack
from veneer.convert.work import BlobFile
from veneer.errors import CacheError, RegistryError, UsageError
from veneer.events import Notice, Progress, Reporter, silent
from veneer.formats.kept import Sidecar
from veneer.formats.native import ANNOTATION_HEADER
from veneer.image.open import ResolvedImage, kept_sidecars, load_config, resolve_image
from veneer.image.packs import keep_local_pack
from veneer.image.static import command_of
from veneer.index.merge import merge
from veneer.index.model import MetadataPolicy
from veneer.index.wire import header_length, pack_index
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import (
    ANNOTATION_INDEX,
    ANNOTATION_WORKLOAD,
    EMPTY_JSON,
    OCI_MANIFEST,
    VENEER_INDEX,
    VENEER_INDEX_ARTIFACT,
    VENEER_PACK_INDEX,
    VENEER_WINDOWS,
)
from veneer.prefetch.profile import DEFAULT_WORKLOAD, Profile, merge_profiles
from veneer.prefetch.static.start import Command
from veneer.settings import Settings
from veneer.source.base import BlobSource, Repository, WithWindows
from veneer.source.layout_file import FileBlob
from veneer.source.tasks import run_all

__all__ = ["IndexedImage", "make_sidecar"]

#: Layers fetched or indexed at once: one may wait for the network while the other computes.
_LAYERS_AT_ONCE = 2
_TASK = "index"


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """What a sidecar is.

    Args:
        image: name of the image, with its manifest's digest.
        artifact: digest of the artifact that was pushed; None for a sidecar of this host.
        index: descriptor of the index blob.
        layers: (blob, plain size, spans, size of the windows) of each layer.
        packs: for starts.
        dropped: metadata that the index does not hold -> how many.
        seconds: how long it took.
    """

    image: str
    artifact: Digest | None
    index: Descriptor
    layers: tuple[tuple[Descriptor, int, int, int], ...]
    packs: tuple[ConvertedPack, ...]
    dropped: Mapping[str, int]
    seconds: float

    @property
    def stored_size(self) -> int:
        """Bytes of the image's layers."""
        return sum(layer[0].size for layer in self.layers)

    @property
    def size(self) -> int:
        """Bytes of index and windows."""
        return self.index.size + sum(layer[3] for layer in self.layers)

    def to_json(self) -> dict[str, object]:
        """As ``veneer index --json`` shows it."""
        return {
            "image": self.image,
            "artifact": self.artifact and str(self.artifact),
            "index": self.index.to_json(),
            "size": self.size,
            "layers": [
                {"blob": blob.to_json(), "size": size, "spans": spans, "windows_size": windows}
                for blob, size, spans, windows in self.layers
            ],
            "packs": [asdict(pack) for pack in self.packs],
            "dropped": dict(self.dropped),
            "seconds": round(self.seconds, 3),
        }


async def make_sidecar(
    image_text: str,
    settings: Settings,
    *,
    push: bool,
    devices: str = "drop",
    profiles: Sequence[Profile] = (),
    static: Sequence[str] | None = None,
    report: Reporter = silent,
) -> IndexedImage:
    """Make the sidecar of the image that ``image_text`` names, for the platform of the settings.

    Args:
        image_text: reference of the image.
        settings: where work and sidecars are kept, and how registries are spoken to.
        push: put it into the image's repository; else it is kept for this host.
        devices: ``keep`` to have device nodes in the index.
        profiles: what to make packs of; several of one workload are merged.
        static: as for :func:`veneer.convert.convert.convert`.
        report: told of progress, and of what will not be lazy.

    Raises:
        UsageError: the image has an index already, or a profile is of another image.
        UnsupportedFormat: not an image, or a layer cannot be cut.
        IntegrityError: a layer, its compression, its tar or its diffID is wrong.
        CacheError: the disk does not take it.
        RegistryError: the registry does not take it, or fails.
    """
    started = time.monotonic()
    async with resolve_image(image_text, settings) as (resolved, _stats):
        if ANNOTATION_INDEX in resolved.manifest.annotations:
            raise UsageError(
                f"{resolved.name} names an index already", hint="to add packs to it: veneer convert"
            )
        work = settings.cache_dir / "convert"
        try:
            await trio.to_thread.run_sync(lambda: work.mkdir(parents=True, exist_ok=True))
            with tempfile.TemporaryDirectory(prefix="index-", dir=work) as directory:
                maker = _Maker(resolved, settings, Path(directory), devices, report)
                made = await maker.run(profiles, static, push=push)
        except OSError as error:
            raise CacheError(
                f"cannot work in {work}: {error.strerror or error}",
                hint="free space there, or choose another place with --cache-dir or VENEER_CACHE_DIR",
            ) from error
    return replace(made, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Layer:
    """An indexed layer and the local files of it."""

    indexed: IndexedLayer
    stored: Path
    windows: Path

    def source(self) -> BlobSource:
        device = self.indexed.index.device
        blob = FileBlob(self.stored, f"layer {device.blob.digest}", device.blob.size)
        if device.windows is None:
            return blob
        windows = device.windows.blob
        return WithWindows(blob, FileBlob(self.windows, f"windows of {device.blob.digest}", windows.size))


class _Maker:
    """Makes one sidecar in ``directory``, which is deleted afterwards."""

    def __init__(
        self, resolved: ResolvedImage, settings: Settings, directory: Path, devices: str, report: Reporter
    ) -> None:
        self._resolved = resolved
        self._settings = settings
        self._directory = directory
        self._devices = devices
        self._report = report

    async def run(
        self, profiles: Sequence[Profile], static: Sequence[str] | None, *, push: bool
    ) -> IndexedImage:
        resolved = self._resolved
        config = await load_config(resolved)
        merged = _by_workload(profiles, config.diff_ids)
        pairs = zip(resolved.manifest.layers, config.diff_ids, strict=True)
        layers = await run_all(
            [partial(self._layer, number, *pair) for number, pair in enumerate(pairs)], at_once=_LAYERS_AT_ONCE
        )
        dropped: Counter[str] = Counter()
        for layer in layers:
            dropped.update(layer.indexed.dropped)
        policy = MetadataPolicy(self._devices, dict(sorted(dropped.items())))
        indexes = [layer.indexed.index for layer in layers]
        data = await trio.to_thread.run_sync(pack_index, indexes, policy)
        header = Digest.of(data[: header_length(len(layers))])
        index = Descriptor(VENEER_INDEX, Digest.of(data), len(data), {ANNOTATION_HEADER: str(header)})
        command: Command | None = None
        if static is not None and all(profile.workload != DEFAULT_WORKLOAD for profile in merged):
            command = command_of(config, static)
        packs: list[BuiltPack] = []
        if merged or command is not None:
            tree = await trio.to_thread.run_sync(merge, indexes, policy)
            sources = [layer.source() for layer in layers]
            packs = await build_packs(
                self._settings, self._directory, resolved.name, tree, sources, merged, command
            )
        artifact = await self._push(index, data, layers, packs) if push else None
        if artifact is None:
            await trio.to_thread.run_sync(self._keep, index, data, layers, packs)
        return _result(resolved, artifact, index, layers, packs, policy)

    async def _layer(self, number: int, layer: Descriptor, diff_id: Digest) -> _Layer:
        stored, windows = self._directory / f"{number}.layer", self._directory / f"{number}.windows"
        item, size = layer.digest.hex[:12], layer.size
        source = self._resolved.contents.repository.blob(layer)

        def received(length: int) -> None:
            if length < size:
                self._report(Progress(_TASK, item, length, size))

        await download(source, layer, stored, received)

        def index() -> IndexedLayer:
            with BlobFile(windows, VENEER_WINDOWS) as blob:
                return index_layer(layer, diff_id, self._devices, stored, blob, f"layer {source.name}")

        indexed = await trio.to_thread.run_sync(index)
        self._report(Progress(_TASK, item, size, size))
        if indexed.largest_span > LARGE_SPAN:
            span = indexed.largest_span >> 20
            self._report(
                Notice(
                    f"layer {layer.digest} is fetched in pieces of up to {span} MiB, for it cannot be entered "
                    "elsewhere; veneer convert makes a copy that can"
                )
            )
        return _Layer(indexed, stored, windows)

    async def _push(
        self, index: Descriptor, data: bytes, layers: Sequence[_Layer], packs: Sequence[BuiltPack]
    ) -> Digest:
        repository = self._resolved.contents.repository
        subject = self._resolved.manifest.descriptor
        blobs = [index, *_windows(layers)]
        await repository.push_blob(index, lambda: io.BytesIO(data))
        for layer in layers:
            if (device := layer.indexed.index.device.windows) is not None:
                await repository.push_blob(device.blob, partial(_open, layer.windows), self._report)
        for pack in packs:
            await repository.push_blob(pack.descriptor, partial(io.BytesIO, pack.index))
            await repository.push_blob(pack.blob, partial(io.BytesIO, pack.data))
            blobs += [_named(pack), pack.blob]
        config = Descriptor(EMPTY_JSON, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG))
        await repository.push_blob(config, lambda: io.BytesIO(EMPTY_CONFIG))
        unique = list({blob.digest: blob for blob in blobs}.values())
        manifest = build_manifest(config, unique, subject=subject, artifact_type=VENEER_INDEX_ARTIFACT)
        artifact = await _push_artifact(repository, manifest)
        named = tuple(blob for blob in unique if blob.media_type == VENEER_PACK_INDEX)
        sidecar = Sidecar("referrer", index, _windows(layers), named, int(time.time()))
        # Else one that was found earlier would be used here for a day.
        await trio.to_thread.run_sync(kept_sidecars(self._settings).keep, subject.digest, sidecar)
        return artifact.digest

    def _keep(
        self, index: Descriptor, data: bytes, layers: Sequence[_Layer], packs: Sequence[BuiltPack]
    ) -> None:
        kept, manifest = kept_sidecars(self._settings), self._resolved.manifest.digest
        kept.add(index, data)
        for layer in layers:
            if (windows := layer.indexed.index.device.windows) is not None:
                kept.adopt(windows.blob, layer.windows)
        for pack in packs:
            keep_local_pack(
                self._settings.cache_dir, manifest, pack.workload, pack.index, pack.data, static=pack.static
            )
        # Last: what it names is here.
        kept.keep(manifest, Sidecar("local", index, _windows(layers), (), int(time.time())))


def _by_workload(profiles: Sequence[Profile], layers: Sequence[Digest]) -> list[Profile]:
    """One profile for each workload. Raises UsageError for one of another image."""
    merged = []
    for workload in dict.fromkeys(profile.workload for profile in profiles):
        one = merge_profiles([profile for profile in profiles if profile.workload == workload])
        if not one.restricted(layers).uses:
            raise UsageError(
                f"the profile of the workload {workload!r} is about none of the layers",
                hint="it may be of another image, or of another version of it: record it again",
            )
        merged.append(one)
    return merged


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _windows(layers: Sequence[_Layer]) -> tuple[Descriptor, ...]:
    devices = (layer.indexed.index.device.windows for layer in layers)
    return tuple({device.key: device.blob for device in devices if device is not None}.values())


def _named(pack: BuiltPack) -> Descriptor:
    annotations = {**pack.descriptor.annotations, ANNOTATION_WORKLOAD: pack.workload}
    return replace(pack.descriptor, annotations=annotations)


async def _push_artifact(repository: Repository, manifest: bytes) -> Descriptor:
    try:
        return await repository.push_manifest(manifest, OCI_MANIFEST)
    except RegistryError as error:
        error.hint = error.hint or "without --push the index is kept for this host alone"
        raise


def _result(
    resolved: ResolvedImage,
    artifact: Digest | None,
    index: Descriptor,
    layers: Sequence[_Layer],
    packs: Sequence[BuiltPack],
    policy: MetadataPolicy,
) -> IndexedImage:
    devices = [layer.indexed.index.device for layer in layers]
    return IndexedImage(
        image=resolved.name,
        artifact=artifact,
        index=index,
        layers=tuple(
            (
                device.blob,
                device.spans.size,
                len(device.spans),
                device.windows.blob.size if device.windows is not None else 0,
            )
            for device in devices
        ),
        packs=tuple(
            ConvertedPack(pack.workload, pack.content.device.spans.size, pack.blob.size, pack.static)
            for pack in packs
        ),
        dropped=policy.dropped,
        seconds=0.0,
    )
