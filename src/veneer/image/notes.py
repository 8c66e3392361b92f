"""What is said of an image's layers: what covers them, and why they are loaded lazily."""

from veneer.formats.base import IndexLocation, LayerFormat, OpenedIndex
from veneer.image.image import LayerNote
from veneer.oci.manifest import Manifest

__all__ = ["layer_notes"]


def layer_notes(
    layer_format: LayerFormat, manifest: Manifest, location: IndexLocation, opened: OpenedIndex
) -> tuple[LayerNote, ...]:
    """A note for each layer, lowest first."""
    reason = {
        "annotation": "the manifest names an index that covers it",
        "referrer": "an index that covers it refers to the manifest",
        "local": "this host has indexed it before",
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
