"""An image opened for reading: what a reference names, checked, with its index and its sources."""

from veneer.image.image import Image, LayerNote
from veneer.image.open import open_image, open_repository

__all__ = ["Image", "LayerNote", "open_image", "open_repository"]
