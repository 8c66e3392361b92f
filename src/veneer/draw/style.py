"""Looks of drawings: one style sheet with a light and a dark scheme. Class names are what drawings use.

Series colours are told apart by readers who see colours differently (after Okabe and Ito), and are spread over
lightness so that they survive a grey print.
"""

__all__ = ["SERIES", "STYLE"]

#: How many series have a look of their own: ``s0``, ``s1`` and so on.
SERIES = 10

_LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "soft": "#5b6470",
    "grid": "#e3e6ea",
    "axis": "#9aa3ad",
    "queue": "#c9ced6",
    "wait": "#e0a458",
    "transfer": "#2f7fd1",
    "verify": "#2f9e6e",
    "cli": "#7a6cc4",
    "daemon": "#4d93a8",
    "mark": "#c4453c",
    "limit": "#c4453c",
    "waste": "#e0a458",
    "need": "#2f9e6e",
    "demand": "#c4453c",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#009e73",
    "s3": "#a0509a",
    "s4": "#b58900",
    "s5": "#3aa6dd",
    "s6": "#7f4f24",
    "s7": "#5b6470",
    "s8": "#d81b60",
    "s9": "#33691e",
}
_DARK = {
    "paper": "#14171b",
    "panel": "#1b2026",
    "ink": "#e6e9ed",
    "soft": "#9aa4af",
    "grid": "#2a3038",
    "axis": "#5e6873",
    "queue": "#4a525c",
    "wait": "#d9a05b",
    "transfer": "#58a6f0",
    "verify": "#4cc38a",
    "cli": "#9d8ff0",
    "daemon": "#6fb6cc",
    "mark": "#ff7b72",
    "limit": "#ff7b72",
    "waste": "#d9a05b",
    "need": "#4cc38a",
    "demand": "#ff7b72",
    "s0": "#58a6f0",
    "s1": "#ff9a4d",
    "s2": "#3fcf9b",
    "s3": "#d68fd0",
    "s4": "#e3c04a",
    "s5": "#8fd3f7",
    "s6": "#c79a6b",
    "s7": "#9aa4af",
    "s8": "#ff6fa3",
    "s9": "#9ccc65",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_FILLED = ("queue", "wait", "transfer", "verify", "cli", "daemon", "waste", "need", "demand")
_RULES = [
    f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}",
    f"@media (prefers-color-scheme: dark){{:root{{{_variables(_DARK)}}}}}",
    '.drawing{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}',
    ".drawing{font-variant-numeric:tabular-nums}",
    ".drawing text{fill:var(--ink);font-size:12px}",
    ".drawing .head{font-size:17px;font-weight:600}",
    ".drawing .sub,.drawing .tick,.drawing .note{fill:var(--soft)}",
    ".drawing .tick,.drawing .note,.drawing .small{font-size:11px}",
    ".drawing .tiny{font-size:9.5px;fill:var(--soft)}",
    ".drawing .section{font-size:11px;font-weight:600;fill:var(--soft);letter-spacing:.06em}",
    ".drawing .markname{font-size:11px;font-weight:600;fill:var(--mark)}",
    ".drawing .mono{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:11px}",
    ".drawing .paper{fill:var(--paper)}",
    ".drawing .panel{fill:var(--panel)}",
    ".drawing .grid{stroke:var(--grid);stroke-width:1;fill:none}",
    ".drawing .axis{stroke:var(--axis);stroke-width:1;fill:none}",
    ".drawing .mark{stroke:var(--mark);stroke-width:1.25;fill:none}",
    ".drawing .limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:5 4;fill:none}",
    ".drawing .whisker{stroke-width:1.5;fill:none;stroke:var(--ink);opacity:.75}",
    ".drawing .failed{stroke:var(--mark);stroke-width:1.5;fill:none}",
    ".drawing .limitname{fill:var(--limit);font-size:11px}",
    ".drawing .waiting{fill:var(--demand);opacity:.55}",
    *(f".drawing .{name}{{fill:var(--{name})}}" for name in _FILLED),
    ".drawing .wash{opacity:.25}",
    *(f".drawing .l{n}{{stroke:var(--s{n});fill:none;stroke-width:1.75}}" for n in range(SERIES)),
    *(f".drawing .s{n}{{fill:var(--s{n})}}" for n in range(SERIES)),
    ".drawing .title{font-size:13px;font-weight:600}",
    ".drawing .aim{stroke:var(--ink);stroke-width:2.5;fill:none}",
    *(f".drawing .heat{n}{{fill:var(--demand);opacity:{0.25 * n:g}}}" for n in range(1, 5)),
    ".drawing .dash{stroke-dasharray:6 4}",
    ".drawing .dot{stroke-dasharray:1.5 3}",
]
STYLE = "".join(_RULES)
