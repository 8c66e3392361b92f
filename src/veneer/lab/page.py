"""One HTML page without anything outside of it: no scripts, no fonts, no images but drawings in place.

Invariant: every text is escaped here, so that nothing in a result can become markup. The page is well-formed
XML but for its first line, which is also what makes that easy to check.
"""

from collections.abc import Sequence

from veneer.draw.style import STYLE
from veneer.draw.svg import Drawing, escape

__all__ = ["Cell", "Page"]

_PAGE_STYLE = "".join(
    (
        "*{box-sizing:border-box}",
        "html{background:var(--paper);color:var(--ink);scroll-behavior:smooth}",
        'body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:0 auto;',
        "max-width:1240px;padding:28px 24px 80px}",
        "h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}",
        "h2{font-size:20px;margin:52px 0 4px;padding-top:18px;border-top:1px solid var(--grid)}",
        "h3{font-size:15px;margin:26px 0 6px}",
        "p{margin:6px 0 12px;max-width:78ch}",
        ".lead,figcaption,.facts dt,th small{color:var(--soft)}",
        "nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:18px 0 0;font-size:14px}",
        "a{color:var(--s0);text-decoration:none}a:hover{text-decoration:underline}",
        ".facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:10px 26px;",
        "margin:20px 0 0}",
        ".facts div{min-width:0}.facts dt{font-size:12px}.facts dd{margin:0;overflow-wrap:anywhere}",
        "figure{margin:0;background:var(--panel);border:1px solid var(--grid);border-radius:8px;",
        "padding:16px 16px 12px;min-width:0}",
        "figure svg{display:block;width:100%;height:auto}",
        "figcaption{font-size:12.5px;line-height:1.45;margin-top:8px}",
        ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr));gap:16px;",
        "margin:14px 0}",
        ".wide{margin:14px 0;overflow-x:auto}.wide svg{min-width:880px}",
        "code,pre{font:12px/1.5 ui-monospace,Menlo,Consolas,monospace}",
        "pre{background:var(--panel);border:1px solid var(--grid);border-radius:6px;padding:8px 10px;",
        "margin:6px 0;white-space:pre-wrap;overflow-wrap:anywhere;user-select:all}",
        ".scroll{overflow-x:auto;margin:12px 0}",
        "table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%}",
        "th{font-weight:600;text-align:left;border-bottom:1.5px solid var(--axis);white-space:nowrap}",
        "td,th{padding:5px 12px 5px 0;vertical-align:baseline}",
        "td{border-bottom:1px solid var(--grid)}",
        ".n{text-align:right}tr.new td{border-top:1.5px solid var(--axis)}",
        ".met{color:var(--need);font-weight:600}.missed{color:var(--mark);font-weight:600}",
        "details{margin:10px 0}summary{cursor:pointer;font-size:14px}",
        "details.start{border:1px solid var(--grid);border-radius:8px;padding:10px 14px;margin:12px 0}",
        "details.start>summary{font-weight:600}",
        "figcaption details{margin:2px 0 0}figcaption summary{font-size:12.5px}",
        ".swatch{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:7px;",
        "vertical-align:-1px}",
        *(f".swatch.s{n}{{background:var(--s{n})}}" for n in range(10)),
        "@media print{body{max-width:none}figure{break-inside:avoid}}",
    )
)


class Page:
    """A page that grows from top to bottom.

    Args:
        title: its heading.
        lead: a sentence below that.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._lead = lead
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._head: list[str] = []
        self._open = 0

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Names and values, above the first section."""
        rows = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value
        )
        self._head.append(f'<dl class="facts">{rows}</dl>')

    def section(self, name: str, title: str, lead: str = "") -> None:
        """Begin a section, which the contents lead to."""
        self._contents.append((name, title))
        self._parts.append(f'<h2 id="{escape(name)}">{escape(title)}</h2>')
        if lead:
            self.paragraph(lead)

    def heading(self, text: str) -> None:
        """A heading in a section."""
        self._parts.append(f"<h3>{escape(text)}</h3>")

    def paragraph(self, text: str) -> None:
        """Text."""
        self._parts.append(f'<p class="lead">{escape(text)}</p>')

    def commands(self, *commands: str) -> None:
        """Command lines to copy."""
        self._parts += [f"<pre>{escape(command)}</pre>" for command in commands]

    def begin(self, kind: str, summary: str = "", *, shown: bool = False) -> None:
        """Begin a ``grid`` of figures, or a ``start``, which is folded away unless ``shown``."""
        self._open += 1
        if kind == "grid":
            self._parts.append('<div class="grid">')
        elif kind == "start":
            state = ' open="open"' if shown else ""
            self._parts.append(f'<details class="start"{state}><summary>{escape(summary)}</summary>')
        else:
            raise ValueError(f"no such part: {kind}")

    def end(self, kind: str) -> None:
        """End what was begun."""
        self._open -= 1
        self._parts.append("</div>" if kind == "grid" else "</details>")

    def figure(self, drawing: Drawing, caption: str = "", repeat: str = "", *, wide: bool = False) -> None:
        """A drawing with what it says, and the command that makes it again."""
        again = f"<details><summary>repeat</summary><pre>{escape(repeat)}</pre></details>" if repeat else ""
        below = f"<figcaption>{escape(caption)}{again}</figcaption>" if caption or again else ""
        look = ' class="wide"' if wide else ""
        self._parts.append(f"<figure{look}>{drawing.render(standalone=False)}{below}</figure>")

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1, fold: str = ""
    ) -> None:
        """A table.

        Args:
            head: names of the columns.
            rows: cells: text, a :class:`Cell`, or None for what is not known. A row that begins with another
                first cell than the one before begins a group.
            words: how many columns on the left are words; the others are numbers.
            fold: fold it away behind this text.
        """

        def look(column: int) -> str:
            return "" if column < words else ' class="n"'

        heads = "".join(f"<th{look(n)}>{escape(name)}</th>" for n, name in enumerate(head))
        body: list[str] = []
        before: object = None
        for row in rows:
            first = row[0]
            new = ' class="new"' if body and first != before else ""
            before = first
            cells = "".join(f"<td{look(n)}>{_cell(value)}</td>" for n, value in enumerate(row))
            body.append(f"<tr{new}>{cells}</tr>")
        table = (
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'
            "</table></div>"
        )
        if fold:
            table = f"<details><summary>{escape(fold)}</summary>{table}</details>"
        self._parts.append(table)

    def render(self) -> str:
        """The page."""
        if self._open:
            raise ValueError("something was begun and not ended")
        links = "".join(f'<a href="#{escape(name)}">{escape(title)}</a>' for name, title in self._contents)
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8"/>',
                '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
                f"<title>{escape(self._title)}</title><style>{STYLE}{_PAGE_STYLE}</style></head><body>",
                f'<header><h1>{escape(self._title)}</h1><p class="lead">{escape(self._lead)}</p>',
                *self._head,
                f"<nav>{links}</nav></header>",
                *self._parts,
                "</body></html>\n",
            ]
        )


class Cell:
    """A cell that is more than text.

    Args:
        text: in it.
        look: ``met``, ``missed``, or a series (``s0``), whose colour is then in front.
    """

    def __init__(self, text: str, look: str = "") -> None:
        self.text = text
        self.look = look

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and (self.text, self.look) == (other.text, other.look)

    def __hash__(self) -> int:
        return hash((self.text, self.look))


def _cell(value: object) -> str:
    if isinstance(value, Cell):
        if value.look in ("met", "missed"):
            return f'<span class="{value.look}">{escape(value.text)}</span>'
        swatch = f'<span class="swatch {escape(value.look)}"></span>' if value.look else ""
        return f"{swatch}{escape(value.text)}"
    return "–" if value is None else escape(str(value))
