"""What the examples share: tuning, tables, colours."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

# Colours of Okabe and Ito, which colour-blind readers can tell apart; the same in every figure.
STYLES = {
    "SGD": {"color": "#E69F00", "linestyle": (0, (1, 1))},
    "Adam": {"color": "#0072B2", "linestyle": "-"},
    "Adam, cosine decay": {"color": "#56B4E9", "linestyle": (0, (5, 1.5))},
    "Adam then SGD": {"color": "#009E73", "linestyle": "-."},
    "L-BFGS alone": {"color": "#000000", "linestyle": (0, (5, 1.5))},
    # Wider and below the others, with which it shares the first phase.
    "FusePV": {"color": "#D55E00", "linestyle": "-", "linewidth": 3, "zorder": 1.9},
}
SWITCH_MARK = {
    "color": STYLES["FusePV"]["color"],
    "linestyle": "none",
    "marker": "o",
    "markersize": 8,
    "markeredgecolor": "black",
    "zorder": 5,
    "label": "FusePV's switch to L-BFGS",
}


class Relay:
    """One optimizer for ``switch`` steps, then another on the same parameters."""

    def __init__(
        self, first: torch.optim.Optimizer, second: torch.optim.Optimizer, switch: int
    ) -> None:
        self.first, self.second, self.left = first, second, switch

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """A step of the optimizer whose turn it is."""
        optimizer = self.first if self.left > 0 else self.second
        self.left -= 1
        return optimizer.step(closure)


def best(grid: Sequence[float], train: Callable[[float], Any]) -> tuple[float, Any]:
    """The learning rate whose run has the least final loss (the first of equals), and the run."""
    runs = {lr: train(lr) for lr in grid}
    # Rounded, so that what the last bits say does not decide; NaN is the worst.
    finals = {lr: round(run.losses[-1], 9) for lr, run in runs.items()}
    lr = min(grid, key=lambda lr: finals[lr] if math.isfinite(finals[lr]) else math.inf)
    return lr, runs[lr]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Aligned columns, in Markdown; the first ``names`` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * w if i < names else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i < names else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (header, rule, *rows)))


def arguments(description: str) -> argparse.Namespace:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few seconds, smaller everything")
    default = Path(__file__).parent / "out"
    parser.add_argument("--out", type=Path, default=default, help="folder for the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # Problems this small are no faster on several threads.
    torch.set_num_threads(1)
    return args


def save(figure: plt.Figure, path: Path) -> None:
    """Writes the picture and says where."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nPicture: {path}")
