"""When should Adam make way for L-BFGS, if the loss is the same function at every call?

Two physics-informed networks and a small classifier on the full batch, all with the same budget
of gradient evaluations: L-BFGS all along, the recipe of 500 Adam steps and then torch's L-BFGS
(one iteration a step, or one long step), and FusePV that switches after so many steps, by its
default, or by LossPlateau, with the promise that this is one function or with nothing said. All
keep the same number of curvature pairs, m, but for "FusePV" and "nothing said" at m = 500, which
are left to take what they like: here a dense matrix.
What is kept of a run is the least loss seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

import fuse_ext
from benchmarks.harness import command, machine, pinn, saving, tables
from benchmarks.harness.pictures import COLORS, style
from benchmarks.harness.rounds import Spread, progress
from benchmarks.harness.tables import table
from benchmarks.time_to_loss import ADAM_LR, BudgetSpentError, Run

THREADS = 1
SEEDS = (5, 3)  # as many as there are rounds
BUDGET = {True: 600, False: 1200}  # gradient evaluations
HISTORY_SIZES = (500, 100, 10)  # FusePV's default here, torch's, and a small one
DEFAULTS = (500, 100)  # FusePV's and torch's
RECIPE = 500  # Adam steps of the recipe by hand, at most 5/12 of the budget
SWITCHES = (0, 30, 300)
DECAY = 1e-3  # of the classifier
Method = Callable[[Run, int, int], None]


def digits() -> pinn.Problem:
    """A tanh network on scikit-learn's handwritten digits: cross-entropy, with a penalty."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.as_tensor(data.data, dtype=torch.float32) / 16
    y = torch.as_tensor(data.target)

    def loss(model: nn.Module) -> torch.Tensor:
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return nn.functional.cross_entropy(model(x), y) + 0.5 * DECAY * penalty

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) != y).float().mean())

    return pinn.Problem("Digits, MLP", loss, error, ())


def problems(quick: bool) -> list[tuple[pinn.Problem, tuple[int, ...]]]:
    """Each with the widths of its network."""
    burgers = pinn.burgers(256), (2, 20, 20, 20, 20, 1)
    poisson = pinn.poisson(128), (2, 32, 32, 1)
    return [poisson] if quick else [poisson, burgers, (digits(), (64, 32, 10))]


def torch_lbfgs(run: Run, m: int, iterations: int) -> None:
    """torch.optim.LBFGS with strong Wolfe, so many iterations a step."""
    optimizer = torch.optim.LBFGS(
        run.params,
        max_iter=iterations,
        max_eval=10**9,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=m,
        line_search_fn="strong_wolfe",
    )
    run.exhaust(optimizer)


def by_hand(iterations: int) -> Method:
    """Adam, then torch's L-BFGS."""

    def solve(run: Run, m: int, budget: int) -> None:
        optimizer = torch.optim.Adam(run.params, lr=ADAM_LR)
        for _ in range(min(RECIPE, budget * 5 // 12)):
            optimizer.step(run)
        torch_lbfgs(run, m, iterations)

    return solve


def fuse_pv(**options: Any) -> Method:
    """FusePV, one iteration a step."""

    def solve(run: Run, m: int, _: int) -> None:
        options_now = {name: make() if callable(make) else make for name, make in options.items()}
        run.exhaust(
            fuse_ext.FusePV(run.params, ADAM_LR, history_size=m, deterministic=True, **options_now)
        )

    return solve


def as_it_likes(**options: Any) -> Method:
    """FusePV, told of pairs only where they are fewer than it would take."""

    def solve(run: Run, m: int, _: int) -> None:
        pairs = {} if m == HISTORY_SIZES[0] else {"history_size": m}
        run.exhaust(fuse_ext.FusePV(run.params, ADAM_LR, **pairs, **options))

    return solve


METHODS: dict[str, tuple[Method, str, str]] = {
    "L-BFGS all along (torch)": (
        lambda run, m, _: torch_lbfgs(run, m, 10**9),
        COLORS["torch alone"],
        "-",
    ),
    "Adam, then one iteration a step (torch)": (by_hand(1), COLORS["torch"], ":"),
    "Adam, then one long step (torch)": (by_hand(10**9), COLORS["torch"], "-"),
    **{
        f"FusePV, switch={n}": (fuse_pv(switch=n), COLORS["grey"], line)
        for n, line in zip(SWITCHES, ("-", "--", ":"), strict=True)
    },
    "FusePV, switch=LossPlateau()": (
        fuse_pv(switch=fuse_ext.LossPlateau),
        COLORS["ours bf16"],
        "-",
    ),
    "FusePV, no self-scaling": (fuse_pv(self_scaling=False), COLORS["ours"], "--"),
    "FusePV, strong Wolfe": (fuse_pv(line_search="strong_wolfe"), COLORS["ours int8"], "--"),
    "FusePV, pairs": (fuse_pv(), COLORS["ours bf16"], ":"),
    "FusePV, nothing said": (as_it_likes(), COLORS["ours"], ":"),
    "FusePV": (as_it_likes(deterministic=True), COLORS["ours"], "-"),
}
OURS = "FusePV"
UNSAID = "FusePV, nothing said"
RIVALS = (*tuple(METHODS)[:3], UNSAID)
Runs = dict[tuple[str, int], list[Run]]  # by method and history_size, one a seed


def solve(problem: pinn.Problem, widths: tuple[int, ...], seeds: int, budget: int) -> Runs:
    """All methods from all starts."""
    cases = [(name, m) for m in HISTORY_SIZES for name in METHODS]
    runs: Runs = {case: [] for case in cases}
    with progress(seeds * len(cases), problem.name) as bar:
        for seed in range(seeds):
            for name, m in cases:
                run = Run(problem, widths, seed, budget)
                with contextlib.suppress(BudgetSpentError):
                    METHODS[name][0](run, m, budget)
                runs[name, m].append(run)
                bar.update()
    return runs


def final(runs: list[Run]) -> Spread:
    """The least losses in the end."""
    return Spread.of(run.best[-1] for run in runs)


def as_table(results: list[tuple[pinn.Problem, Runs]]) -> str:
    """Markdown: least losses by method."""
    heads = [f"{problem.name}, m = {m}" for problem, _ in results for m in HISTORY_SIZES]
    rows = []
    for name in METHODS:
        cells = [final(runs[name, m]).show() for _, runs in results for m in HISTORY_SIZES]
        rows.append([name, *cells])
    return table(["least loss", *heads], rows)


def comparisons(results: list[tuple[pinn.Problem, Runs]]) -> list[dict[str, str]]:
    """FusePV by default against each rival: ratio of the medians, and starts won."""
    found = []
    for problem, runs in results:
        for m, their_m in (DEFAULTS, *zip(HISTORY_SIZES, HISTORY_SIZES, strict=True)):
            ours = final(runs[OURS, m])
            for rival in RIVALS:
                theirs = final(runs[rival, their_m])
                won = sum(a < b for a, b in zip(ours.values, theirs.values, strict=True))
                ratio = theirs.median / ours.median
                found.append(
                    {
                        "problem": f"{problem.name}, m = {m}"
                        + (f" to the rival's {their_m}" if m != their_m else ""),
                        "rival": rival,
                        "its loss / FusePV's": tables.number(ratio),
                        "starts won": f"{won} of {len(ours.values)}",
                        "verdict": "better" if ratio > 1 else "**worse**",
                    }
                )
    return found


def draw(results: list[tuple[pinn.Problem, Runs]]) -> Figure:
    """Least loss against evaluations: medians over the starts, at FusePV's history size."""
    m = HISTORY_SIZES[0]
    with style():
        figure, panels = plt.subplots(
            1, len(results), figsize=(4.6 * len(results), 4.6), layout="constrained", squeeze=False
        )
        for panel, (problem, runs) in zip(panels[0], results, strict=True):
            for name, (_, color, line) in METHODS.items():
                curve = np.median([run.best for run in runs[name, m]], axis=0)
                at = np.arange(1, len(curve) + 1)
                panel.plot(at, curve, linestyle=line, color=color, label=name)
            panel.set(
                yscale="log",
                title=f"{problem.name}, m = {m}",
                xlabel="gradient evaluations",
                ylabel="least loss so far",
            )
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("switching", __doc__, SEEDS, THREADS)
    facts = machine.facts(args)
    budget = args.budget or BUDGET[args.quick]
    results = [
        (problem, solve(problem, widths, args.rounds, budget))
        for problem, widths in problems(args.quick)
    ]
    compared = comparisons(results)
    text = "\n\n".join(
        [
            f"{args.rounds} starts, {budget} gradient evaluations, float32, Adam's lr {ADAM_LR:g}; "
            f"by hand Adam takes {min(RECIPE, budget * 5 // 12)} steps. Medians of the least loss, "
            "with quartiles.",
            as_table(results),
            table([*compared[0]], ([*row.values()] for row in compared)),
        ]
    )
    json = {
        problem.name: {
            f"{name}, m = {m}": [run.best[-1] for run in of] for (name, m), of in runs.items()
        }
        for problem, runs in results
    }
    found = {"comparisons": compared, "least_losses": json}
    saving.save(args, "switching", facts, found, text, draw(results))


if __name__ == "__main__":
    main()
