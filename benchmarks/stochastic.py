"""FusePV on minibatches of images beside SGD, Adam, Adam+SGD and torch's L-BFGS after Adam.

Test accuracy over five seeds at equal epochs, gradient evaluations and CPU time, then one option
of FusePV changed at a time. Every run is stored as it ends and is not repeated unless its code
changes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import cells, command, machine, saving
from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import (
    BASES,
    METHODS,
    PRINTED,
    RATES,
    Outcome,
    Plan,
    Results,
    Sample,
    at_the_edge,
    cells_of,
    last_losses,
    methods,
    staged,
)
from benchmarks.harness.comparison_pictures import draw
from benchmarks.harness.minibatch import find_problem
from benchmarks.harness.tables import number, table

PROBLEMS = ("mnist", "kmnist", "usps", "cifar10")

# --- ablation -------------------------------------------------------------------------------

# One change at a time to FusePV's setting with a switch at half the epochs, so that all variants
# have as many epochs of L-BFGS. The last ones move the switch.
BASE = "switch at 1/2 of the epochs"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"switch": 0.5},
    # Every pair fails this test, so that only the averages and the cap remain.
    "no curvature pairs": {"switch": 0.5, "curvature_tol": 1.0},
    "step cap 1": {"switch": 0.5, "step_cap": 1.0},
    "step cap 25": {"switch": 0.5, "step_cap": 25.0},
    "30 pairs": {"switch": 0.5, "history_size": 30},
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


# --- comparison -----------------------------------------------------------------------------


def outcome_text(outcomes: list[Outcome]) -> str:
    """Test accuracies of one kind of learning rates."""
    rows = []
    for outcome in outcomes:
        for i, method in enumerate(methods(outcome.kind)):
            ours = method == "fuse_pv"
            row = [
                outcome.about["title"] if i == 0 else "",
                METHODS[method],
                _rate(outcome, method),
            ]
            for basis in BASES:
                text = outcome.accuracies(method, basis).percent()
                if ours:
                    text = f"**{text}**" if basis == "epochs" else ""
                row.append(text if ours else f"{text}, {outcome.verdict(method, basis)}")
            for quantity in ("evaluations", "cpu_seconds"):
                row.append(number(outcome.at_end(method, quantity).mean, 3))
            row.append(number(outcome.at_end(method, "train_loss").mean, 4))
            rows.append(row)
    headers = ["problem", "optimizer", "lr", *BASES.values(), "evaluations", "CPU s", "train loss"]
    return table(headers, rows)


def _rate(outcome: Outcome, method: str) -> str:
    rates = outcome.rates
    if method in ("sgd", "adam", "adam_cosine", "fuse_pv"):
        return f"{rates[method]:g}"
    second = f"{rates['adam_sgd']:g}" if method == "adam_sgd" else "1"
    return f"{rates['adam']:g}, {second}"


def count_text(outcomes: list[Outcome]) -> str:
    """How often FusePV wins, draws and loses, by baseline."""
    rows = []
    for method in [name for name in outcomes[0].runs if name != "fuse_pv"]:
        row = [METHODS[method]]
        for basis in BASES:
            found = Counter(outcome.verdict(method, basis) for outcome in outcomes)
            row.append(" / ".join(str(found[name]) for name in ("win", "draw", "loss")))
        rows.append(row)
    return table(["won / drawn / lost against", *BASES.values()], rows)


def target_text(targets: list[Results]) -> str:
    """How many targets are met, and those that are not."""
    missed = [row for row in targets if not row["met"]]
    text = f"{len(targets) - len(missed)} of {len(targets)} targets met."
    if not missed:
        return text
    rows = [
        [
            f"{row['problem']}, {row['learning rates']} rates",
            f"{row['baseline']} at {row['at']}",
            row["wanted"],
            f"{100 * row['difference']:+.2f}",
            row["verdict"],
        ]
        for row in missed
    ]
    headers = ["missed", "baseline", "wanted", "difference, %", "verdict"]
    return f"{text}\n\n{table(headers, rows)}"


def conditions(outcomes: list[Outcome], plan: Plan) -> str:
    """Data and budgets."""
    lines = []
    for outcome in outcomes:
        about = outcome.about
        lines.append(
            f"- {about['title']}, {about['parameters']:,} parameters, batches of {about['batch']}, "
            f"{about['epochs']} epochs of {about['steps_per_epoch']} steps; {about['data']}."
        )
    first = f"{len(plan.seeds)} seeds, means ± standard deviations. FusePV is {plan.setting}."
    return "\n".join([first, "", *dict.fromkeys(lines)])


# --- the module -----------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The module's own."""
    names = ",".join(PROBLEMS)
    parser.add_argument("--only", default=names, help="problems, of %(default)s")
    parser.add_argument("--skip-ablation", action="store_true", help="the comparison alone")
    parser.add_argument(
        "--data-root", help="folder for torchvision's downloads (else .npz files in FUSE_EXT_DATA)"
    )
    workers = machine.cores()
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes (%(default)s); 0: this one alone"
    )
    parser.add_argument("--cells", type=Path, help="folder of the stored runs (in build, or --out)")


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("stochastic", __doc__, add=add_options)
    problems = args.only.split(",")
    for name in problems:
        if name not in PROBLEMS:
            raise SystemExit(f"--only has {name!r}, which is none of {', '.join(PROBLEMS)}")
    plan = Plan(args.quick, args.data_root)
    shared = cells.ROOT / "build" / f"paper-cells{'-quick' if args.quick else ''}"
    folder = args.cells or (shared if args.readme else args.out / "cells")

    def known(done: Results) -> list[Cell]:
        found = []
        for problem in problems:
            for kind in RATES:
                found += cells_of(problem, kind, plan, done)
            if not args.skip_ablation and plan.describe(problem).key in done:
                for name in (*VARIANTS, *BLENDS):
                    found += variant_cells(problem, name, plan)
        return found

    with cells.pool(args.workers) or contextlib.nullcontext() as workers:
        results = staged(known, lambda todo: cells.run(todo, folder, "stochastic", workers))
    outcomes = [Outcome.of(problem, kind, plan, results) for kind in RATES for problem in problems]
    targets = [row for outcome in outcomes for row in outcome.targets()]
    found: dict[str, Any] = {
        "targets": targets,
        "outcomes": {
            kind: {o.problem: o.json() for o in outcomes if o.kind == kind} for kind in RATES
        },
    }
    parts = [conditions(outcomes, plan), at_the_edge(outcomes), target_text(targets)]
    for kind in RATES:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        parts += [f"**With {kind} learning rates**", count_text(of_kind), outcome_text(of_kind)]
    if not args.skip_ablation:
        ablation = {
            problem: {
                name: [results[cell.key] for cell in variant_cells(problem, name, plan)]
                for name in (*VARIANTS, *BLENDS)
            }
            for problem in problems
        }
        switches = automatic_switch(ablation)
        found["automatic_switch"] = switches
        found["ablation"] = {
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
        parts += [
            "**One option at a time** (printed learning rates, other seeds)",
            ablation_text(ablation),
            switch_text(switches),
        ]
    facts = {**machine.facts(args), "threads": 1}
    figure = draw(outcomes, "evaluations", "test_accuracy")
    saving.save(args, "stochastic", facts, found, "\n\n".join(parts), figure)


if __name__ == "__main__":
    main()
