"""One option of FusePV changed at a time, and the automatic switch beside those by hand."""

from __future__ import annotations

import re
import statistics
from typing import Any

from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import PRINTED, Plan, Results, Sample, last_losses
from benchmarks.harness.minibatch import find_problem
from benchmarks.harness.tables import number, table
from benchmarks.stochastic.methods import CONTROL

# One change at a time to FusePV's setting with a switch at half the epochs, so that all variants
# have as many epochs of L-BFGS. The last ones move the switch.
BASE = "switch at 1/2 of the epochs"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"switch": 0.5},
    "Adam's metric": {"switch": 0.5, **CONTROL},
    "step cap 1": {"switch": 0.5, "step_cap": 1.0},
    "step cap 25": {"switch": 0.5, "step_cap": 25.0},
    "4 times the batch": {"switch": 0.5, "batch_factor": 4},
    "8 times the batch": {"switch": 0.5, "batch_factor": 8},
    "fixed step, pairs of one batch": {"switch": 0.5, "line_search": None, "pairs": "same_batch"},
    "fixed step, pairs of two batches": {
        "switch": 0.5,
        "line_search": None,
        "pairs": "consecutive",
    },
    "Armijo": {"switch": 0.5, "line_search": "armijo"},
    "strong Wolfe": {"switch": 0.5, "line_search": "strong_wolfe"},
    "approximate Wolfe": {"switch": 0.5, "line_search": "approximate_wolfe"},
    "approximate Wolfe, 8 times the batch": {
        "switch": 0.5,
        "line_search": "approximate_wolfe",
        "batch_factor": 8,
    },
    "approximate Wolfe, 3 iterations a batch": {"switch": 0.5, "max_iter": 3},
    "approximate Wolfe, 5 iterations a batch": {"switch": 0.5, "max_iter": 5},
    "switch at 1/4 of the epochs": {"switch": 0.25},
    "switch at 3/4 of the epochs": {"switch": 0.75},
    "automatic switch": {},
    "no switch": {"switch": "never"},
}
# Algorithm 3 blends instead of switching; a schedule is over the whole budget.
BLENDS: dict[str, Any] = {
    "Fuse, theta = 0.5": 0.5,
    "Fuse, theta from 1 to 0, linear": {"name": "LinearTheta"},
    "Fuse, theta from 1 to 0, cosine": {"name": "CosineTheta"},
}
BY_HAND = ("switch at 1/4 of the epochs", BASE, "switch at 3/4 of the epochs")
# Not the seeds that are compared with the baselines.
ABLATION_SEEDS = {"cifar10": range(100, 102)}
USUAL_ABLATION_SEEDS = range(100, 103)


def variant_cells(problem: str, name: str, plan: Plan) -> list[Cell]:
    """The runs of a variant of FusePV, whose "switch" is a share of the epochs, or of a blend."""
    epochs, lr = find_problem(problem, plan.quick).epochs, PRINTED["fuse_pv"]
    if name in BLENDS:
        theta = BLENDS[name]
        if isinstance(theta, dict):
            theta = {**theta, "epochs": epochs}
        description = {"name": "fuse", "lr": lr, "theta": theta}
    else:
        options = dict(VARIANTS[name])
        if isinstance(options.get("switch"), float):
            options["switch"] *= epochs
        description = plan.fuse_pv(lr, **options)
    seeds = ABLATION_SEEDS.get(problem, USUAL_ABLATION_SEEDS)[: 2 if plan.quick else None]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
    return [plan.cell(problem, f"ablation/{slug}", description, seed) for seed in seeds]


Ablation = dict[str, dict[str, list[Results]]]


def ablation_text(ablation: Ablation) -> str:
    """Test accuracy and evaluations of every variant."""
    rows = []
    for name in (*VARIANTS, *BLENDS):
        row = [name]
        for variants in ablation.values():
            runs = variants[name]
            found = Sample(tuple(run["test_accuracy"][-1] for run in runs))
            spent = statistics.fmean(run["evaluations"][-1] for run in runs)
            row += [found.percent(), number(spent, 3)]
        rows.append(row)
    headers = ["variant"]
    for problem in ablation:
        headers += [problem, "evaluations"]
    return table(headers, rows)


def automatic_switch(ablation: Ablation) -> list[Results]:
    """The automatic switch beside the best of those by hand, in training loss and test error."""
    rows = []
    for problem, variants in ablation.items():
        ends = {
            name: (
                last_losses(runs).mean,
                1 - statistics.fmean(run["test_accuracy"][-1] for run in runs),
            )
            for name, runs in variants.items()
        }
        for i, quantity in enumerate(("training loss", "test error")):
            best = min(BY_HAND, key=lambda name, i=i, ends=ends: ends[name][i])  # type: ignore[misc]
            ours, theirs = ends["automatic switch"][i], ends[best][i]
            rows.append(
                {
                    "problem": problem,
                    "quantity": quantity,
                    "automatic": ours,
                    "by hand": theirs,
                    "best": best,
                    "within 10%": ours <= 1.1 * theirs,
                    "switched": [run["switch_epoch"] for run in variants["automatic switch"]],
                }
            )
    return rows


def switch_text(rows: list[Results]) -> str:
    """The same as a table."""
    shown = []
    for row in rows:
        epochs = [epoch for epoch in row["switched"] if epoch is not None]
        when = f"{min(epochs):.2f}-{max(epochs):.2f}" if epochs else "never"
        if epochs and len(epochs) < len(row["switched"]):
            when += f" ({len(epochs)} of {len(row['switched'])} runs)"
        shown.append(
            [
                f"{row['problem']}, {row['quantity']}",
                number(row["automatic"], 4),
                when,
                number(row["by hand"], 4),
                row["best"].removeprefix("switch at "),
                "yes" if row["within 10%"] else "**no**",
            ]
        )
    return table(["", "automatic", "at epoch", "best by hand", "there", "within 10%"], shown)


def cells(problems: tuple[str, ...], plan: Plan, done: Results) -> list[Cell]:
    """The runs, as far as they are known: of the problems that have data."""
    known = [plan.describe(problem) for problem in problems]
    for problem in problems:
        if plan.describe(problem).key in done:
            for name in (*VARIANTS, *BLENDS):
                known += variant_cells(problem, name, plan)
    return known


def collect(problems: tuple[str, ...], plan: Plan, results: Results) -> Ablation:
    """By problem and variant, for the problems that have all their runs."""
    found: Ablation = {}
    for problem in problems:
        if all(cell.key in results for cell in cells((problem,), plan, results)):
            found[problem] = {
                name: [results[cell.key] for cell in variant_cells(problem, name, plan)]
                for name in (*VARIANTS, *BLENDS)
            }
    return found


def json(ablation: Ablation) -> dict[str, Any]:
    """What is stored of it."""
    return {
        problem: {
            name: {
                "optimizer": runs[0]["optimizer"],
                "test_accuracy": [run["test_accuracy"][-1] for run in runs],
                "train_loss": [run["train_loss"][-1] for run in runs],
                "evaluations": [run["evaluations"][-1] for run in runs],
            }
            for name, runs in variants.items()
        }
        for problem, variants in ablation.items()
    }
