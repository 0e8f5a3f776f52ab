"""The pictures of Fig. 1-4."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from benchmarks.harness import pictures
from benchmarks.paper.landscape_runs import PROBLEMS

COLORS = {
    "SGD": "#E69F00",
    "Adam": "#0072B2",
    "Adam+SGD": "#009E73",
    "FUSE": "#D55E00",
    "L-BFGS": "#000000",
}
LINES = {"printed": (0, (2.5, 1.2)), "tuned": "-", "": (0, (1, 1.2))}
SMALLEST = 1e-16  # what the loss curves call zero
MANY_MINIMA = ("Rastrigin", "Ackley")
Found = dict[tuple[str, str], dict[str, Any]]


def draw(
    function: str, found: Found, alone: dict[str, Any], lrs: dict[Any, Any], starts: int
) -> Figure:
    """Paths, the loss from one start, the share in a global minimum, and the rate."""
    everyone = {**found, ("L-BFGS", ""): alone}
    with pictures.style():
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.6), layout="constrained")
        paths(axes[0, 0], function, everyone)
        curves(axes[0, 1], everyone)
        (ends if function in MANY_MINIMA else shares)(axes[1, 0], everyone, starts)
        rates(axes[1, 1], everyone)
        figure.suptitle(f"{function}, two variables", x=0.01, ha="left", weight="bold", size=12)
        handles = [
            Line2D(
                [],
                [],
                color=COLORS[method],
                linestyle=LINES[kind],
                label=_label(method, kind, lrs.get((method, kind))),
            )
            for method, kind in everyone
        ]
        marks = {"markeredgecolor": "black", "linestyle": "none"}
        switch = Line2D([], [], color=COLORS["FUSE"], marker="o", label="FUSE's switch", **marks)
        figure.legend(
            handles=[*handles, switch], loc="outside lower center", ncols=4, columnspacing=1.6
        )
    return figure


def _label(method: str, kind: str, lrs: list[float] | None) -> str:
    if not lrs:
        return method
    return f"{method}, {kind} ({', '.join(f'{lr:g}' for lr in lrs)})"


def _style(method: str, kind: str) -> dict[str, Any]:
    ours = method == "FUSE"
    return {
        "color": COLORS[method],
        "linestyle": LINES[kind],
        # Wider and below the others: it shares Adam's path up to the switch.
        "linewidth": 3.2 if ours else 1.4,
        "zorder": 2.2 if ours else 2.5,
    }


def paths(ax: Axes, function: str, everyone: Found) -> None:
    """From the first of the starts, over the landscape."""
    problem = PROBLEMS[function]
    left, right, bottom, top = problem.window
    x, y = np.meshgrid(np.linspace(left, right, 400), np.linspace(bottom, top, 400))
    f = np.log1p(problem.f(torch.from_numpy(x), torch.from_numpy(y)).numpy())
    ax.contourf(x, y, f, levels=18, cmap="Greys_r", alpha=0.45)
    for (method, kind), result in everyone.items():
        points = np.array(result["first"]["points"])
        ax.plot(*points.T, **_style(method, kind))
        ax.plot(*points[-1], "o", color=COLORS[method], markersize=4, zorder=4)
        if method == "FUSE":
            at = points[result["first"]["switch"]]
            ax.plot(*at, "o", color=COLORS[method], markeredgecolor="black", zorder=5)
    start = np.array(everyone["SGD", "printed"]["first"]["points"][0])
    ax.plot(*start, "ks", markersize=6, zorder=6)
    ax.plot(*zip(*problem.minima, strict=True), "*", color="black", markersize=11, zorder=6)
    ax.annotate(
        "start",
        start,
        xytext=(7, -4),
        textcoords="offset points",
        weight="bold",
        zorder=6,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
    ax.grid(False)
    ax.set(title="(a) paths from the first start; ★ global minima", aspect="equal")
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")


def curves(ax: Axes, everyone: Found) -> None:
    """The loss from the first of the starts."""
    top = 10 * everyone["SGD", "printed"]["first"]["losses"][0]
    lowest = min(min(result["first"]["losses"]) for result in everyone.values())
    for (method, kind), result in everyone.items():
        first = result["first"]
        losses = np.clip(np.nan_to_num(first["losses"], nan=top), SMALLEST, top)
        ax.plot(np.array(first["calls"]) + 1, losses, **_style(method, kind))
        if method == "FUSE":
            at = first["switch"]
            ax.plot(
                first["calls"][at] + 1,
                losses[at],
                "o",
                color=COLORS[method],
                markeredgecolor="black",
                zorder=5,
            )
    ax.set(
        title="(b) loss from the first start",
        xlabel="1 + gradient evaluations",
        ylabel="f",
        xscale="log",
        yscale="log",
        ylim=(max(SMALLEST, lowest) / 3, top / 3),
    )


def shares(ax: Axes, everyone: Found, starts: int) -> None:
    """How many runs are in a global minimum."""
    for (method, kind), result in everyone.items():
        at = np.array(result["moments"])
        ax.plot(at + 1, 100 * np.array(result["near_share"]), **_style(method, kind))
    ax.set(
        title=f"(c) of {starts} starts, in a global minimum",
        xlabel="1 + gradient evaluations",
        ylabel="%",
        xscale="log",
        ylim=(-2, 102),
    )


def ends(ax: Axes, everyone: Found, starts: int) -> None:
    """How many runs end as low as that."""
    least, most = 1e-2, 60.0
    for (method, kind), result in everyone.items():
        losses = np.sort(np.clip(result["losses"], least, 1e300))
        shares = 100 * np.arange(1, len(losses) + 1) / len(losses)
        ax.step([least, *losses], [0, *shares], where="post", **_style(method, kind))
    ax.set(
        title=f"(c) of {starts} starts, end with at most f",
        xlabel=f"f (what is less than {least:g} at the left edge)",
        ylabel="%",
        xscale="log",
        xlim=(least, most),
        ylim=(-2, 102),
    )


def rates(ax: Axes, everyone: Found) -> None:
    """The ratio of successive errors against the error."""
    for (method, kind), result in everyone.items():
        entries = result["ratios"]
        if not entries:
            continue
        at = [10 ** (entry["decade"] + 0.5) for entry in entries]
        ax.plot(
            at,
            [entry["median"] for entry in entries],
            marker="o",
            markersize=3.5,
            **_style(method, kind),
        )
        if method == "FUSE":
            low, high = zip(*(entry["quartiles"] for entry in entries), strict=True)
            ax.fill_between(at, low, high, color=COLORS[method], alpha=0.12, lw=0)
    ax.invert_xaxis()
    ax.set(
        title="(d) what an iteration leaves of the error",
        xlabel="error e, by decade, on the way to the minimum",
        ylabel="median of next e / e",
        xscale="log",
        yscale="log",
    )
