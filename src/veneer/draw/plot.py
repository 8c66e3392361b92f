"""Axes, grid and legend around points: what all plots with two numeric axes share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.draw.scale import Scale, number_text
from veneer.draw.style import SERIES
from veneer.draw.svg import Drawing

__all__ = ["Axis", "Plot"]

_LEFT, _RIGHT, _BOTTOM = 64.0, 18.0, 46.0
_LEGEND_ROW = 18.0
_LETTER = 6.6


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Args:
        title: what is on it, with its unit.
        low: where it begins.
        high: where it ends.
        log: whether it is logarithmic.
        text: how a value is written.
    """

    title: str
    low: float
    high: float
    log: bool = False
    text: Callable[[float], str] = number_text


class Plot:
    """A frame to draw into, in values.

    Args:
        title: above it.
        x: the horizontal axis.
        y: the vertical axis, upwards.
        legend: names of the series that are drawn, each with the number of its look.
        width: of the drawing.
        height: of the drawing without the legend.
    """

    def __init__(
        self,
        title: str,
        x: Axis,
        y: Axis,
        *,
        legend: Sequence[tuple[str, int]] = (),
        width: float = 560,
        height: float = 300,
    ) -> None:
        self.drawing = Drawing(width, height, title)
        self.drawing.text(0, 15, title, "title")
        top = 34.0 + self._legend(legend, width)
        self.drawing.height = height + top - 34.0
        bottom = self.drawing.height - _BOTTOM
        self.x = Scale(x.low, x.high, _LEFT, width - _RIGHT, x.log)
        self.y = Scale(y.low, y.high, bottom, top, y.log)
        self._axes(x, y)

    def _legend(self, legend: Sequence[tuple[str, int]], width: float) -> float:
        """Names of series, in as many rows as they take; returns their height."""
        x, row = 0.0, 0
        for name, look in legend:
            needs = 24 + _LETTER * len(name) + 14
            if x and x + needs > width:
                x, row = 0.0, row + 1
            y = 30 + row * _LEGEND_ROW
            self.drawing.rect(x, y, 12, 4, f"s{look % SERIES}")
            self.drawing.text(x + 17, y + 6, name, "small")
            x += needs
        return (row + 1) * _LEGEND_ROW if legend else 0.0

    def _axes(self, x: Axis, y: Axis) -> None:
        draw, left, right = self.drawing, self.x.start, self.x.end
        bottom, top = self.y.start, self.y.end
        for tick in self.x.ticks(7):
            draw.grid(self.x(tick), top, self.x(tick), bottom)
            draw.text(self.x(tick), bottom + 15, x.text(tick), "tick", anchor="middle")
        for tick in self.y.ticks(5):
            draw.grid(left, self.y(tick), right, self.y(tick))
            draw.text(left - 7, self.y(tick) + 4, y.text(tick), "tick", anchor="end")
        draw.line(left, bottom, right, bottom, "axis")
        draw.text((left + right) / 2, bottom + 34, x.title, "note", anchor="middle")
        draw.text(11, (top + bottom) / 2, y.title, "note", anchor="middle", turned=True)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixels of a point."""
        return self.x(x), self.y(y)

    def line(self, points: Sequence[tuple[float, float]], look: int, *, style: str = "", tip: str = "") -> None:
        """Points joined by straight lines."""
        self.drawing.path([self.at(*point) for point in points], f"l{look % SERIES} {style}".strip(), tip)

    def dot(self, x: float, y: float, look: int, tip: str = "") -> None:
        """A point."""
        self.drawing.circle(self.x(x), self.y(y), 3.2, f"s{look % SERIES}", tip)

    def whisker(self, x: float, low: float, high: float) -> None:
        """An interval of y at a point of x."""
        self.drawing.line(self.x(x), self.y(low), self.x(x), self.y(high), "whisker")

    def limit(self, points: Sequence[tuple[float, float]], name: str) -> None:
        """A dashed line that is no series, named at its last point."""
        self.drawing.path([self.at(*point) for point in points], "limit")
        x, y = self.at(*points[-1])
        self.drawing.text(x - 4, y - 6, name, "limitname", anchor="end")
