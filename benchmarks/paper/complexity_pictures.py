"""The picture of Table I."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import pictures
from benchmarks.paper import complexity_runs as runs
from benchmarks.paper.landscape_pictures import COLORS

LINES = {"constant": "-", "shrinking": (0, (2.5, 1.2))}
WHOLE = "FUSE, then all images"
MARKERS = {"SGD": "s", "Adam": "^", "L-BFGS": "D", "FUSE": "o", WHOLE: "o"}


def draw(
    found: dict[str, dict[str, Any]], hoods: dict[str, list[list[float]]], titles: dict[str, str]
) -> Figure:
    """Evaluations against epsilon in each setting, and where constant steps end."""
    with pictures.style():
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
        for ax, setting, letter in zip(axes[0], runs.WIDTHS, "ab", strict=True):
            for method, entry in found[setting].items():
                _counts(ax, method, entry["reached"], "-", method)
            _guides(ax, found[setting])
            _finish(ax, f"({letter}) {titles[setting]}")
        batches = axes[1, 0]
        for setting, line in LINES.items():
            for method, entry in found[setting].items():
                label = method if setting == "constant" else ""
                _counts(batches, method, entry["reached"], line, label)
        batches.plot([], [], color="#666666", linestyle=LINES["shrinking"], label="shrinking steps")
        _guides(batches, found["constant"])
        _finish(batches, "(c) strongly convex, batches")
        batches.set_ylabel("evaluations on a batch")
        _levels(axes[1, 1], hoods)
    return figure


def _counts(ax: Axes, method: str, reached: list[float | None], line: Any, label: str) -> None:
    points = [(e, k) for e, k in zip(runs.EPSILONS, reached, strict=True) if k is not None]
    if not points:
        return
    ax.plot(
        *zip(*points, strict=True),
        linestyle=line,
        color=COLORS.get(method, "#CC79A7"),
        marker=MARKERS[method],
        markevery=4,
        markersize=4.5,
        label=label,
        # Wider and below the others: it shares Adam's line up to the switch.
        linewidth=3.0 if method == "FUSE" else 1.6,
        zorder=2 if method == "FUSE" else 2.5,
    )


def _guides(ax: Axes, methods: dict[str, Any]) -> None:
    """Both laws of Table I, through the first point of SGD and of FUSE."""
    epsilon = np.geomspace(runs.EPSILONS[0], runs.EPSILONS[-1], 200)
    laws = {
        "SGD": (epsilon**-2 * runs.EPSILONS[0] ** 2, "slope of 1/ε²", (0, (1, 1.5))),
        "FUSE": (np.log(epsilon) / np.log(runs.EPSILONS[0]), "slope of log 1/ε", (0, (5, 2))),
    }
    for method, (law, label, line) in laws.items():
        first = methods[method]["reached"][0]
        if first is not None:
            ax.plot(
                epsilon,
                first * law,
                color="#999999",
                linestyle=line,
                linewidth=1.3,
                label=label,
                zorder=1.5,
            )


def _finish(ax: Axes, title: str) -> None:
    counts = [y for line in ax.lines if line.get_zorder() >= 2 for y in line.get_ydata()]
    if counts:
        ax.set_ylim(min(counts) / 2, 3 * max(counts))
    ax.set(xscale="log", yscale="log", title=title, xlabel="norm of the gradient, ε")
    ax.set(ylabel="gradient evaluations", xlim=(1.6 * runs.EPSILONS[0], runs.EPSILONS[-1] / 1.6))
    ax.legend(fontsize=7.5, loc="lower right")


def _levels(ax: Axes, hoods: dict[str, list[list[float]]]) -> None:
    """Where runs on batches end, by their constant step."""
    for method, points in hoods.items():
        steps, levels = zip(*points, strict=True)
        ax.plot(
            steps,
            levels,
            color=COLORS[method],
            marker=MARKERS[method],
            markersize=4.5,
            label=f"{method}'s L-BFGS" if method == "FUSE" else method,
        )
    ax.set(
        xscale="log",
        yscale="log",
        title="(d) batches: the neighbourhood of constant steps",
        xlabel="step (learning rate)",
        ylabel="norm of the whole gradient, last tenth",
    )
    finite = [level for points in hoods.values() for _, level in points if np.isfinite(level)]
    ax.set_ylim(min(finite) / 2, min(30.0, 2 * max(finite)))
    ax.legend(fontsize=7.5)
