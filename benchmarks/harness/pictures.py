"""How our pictures look."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import matplotlib

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
