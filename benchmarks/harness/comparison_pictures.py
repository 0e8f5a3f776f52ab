"""Courses of the optimizers compared on minibatches, drawn."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from benchmarks.harness import pictures
from benchmarks.harness.comparison import METHODS, Outcome, curves, methods

STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": pictures.COLORS["grey"], "linestyle": ":"},
    "adam": {"color": pictures.COLORS["torch"]},
    "adam_cosine": {"color": pictures.COLORS["ours bf16"], "linestyle": "--"},
    "adam_averaged": {"color": pictures.COLORS["ours bf16"], "linestyle": ":"},
    "adam_sgd": {"color": pictures.COLORS["other"], "linestyle": "-."},
    "torch_1": {"color": pictures.COLORS["torch alone"], "linestyle": "--"},
    "torch_20": {"color": pictures.COLORS["ours int8"], "linestyle": "--"},
    # Wider and below the others, with which it shares the first phase.
    "fuse_pv": {"color": pictures.COLORS["ours"], "linewidth": 3, "zorder": 1.9},
}
LABELS = {
    "epoch": "epochs",
    "evaluations": "gradient evaluations, epochs' worth",
    "train_loss": "training loss",
    "test_accuracy": "test accuracy, %",
}


def draw(outcomes: list[Outcome], x: str, y: str) -> Figure:
    """Means and standard deviations over the seeds; a column a problem, a row a kind of rates.

    Args:
        outcomes: Of all problems with all kinds of learning rates.
        x: "epoch" or "evaluations".
        y: "train_loss" or "test_accuracy".
    """
    problems = list(dict.fromkeys(outcome.problem for outcome in outcomes))
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    size = (max(4.5, 3.3 * len(problems)), 2.9 * len(kinds) + 0.6)
    with pictures.style():
        figure, panels = plt.subplots(
            len(kinds), len(problems), figsize=size, layout="constrained", squeeze=False
        )
        for outcome in outcomes:
            row, column = kinds.index(outcome.kind), problems.index(outcome.problem)
            panel = panels[row][column]
            _panel(panel, outcome, x, y)
            panel.set_title(f"{outcome.about['title']}\n{outcome.kind} rates")
            panel.set_xlabel(LABELS[x] if row == len(kinds) - 1 else "")
            panel.set_ylabel(LABELS[y] if column == 0 else "")
        handles, labels = panels[0][0].get_legend_handles_labels()
        columns = min(4, len(problems))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _panel(panel: Axes, outcome: Outcome, x: str, y: str) -> None:
    first, last = [], []  # after the first epoch, and best of each method
    best = np.min if y == "train_loss" else np.max
    for method in methods(outcome.kind):
        at, found = curves(outcome.runs[method], x, y)
        values = np.array(found) * (1 if y == "train_loss" else 100)
        mean, std = values.mean(1), values.std(1, ddof=1)
        panel.plot(at[1:], mean[1:], label=METHODS[method], **STYLES[method])
        panel.fill_between(
            at[1:],
            (mean - std)[1:],
            (mean + std)[1:],
            color=STYLES[method]["color"],
            alpha=0.15,
            linewidth=0,
        )
        first.append(mean[1])
        last.append(best(mean[1:][np.isfinite(mean[1:])], initial=mean[1]))
    if y == "train_loss":
        panel.set_yscale("log")
        panel.set_ylim(0.9 * min(last), 1.1 * max(first))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:  # what SGD does at first would leave no room for the others
        low, high = min(first), max(last)
        low = max(low, high - 2.5 * (high - sorted(last)[len(last) // 2]) - 8)
        panel.set_ylim(low, high + 0.08 * (high - low))
    if x == "evaluations":
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    switches = [run["switch_epoch"] for run in outcome.runs["fuse_pv"]]
    if None not in switches:
        panel.axvline(
            statistics.fmean(switches), color=pictures.COLORS["ours"], linewidth=0.8, linestyle=":"
        )
