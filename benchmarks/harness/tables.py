"""Numbers for people to read, and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, never in scientific notation for common sizes."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{round(value, places):.{max(places, 0)}f}"
    return f"{value:.{digits - 1}e}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The factor and name of a unit that suits a time."""
    return (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def count(value: float) -> str:
    """A power of ten where it is one: 2e7 reads better than 20000000."""
    if value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column reads from the left, the others from the right."""
    rule = [":--", *["--:"] * (len(headers) - 1)]
    lines = [headers, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
