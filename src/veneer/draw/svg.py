"""SVG documents, element by element.

Invariant: whatever the texts are, the result is well-formed XML 1.0 and runs nothing: texts and attribute
values are escaped here and nowhere else, and elements other than those below cannot be written.

Looks come from classes (:mod:`veneer.draw.style`), so that a drawing follows the reader's light or dark scheme,
alone as well as in a page. Texts are text: they can be searched, selected and copied.
"""

import re
from collections.abc import Iterable, Sequence

from veneer.draw.style import STYLE

__all__ = ["Drawing", "escape"]

#: What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


def escape(text: str) -> str:
    """Text for the content of an element or for an attribute in quotes, in XML and HTML."""
    return _FORBIDDEN.sub("\ufffd", text).translate(_ENTITIES)


def number(value: float) -> str:
    """A coordinate: hundredths of a pixel are enough."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


class Drawing:
    """A picture that grows by elements, from back to front. Coordinates are pixels from the top left.

    Args:
        width: of all of it.
        height: of all of it; may be set until it is rendered.
        title: what it shows, for readers who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width = width
        self.height = height
        self._title = title
        self._parts: list[str] = []
        self._behind: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, look: str, tip: str = "", *, round_: float = 0
    ) -> None:
        """A rectangle; ``tip`` shows when the pointer is on it."""
        shape = (
            f'x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" '
            f'height="{number(max(0.0, height))}"'
        )
        corner = f' rx="{number(round_)}"' if round_ else ""
        self._add("rect", f"{shape}{corner}", look, tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str, tip: str = "") -> None:
        """A straight line."""
        self._add("line", _ends(x1, y1, x2, y2), look, tip)

    def grid(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line behind everything."""
        self._behind.append(f'<line {_ends(x1, y1, x2, y2)} class="grid"/>')

    def circle(self, x: float, y: float, radius: float, look: str, tip: str = "") -> None:
        """A dot."""
        self._add("circle", f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"', look, tip)

    def path(self, points: Sequence[tuple[float, float]], look: str, tip: str = "") -> None:
        """A line through points; nothing when there are none."""
        if points:
            steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._add("path", f'd="M{steps}"', look, tip)

    def area(self, points: Sequence[tuple[float, float]], look: str, tip: str = "") -> None:
        """What points surround; nothing when there are none."""
        if points:
            steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._add("path", f'd="M{steps}Z"', look, tip)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        look: str = "label",
        *,
        anchor: str = "start",
        turned: bool = False,
    ) -> None:
        """A line of text with its base line at ``y``.

        ``anchor`` says which end ``x`` is: ``start``, ``middle`` or ``end``. Turned, it is read upwards.
        """
        if anchor not in ("start", "middle", "end"):
            raise ValueError(f"no such anchor: {anchor}")
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        self._parts.append(
            f'<text x="{number(x)}" y="{number(y)}" class="{escape(look)}" text-anchor="{anchor}"{turn}>'
            f"{escape(text)}</text>"
        )

    def render(self, *, standalone: bool = True) -> str:
        """The SVG; standalone with looks of its own, otherwise for a page that has them."""
        size = f"{number(self.width)} {number(self.height)}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" class="drawing" role="img" '
            f'aria-label="{escape(self._title)}"'
        )
        if standalone:
            head += f' width="{number(self.width)}" height="{number(self.height)}"'
        body = [f"{head}>", f"<title>{escape(self._title)}</title>"]
        if standalone:
            body += [
                f"<style>{STYLE}</style>",
                f'<rect width="{number(self.width)}" height="{number(self.height)}" class="paper"/>',
            ]
        return "\n".join([*body, *self._behind, *self._parts, "</svg>\n"])

    def _add(self, element: str, shape: str, look: str, tip: str) -> None:
        start = f'<{element} {shape} class="{escape(look)}"'
        self._parts.append(f"{start}><title>{escape(tip)}</title></{element}>" if tip else f"{start}/>")


def _ends(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'


def joined(parts: Iterable[str]) -> str:
    """Facts in one line, those that are empty left out."""
    return " · ".join(part for part in parts if part)
