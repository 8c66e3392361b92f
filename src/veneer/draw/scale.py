"""From values to pixels, where ticks go, and how numbers are written beside them."""

import math
from dataclasses import dataclass

__all__ = ["Scale", "bytes_text", "ms_text", "number_text"]


@dataclass(frozen=True, slots=True)
class Scale:
    """A line of values.

    Args:
        low: value at ``start``.
        high: value at ``end``; above ``low``, and both above 0 if it is logarithmic.
        start: pixel.
        end: pixel, before or after ``start``.
        log: equal ratios, not equal differences, are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"no scale from {self.low} to {self.high}")

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside lie outside."""
        if self.log:
            # What has no logarithm is less than everything that is shown.
            part = math.log(max(value, self.low / 1e3) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values between ``low`` and ``high``, about as many as wanted."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [round(f * 10.0**n, 12) for n in decades for f in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= count + 2:
            break
    return found


def number_text(value: float) -> str:
    """A number with as many digits as matter: three."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ms_text(ms: float) -> str:
    """A time for people: ``0.42 ms``, ``12.5 ms``, ``1.25 s``."""
    if abs(ms) >= 1000:
        return f"{number_text(ms / 1000)} s"
    return f"{number_text(ms)} ms" if ms else "0"


def bytes_text(size: float) -> str:
    """A size for people: ``999 B``, ``1.5 KiB``, ``80.5 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{number_text(value)} {unit}" if value else "0"
