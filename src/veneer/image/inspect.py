"""What an image is and how it would be loaded, whether or not it can be loaded lazily."""

import stat
from dataclasses import dataclass

from veneer.errors import UnsupportedFormat
from veneer.events import Reporter, silent
from veneer.image.image import Image, LayerNote
from veneer.image.open import ResolvedImage, load_config, load_image, resolve_image
from veneer.index.model import ImageIndex
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import LAYER_COMPRESSION
from veneer.settings import Settings

__all__ = ["ImageSummary", "inspect_image"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageSummary:
    """Everything ``veneer inspect`` shows.

    Args:
        name: repository and manifest digest.
        diff_ids: one for each layer.
        reason: why the image is loaded lazily, or why it is not.
        index: the index blob, None when there is none.
        index_origin: how it was found, "" when there is none.
        files: names in the merged tree by kind, empty without an index.
        requests: HTTP requests that finding this out took.
    """

    name: str
    digest: Digest
    media_type: str
    config: ImageConfig
    annotations: dict[str, str]
    layers: tuple[LayerNote, ...]
    diff_ids: tuple[Digest, ...]
    reason: str
    index: Descriptor | None
    index_origin: str
    files: dict[str, int]
    requests: int

    @property
    def lazy(self) -> bool:
        """Whether every layer is loaded on demand."""
        return all(layer.lazy for layer in self.layers)

    @property
    def stored_size(self) -> int:
        """Bytes of all layers as they are stored: what a full pull would transfer."""
        return sum(layer.blob.size for layer in self.layers)

    @property
    def size(self) -> int | None:
        """Bytes of all layers uncompressed; None when only an index would tell."""
        sizes = [layer.size for layer in self.layers if layer.size is not None]
        return sum(sizes) if len(sizes) == len(self.layers) else None

    def to_json(self) -> dict[str, object]:
        """As ``veneer inspect --json`` shows it."""
        config = self.config
        return {
            "image": self.name,
            "digest": str(self.digest),
            "media_type": self.media_type,
            "platform": str(config.platform),
            "lazy": self.lazy,
            "reason": self.reason,
            "stored_size": self.stored_size,
            "size": self.size,
            "index": self.index.to_json() if self.index else None,
            "index_origin": self.index_origin or None,
            "files": self.files,
            "layers": [
                _layer_json(layer, diff_id) for layer, diff_id in zip(self.layers, self.diff_ids, strict=True)
            ],
            "config": {
                "entrypoint": list(config.entrypoint),
                "cmd": list(config.cmd),
                "env": list(config.env),
                "working_dir": config.working_dir,
                "user": config.user,
                "labels": dict(config.labels),
                "exposed_ports": list(config.exposed_ports),
                "volumes": list(config.volumes),
                "stop_signal": config.stop_signal,
            },
            "annotations": self.annotations,
            "requests": self.requests,
        }


def _layer_json(layer: LayerNote, diff_id: Digest) -> dict[str, object]:
    return {
        "digest": str(layer.blob.digest),
        "diff_id": str(diff_id),
        "media_type": layer.blob.media_type,
        "stored_size": layer.blob.size,
        "size": layer.size,
        "lazy": layer.lazy,
        "reason": layer.reason,
        "format": layer.format or None,
        "spans": layer.spans,
        "codecs": list(layer.codecs),
        "index_size": layer.index_size,
    }


async def inspect_image(text: str, settings: Settings, *, report: Reporter = silent) -> ImageSummary:
    """Find out about the image that ``text`` names. An image without an index is no error here."""
    async with resolve_image(text, settings) as (resolved, stats):
        try:
            image = await load_image(resolved, settings, stats, report)
            files = _counts(await image.load())
        except UnsupportedFormat as error:
            config = await load_config(resolved)
            layers = tuple(_full_pull(layer) for layer in resolved.manifest.layers)
            return _summary(resolved, config, layers, error.message, None, {}, stats.requests)
        reason = f"{image.layers[0].reason}" if image.layers else "it has no layers"
        return _summary(resolved, image.config, image.layers, reason, image, files, stats.requests)


def _full_pull(layer: Descriptor) -> LayerNote:
    compression = LAYER_COMPRESSION[layer.media_type]
    reason = f"no index says where its files are ({compression} stream)"
    return LayerNote(layer, "", 0, (), None, 0, reason)


def _summary(
    resolved: ResolvedImage,
    config: ImageConfig,
    layers: tuple[LayerNote, ...],
    reason: str,
    image: Image | None,
    files: dict[str, int],
    requests: int,
) -> ImageSummary:
    manifest = resolved.manifest
    return ImageSummary(
        name=resolved.name,
        digest=manifest.digest,
        media_type=manifest.media_type,
        config=config,
        annotations=dict(manifest.annotations),
        layers=layers,
        diff_ids=config.diff_ids,
        reason=reason,
        index=image.index_descriptor if image else None,
        index_origin=image.index_origin if image else "",
        files=files,
        requests=requests,
    )


def _counts(index: ImageIndex) -> dict[str, int]:
    """Names in the merged tree, by kind."""
    counts = {"files": 0, "directories": 0, "symlinks": 0, "others": 0}
    for _, node in index.walk():
        mode = index.mode[node]
        if stat.S_ISREG(mode):
            counts["files"] += 1
        elif stat.S_ISDIR(mode):
            counts["directories"] += 1
        elif stat.S_ISLNK(mode):
            counts["symlinks"] += 1
        else:
            counts["others"] += 1
    return counts
