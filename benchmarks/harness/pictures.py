"""How our pictures look."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, which survive colour blindness; ours are the warm ones.
COLORS = {
    "ours": "#d55e00",
    "ours bf16": "#e69f00",
    "ours int8": "#cc79a7",
    "torch": "#0072b2",
    "torch alone": "#56b4e9",
    "other": "#009e73",
    "grey": "#666666",
}


@contextmanager
def style() -> Any:
    """How our pictures look."""
    with plt.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e5e5e5",
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
        }
    ):
        yield


def performance_profile(
    panel: Any, counts: dict[str, list[float]], looks: dict[str, tuple[str, str]]
) -> None:
    """Shares of the problems that each solver solves at so many times the best one's cost.

    Dolan and Moré, Mathematical Programming 91, 2002.

    Args:
        panel: Where to draw.
        counts: By solver, of each problem; inf where it failed.
        looks: Colour and line style of each solver.
    """
    best = [min(column) for column in zip(*counts.values(), strict=True)]
    at = np.geomspace(1, 8, 400)
    for name, of in counts.items():
        ratios = np.array(
            [a / b if b < math.inf else math.inf for a, b in zip(of, best, strict=True)]
        )
        color, line = looks[name]
        panel.plot(at, (ratios[:, None] <= at).mean(0), line, color=color, label=name)
    panel.set(xscale="log", xlabel="evaluations, over those of the best solver", ylim=(0, 1))
    panel.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    panel.minorticks_off()
