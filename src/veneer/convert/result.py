"""What a conversion did, for people and programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest

__all__ = ["ConvertResult", "ConvertedImage", "ConvertedLayer", "ConvertedPack"]


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """One layer before and after.

    Args:
        source: descriptor of the blob that was read.
        blob: descriptor of the blob that stands for it now.
        size: uncompressed, in bytes.
        spans: how many ranges it can be fetched in.
        reused: an earlier, interrupted conversion had already done the work.
    """

    source: Descriptor
    blob: Descriptor
    size: int
    spans: int
    reused: bool

    def to_json(self) -> dict[str, object]:
        """As ``veneer convert --json`` shows it."""
        return {
            "source": self.source.to_json(),
            "blob": self.blob.to_json(),
            "size": self.size,
            "spans": self.spans,
            "reused": self.reused,
        }


@dataclass(frozen=True, slots=True)
class ConvertedPack:
    """A pack of the result: ``size`` plain bytes, stored in ``stored_size``.

    ``static`` says that nothing was run for it.
    """

    workload: str
    size: int
    stored_size: int
    static: bool = False


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """The image of one platform.

    Args:
        manifest: digest of the new manifest.
        index: descriptor of the index blob.
        dropped: metadata that the index does not hold -> how many. The layers hold all of it.
        copied: it was lazily loadable already and has been copied as it was.
        packs: what it has for starts.
    """

    platform: Platform
    source: Digest
    manifest: Digest
    index: Descriptor
    layers: tuple[ConvertedLayer, ...]
    dropped: Mapping[str, int]
    copied: bool
    packs: tuple[ConvertedPack, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As ``veneer convert --json`` shows it."""
        return {
            "platform": str(self.platform),
            "source": str(self.source),
            "manifest": str(self.manifest),
            "index": self.index.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "dropped": dict(self.dropped),
            "copied": self.copied,
            "packs": [asdict(pack) for pack in self.packs],
        }


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """Everything that one conversion made.

    Args:
        destination: reference of the result, with its digest.
        manifest: digest of what the destination's tag names: a manifest, or an index of several.
        images: one for each platform.
        seconds: how long it took.
    """

    destination: str
    manifest: Digest
    images: tuple[ConvertedImage, ...]
    seconds: float

    @property
    def size_before(self) -> int:
        """Stored bytes of all source layers."""
        return sum(layer.source.size for image in self.images for layer in image.layers)

    @property
    def size_after(self) -> int:
        """Stored bytes of all new layers."""
        return sum(layer.blob.size for image in self.images for layer in image.layers)

    def to_json(self) -> dict[str, object]:
        """As ``veneer convert --json`` shows it."""
        return {
            "destination": self.destination,
            "digest": str(self.manifest),
            "size_before": self.size_before,
            "size_after": self.size_after,
            "seconds": round(self.seconds, 3),
            "images": [image.to_json() for image in self.images],
        }
