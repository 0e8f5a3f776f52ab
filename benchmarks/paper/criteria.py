"""Fig. 5: the switchover criteria compared, DenseNet on CIFAR-10."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from benchmarks.harness import pictures
from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import (
    PRINTED,
    TUNING_SEEDS,
    Plan,
    Results,
    Sample,
    curves,
    last_losses,
    verdict,
)
from benchmarks.harness.minibatch import find_problem
from benchmarks.harness.tables import number, table
from benchmarks.paper.page import NO, PARTLY, YES, Report
from benchmarks.paper.statistics import listed, short

SECTIONS = {"fig5": "Fig. 5: switchover criteria, DenseNet on CIFAR-10"}
# Three values of each criterion are tried. The means of Eq. 3 and Eq. 4 are over an epoch.
PROBLEM = "cifar10"
CRITERIA: dict[str, tuple[float, ...]] = {
    "epochs": (0.25, 0.5, 0.75),  # of the budget
    "gradient norm": (1.0, 10.0, 100.0),  # zeta
    "loss": (0.01, 0.03, 0.1),  # sigma
}
AUTOMATIC = "automatic"
COLORS = {
    "epochs": pictures.COLORS["torch"],
    "gradient norm": pictures.COLORS["other"],
    "loss": pictures.COLORS["ours int8"],
    AUTOMATIC: pictures.COLORS["ours"],
}


# --- cells ----------------------------------------------------------------------------------


def criterion(name: str, value: float, steps_per_epoch: int, epochs: int) -> Any:
    """A criterion as :func:`benchmarks.harness.ours.make_switch` reads it."""
    if name == "epochs":
        return value * epochs
    if name == "gradient norm":
        return {"name": "GradNorm", "zeta": value, "window": steps_per_epoch}
    return {"name": "LossChange", "sigma": value, "window": steps_per_epoch}


def _criterion_cell(plan: Plan, done: Results, name: str, value: float, seed: int) -> Cell:
    about = done[plan.describe(PROBLEM).key]
    switch = criterion(name, value, about["steps_per_epoch"], about["epochs"])
    description = plan.fuse_pv(PRINTED["fuse_pv"], switch=switch)
    key = f"criteria/{name.replace(' ', '-')}-{value:g}"
    return plan.cell(PROBLEM, key, description, seed)


def cells(name: str, quick: bool, data: str | None, done: Results) -> list[Cell]:
    """The runs that choose each criterion's value, then those that are reported."""
    plan = Plan(quick, data)
    known = [plan.describe(PROBLEM)]
    if known[0].key not in done:
        return known
    # Those of Table II.
    description = plan.fuse_pv(PRINTED["fuse_pv"])
    known += [plan.cell(PROBLEM, "printed/fuse_pv", description, seed) for seed in plan.seeds]
    for kind, values in CRITERIA.items():
        known += [_criterion_cell(plan, done, kind, value, TUNING_SEEDS[0]) for value in values]
        best = _best(plan, done, kind)
        if best is not None:
            known += [_criterion_cell(plan, done, kind, best, seed) for seed in plan.seeds]
    return known


def _best(plan: Plan, done: Results, name: str) -> float | None:
    """The value with the least training loss in the end, on a seed that is not reported."""
    of = {v: _criterion_cell(plan, done, name, v, TUNING_SEEDS[0]).key for v in CRITERIA[name]}
    if not all(key in done for key in of.values()):
        return None

    return min(of, key=lambda value: last_losses([done[of[value]]]).mean)


# --- report ---------------------------------------------------------------------------------


def report(name: str, results: Results, quick: bool) -> Report:
    """The section."""
    plan = Plan(quick)
    chosen = {name: _best(plan, results, name) for name in CRITERIA}
    runs: dict[str, list[Results]] = {}
    for name, value in chosen.items():
        assert value is not None
        runs[name] = [
            results[_criterion_cell(plan, results, name, value, seed).key] for seed in plan.seeds
        ]
    runs[AUTOMATIC] = [results[f"minibatch/{PROBLEM}/printed/fuse_pv/{s}"] for s in plan.seeds]
    losses = {kind: last_losses(of) for kind, of in runs.items()}
    epochs = losses["epochs"].negated
    beside = {kind: verdict(epochs, losses[kind].negated) for kind in runs if kind != "epochs"}
    rivals = ("gradient norm", "loss")
    won = sum(beside[name] == "win" for name in rivals)
    ahead = [losses["epochs"].mean < losses[name].mean for name in rivals]
    outcome = YES if won == 2 else PARTLY if all(ahead) or won else NO
    phrases = [
        f"{number(losses[name].mean, 4)} with the {name} criterion ({beside[name]} for epochs)"
        for name in rivals
    ]
    sentence = (
        f"The training loss ends at {number(losses['epochs'].mean, 4)} with the epoch criterion, "
        f"at {listed(phrases)}, and at {number(losses[AUTOMATIC].mean, 4)} with FusePV's own "
        f"one ({beside[AUTOMATIC]} for epochs). A win is more than one standard deviation."
    )
    rows = [
        [
            f"{name}, {_setting(name, chosen.get(name), plan)}",
            _when(of),
            losses[name].show(),
            Sample(tuple(run["test_accuracy"][-1] for run in of)).percent(),
            number(statistics.fmean(run["evaluations"][-1] for run in of), 3),
        ]
        for name, of in runs.items()
    ]
    tried = {
        name: {
            f"{value:g}": _tried(
                results[_criterion_cell(plan, results, name, value, TUNING_SEEDS[0]).key]
            )
            for value in values
        }
        for name, values in CRITERIA.items()
    }
    heads = ["criterion", "", "training loss", "test accuracy, %", "evaluations"]
    text = (
        f"{len(plan.seeds)} seeds, Adam's learning rate {PRINTED['fuse_pv']:g}, all else as in "
        f"Table II ({results[plan.describe(PROBLEM).key]['data']}). Epochs, zeta (Eq. 3) and "
        f"sigma (Eq. 4) are the best of three values each on a seed that is not reported, by the "
        f"training loss in the end; the means of Eq. 3 and Eq. 4 are over an epoch.\n\n"
        f"{table(heads, rows)}\n\n{_tried_table(tried)}"
    )
    data = {
        "chosen": chosen,
        "tried": tried,
        "verdicts_for_epochs": beside,
        "runs": {
            name: {
                "train_loss": [run["train_loss"] for run in of],
                "test_accuracy": [run["test_accuracy"][-1] for run in of],
                "switch_epoch": [run["switch_epoch"] for run in of],
                "switch_reason": [run["switch_reason"] for run in of],
            }
            for name, of in runs.items()
        },
    }
    claim = "The epoch-based criterion slightly outperforms the other two."
    return Report(claim, outcome, sentence, text, short(data), {"": _draw_criteria(runs)})


def _setting(name: str, value: float | None, plan: Plan) -> str:
    if value is None:
        return "as in Table II"
    if name == "epochs":
        return f"{value * find_problem(PROBLEM, plan.quick).epochs:g}"
    return f"{'zeta' if name == 'gradient norm' else 'sigma'} = {value:g}"


def _when(runs: list[Results]) -> str:
    epochs = [run["switch_epoch"] for run in runs if run["switch_epoch"] is not None]
    if not epochs:
        return "no switch"
    low, high = f"{min(epochs):.2f}", f"{max(epochs):.2f}"
    text = f"switch at epoch {low if low == high else f'{low}-{high}'}"
    return text if len(epochs) == len(runs) else f"{text} ({len(epochs)} of {len(runs)} runs)"


def _tried(run: Results) -> dict[str, Any]:
    return {"train_loss": last_losses([run]).mean, "switch_epoch": run["switch_epoch"]}


def _tried_table(tried: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for name, values in tried.items():
        for value, entry in values.items():
            loss = number(entry["train_loss"], 4)
            rows.append([f"{name}, {value}", _when([entry]), loss])
    return table(["tried (epochs: share of the budget)", "", "training loss"], rows)


def _draw_criteria(runs: dict[str, list[Results]]) -> Figure:
    with pictures.style():
        figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for name, of in runs.items():
            x, y = curves(of, "epoch", "train_loss")
            mean, std = np.mean(y, 1), np.std(y, 1, ddof=1)
            panel.plot(
                x,
                mean,
                label=f"{name}: {_when(of)}",
                color=COLORS[name],
                linestyle="-" if name == AUTOMATIC else "--",
            )
            panel.fill_between(
                x, mean - std, mean + std, color=COLORS[name], alpha=0.15, linewidth=0
            )
        panel.set(xlabel="epochs", ylabel="training loss", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend()
    return figure
