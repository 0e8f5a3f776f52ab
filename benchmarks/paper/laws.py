"""Which law the number of evaluations follows as epsilon falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEAST = 4  # points for a fit
# K = c + a g(epsilon); the power is a law of its own, K = a epsilon^-p.
LAWS: dict[str, Callable[[float], float]] = {
    "1/ε²": lambda epsilon: epsilon**-2,
    "log 1/ε": lambda epsilon: math.log(1 / epsilon),
    "log log 1/ε": lambda epsilon: math.log(math.log(1 / epsilon)),
}
POWER = "power"


def fits(epsilons: Sequence[float], counts: Sequence[float | None]) -> dict[str, Any]:
    """All laws with two free numbers each, by least squares of the relative error.

    Args:
        epsilons: All below 1.
        counts: Evaluations until then, or None where there were none.

    Returns:
        misfit: Root mean square of (fit - K) / K, by law. exponent: p of the power. best: The law
        of least misfit. All None (misfit: empty) with fewer than ``LEAST`` points that differ.
    """
    points = [(e, float(k)) for e, k in zip(epsilons, counts, strict=True) if k is not None]
    if len({k for _, k in points}) < LEAST:
        return {"misfit": {}, "exponent": None, "best": None, "points": len(points)}
    epsilon, k = (np.array(column) for column in zip(*points, strict=True))
    misfit = {}
    for name, law in LAWS.items():
        basis = np.array([[1.0, law(e)] for e in epsilon]) / k[:, None]
        solution = np.linalg.lstsq(basis, np.ones(len(k)), rcond=None)[0]
        misfit[name] = _rms(basis @ solution - 1)
    slope, offset = np.polyfit(-np.log(epsilon), np.log(k), 1)
    misfit[POWER] = _rms(np.exp(offset - slope * np.log(epsilon)) / k - 1)
    best = min(misfit, key=lambda name: misfit[name])
    return {"misfit": misfit, "exponent": float(slope), "best": best, "points": len(points)}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
