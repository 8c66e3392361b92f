"""Drawings as SVG, made of scales, axes and marks. Pure: values in, text out."""

from veneer.draw.svg import Drawing, escape

__all__ = ["Drawing", "escape"]
