"""Every entry's result, drawn: a panel a task."""

from __future__ import annotations

import math

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import pictures
from benchmarks.harness.schedules import SCHEDULES
from benchmarks.stochastic.methods import METHODS, TITLES, Entry
from benchmarks.stochastic.page import Played
from benchmarks.stochastic.tournament import Standing

COLORS = {
    "adamw": pictures.COLORS["torch"],
    "fuse_pv": pictures.COLORS["ours"],
    "fuse_pv_half": pictures.COLORS["ours bf16"],
    "control": pictures.COLORS["ours int8"],
    "control_half": pictures.COLORS["grey"],
    "pairs": "tab:brown",
    "muon": pictures.COLORS["other"],
    "soap": pictures.COLORS["torch alone"],
    "schedule_free": "black",
}
MARKERS = {
    "constant": "o",
    "cosine": "s",
    "cosine_10": "D",
    "warmup_cosine": "^",
    "warm_up": "v",
}


def draw(played: Played) -> Figure:
    """Means and standard deviations; a line a method, a marker a schedule."""
    columns = min(4, len(played))
    lines = math.ceil(len(played) / columns)
    size = (1.6 + 3.1 * columns, 0.9 + 2.7 * lines)
    with pictures.style():
        figure, panels = plt.subplots(
            lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True
        )
        flat = list(panels.flat)
        there = {entry.method for _, standings in played for entry in standings}
        names = [name for name in METHODS if name in there]
        for panel, (spec, standings) in zip(flat, played, strict=False):
            _panel(panel, standings, names)
            panel.set_title(spec.title, fontsize=9)
            loss = spec.measure == "loss"
            panel.set_xlabel("validation loss, nats" if loss else "test accuracy, %")
        for panel in flat[len(played) :]:
            panel.set_visible(False)
        shown = {entry.schedule for _, standings in played for entry in standings}
        handles = [
            plt.Line2D([], [], color="black", linestyle="", marker=marker, label=TITLES[name])
            for name, marker in MARKERS.items()
            if name in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _panel(panel: Axes, standings: dict[Entry, Standing], names: list[str]) -> None:
    for entry, standing in standings.items():
        loss = standing.measure == "loss"
        sample = standing.sample().negated if loss else standing.sample()
        if not math.isfinite(sample.mean):
            continue  # the table tells
        several = [*SCHEDULES]
        shift = 0.0
        if entry.schedule in several:
            shift = 0.15 * (several.index(entry.schedule) - (len(several) - 1) / 2)
        times = 1 if loss else 100
        panel.errorbar(
            times * sample.mean,
            names.index(entry.method) + shift,
            xerr=times * sample.std,
            color=COLORS[entry.method],
            marker=MARKERS[entry.schedule],
            linestyle="",
            linewidth=1,
        )
    panel.set_yticks(range(len(names)), [METHODS[name].title for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
