"""Counts with what chance does to them, and sentences made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a probability."""
    z, share = 1.959964, hits / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def sign_test(wins: int, losses: int) -> float:
    """Probability of a split at least this uneven if either side were as likely (two-sided).

    On pairs of yes and no that differ it is McNemar's exact test.
    """
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1)) / 2**trials
    return min(1.0, 2 * tail)


def split(ours: Sequence[float], theirs: Sequence[float], margin: float) -> dict[str, Any]:
    """From how many starts ours is lower, the same within ``margin``, or higher; and p."""
    pairs = list(zip(ours, theirs, strict=True))
    lower = sum(a < b - margin for a, b in pairs)
    higher = sum(a > b + margin for a, b in pairs)
    same = len(pairs) - lower - higher
    return {"lower": lower, "same": same, "higher": higher, "p": sign_test(lower, higher)}


def verdict(found: dict[str, Any], level: float = 0.05) -> int:
    """1 if ours is lower more often than chance allows, -1 if it is higher, 0 for neither."""
    if found["p"] >= level:
        return 0
    return 1 if found["lower"] > found["higher"] else -1


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def short(value: Any, digits: int = 5) -> Any:
    """Floats in so many significant digits, everywhere in lists and dicts."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: short(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(entry, digits) for entry in value]
    return value
