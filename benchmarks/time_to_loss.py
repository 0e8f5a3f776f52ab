"""Physics-informed networks on the full batch: time and gradient evaluations to a given loss.

FusePV beside the by-hand recipe (torch.optim.Adam, then torch.optim.LBFGS with strong Wolfe), and
L-BFGS and Adam alone: same networks, same starts, same budget of gradient evaluations.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fuse_ext
from benchmarks.harness import command, machine, pinn, saving
from benchmarks.harness.pictures import COLORS, style
from benchmarks.harness.rounds import Spread, no_garbage, progress, show_time
from benchmarks.harness.tables import number, table

THREADS = 1  # more do not help networks this small
SEEDS = (3, 3)  # as many as there are rounds
ADAM_LR = 1e-3  # before L-BFGS
ADAM_ALONE_LR = 1e-2  # the best of 1e-3, 3e-3 and 1e-2 for Adam to the end
HISTORY_SIZE = 50  # of all; the usual choice for these networks, and better than 10 for torch's
BUDGET = {True: 600, False: 3000}  # gradient evaluations
ADAM_SHARE = 20  # percent of the budget: in the by-hand recipe, and in FusePV beside it
POINTS = {True: (256, 128), False: (512, 256)}  # of Burgers and of Poisson
WIDTHS = ((2, 20, 20, 20, 20, 1), (2, 32, 32, 1))


class BudgetSpentError(Exception):
    """The closure was called once too often."""


class Run:
    """One optimization from one start, and its closure.

    Args:
        problem: What to solve.
        widths: Of the network.
        seed: Of its start.
        budget: Calls of the closure; the next one raises :class:`BudgetSpentError`.

    Attributes:
        params: To be optimized.
        losses: At every gradient evaluation, trial points included.
        seconds: When each was known, since the clock started.
    """

    def __init__(
        self, problem: pinn.Problem, widths: tuple[int, ...], seed: int, budget: int
    ) -> None:
        torch.manual_seed(seed)
        self._problem, self._budget = problem, budget
        self._model = pinn.Mlp(*widths)
        self.params: list[Tensor] = list(self._model.parameters())
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._start = time.perf_counter()
        self._inside = 0.0
        self._least = math.inf
        self._best = [param.detach().clone() for param in self.params]

    def start_clock(self) -> None:
        """From here seconds count."""
        self._start = time.perf_counter()

    def __call__(self) -> Any:
        """The closure; returns the loss, and keeps a copy of the best point to be judged."""
        if len(self.losses) == self._budget:
            raise BudgetSpentError
        begin = time.perf_counter()
        for param in self.params:
            param.grad = None
        loss = self._problem.loss(self._model)
        loss.backward()
        self.losses.append(loss.item())
        if self.losses[-1] < self._least:
            self._least = self.losses[-1]
            torch._foreach_copy_(self._best, [param.detach() for param in self.params])
        end = time.perf_counter()
        self._inside += end - begin
        self.seconds.append(end - self._start)
        return loss.detach()

    def exhaust(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps until the optimizer evaluates no more (the budget ends it otherwise)."""
        before = -1
        while len(self.losses) != before:
            before = len(self.losses)
            optimizer.step(self)

    @property
    def best(self) -> list[float]:
        """The least loss so far, at every evaluation; level where it ended early."""
        best = np.fmin.accumulate(self.losses)
        return [*best, *[best[-1]] * (self._budget - len(best))]

    @property
    def outside(self) -> float:
        """Seconds an evaluation that were not spent in the closure."""
        return (self.seconds[-1] - self._inside) / len(self.losses)

    def error(self) -> float:
        """Relative l2 error of the solution at the best point."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self._best)
        return self._problem.error(self._model)

    def reached(self, level: float) -> tuple[int, float] | None:
        """Evaluations and seconds until a loss; None if never."""
        for i, loss in enumerate(self.losses):
            if loss <= level:
                return i + 1, self.seconds[i]
        return None


def adam(run: Run, steps: int, budget: int) -> None:
    """torch.optim.Adam to the end."""
    run.exhaust(torch.optim.Adam(run.params, lr=ADAM_ALONE_LR, fused=True))


def lbfgs(run: Run, steps: int, budget: int) -> None:
    """torch.optim.LBFGS, all in one call of ``step`` unless it returns by itself."""
    run.exhaust(torch.optim.LBFGS(run.params, **_lbfgs_options(budget)))


def our_lbfgs(run: Run, steps: int, budget: int) -> None:
    """The same with fuse_ext.LBFGS."""
    run.exhaust(fuse_ext.LBFGS(run.params, deterministic=True, **_lbfgs_options(budget)))


def _lbfgs_options(budget: int) -> dict[str, Any]:
    return {
        "max_iter": budget,
        "max_eval": budget,
        "tolerance_grad": 0.0,
        "tolerance_change": 0.0,
        "history_size": HISTORY_SIZE,
        "line_search_fn": "strong_wolfe",
    }


def by_hand(run: Run, steps: int, budget: int) -> None:
    """Adam for so many steps, then L-BFGS, both torch's."""
    optimizer = torch.optim.Adam(run.params, lr=ADAM_LR, fused=True)
    for _ in range(steps):
        optimizer.step(run)
    lbfgs(run, steps, budget)


def fuse_pv(run: Run, steps: int | None, budget: int) -> None:
    """FusePV, which switches after so many steps or, for None, by its default criterion."""
    run.exhaust(
        fuse_ext.FusePV(run.params, ADAM_LR, steps, history_size=HISTORY_SIZE, deterministic=True)
    )


def fuse_pv_own_switch(run: Run, steps: int, budget: int) -> None:
    """FusePV that decides for itself."""
    fuse_pv(run, None, budget)


METHODS: dict[str, tuple[Callable[[Run, int, int], None], str, str]] = {
    "Adam (torch)": (adam, COLORS["other"], "-"),
    "L-BFGS (torch)": (lbfgs, COLORS["torch alone"], "-"),
    "L-BFGS (fuse_ext)": (our_lbfgs, COLORS["ours int8"], "-"),
    "by hand (torch)": (by_hand, COLORS["torch"], "-"),
    "FusePV": (fuse_pv, COLORS["ours"], "-"),
    "FusePV, own switch": (fuse_pv_own_switch, COLORS["ours bf16"], "--"),
}
OURS, THEIRS = "FusePV", "by hand (torch)"

# Runs of each method, one a seed.
Runs = dict[str, list[Run]]


def solve(
    problem: pinn.Problem, widths: tuple[int, ...], seeds: int, quick: bool, budget: int
) -> Runs:
    """All methods from all starts, in an order drawn anew for every start."""
    runs: Runs = {name: [] for name in METHODS}
    shuffle = random.Random(0).shuffle
    # torch loads parts of itself on first use.
    for method, _, _ in METHODS.values():
        _spend(Run(problem, widths, 0, 10), method, 5, 10)
    with no_garbage(), progress(seeds * len(METHODS), problem.name) as bar:
        for seed in range(seeds):
            order = list(METHODS)
            shuffle(order)
            for name in order:
                run = Run(problem, widths, seed, budget)
                _spend(run, METHODS[name][0], budget * ADAM_SHARE // 100, budget)
                runs[name].append(run)
                gc.collect()
                bar.update()
    return runs


def _spend(run: Run, method: Callable[[Run, int, int], None], steps: int, budget: int) -> None:
    run.start_clock()
    with contextlib.suppress(BudgetSpentError):
        method(run, steps, budget)


# --- tables and pictures --------------------------------------------------------------------


def as_table(problem: pinn.Problem, runs: Runs) -> str:
    """Markdown: evaluations and seconds to each level, and where it ended."""
    lines = []
    for name, of_method in runs.items():
        cells = [name]
        for level in problem.levels:
            reached = [found for run in of_method if (found := run.reached(level))]
            if not reached:
                cells.append("never")
                continue
            evaluations, seconds = (
                statistics.median(values) for values in zip(*reached, strict=True)
            )
            some = (
                "" if len(reached) == len(of_method) else f" ({len(reached)} of {len(of_method)})"
            )
            cells.append(f"{evaluations:.0f}, {number(seconds)} s{some}")
        cells.append(Spread.of(run.best[-1] for run in of_method).show(2))
        cells.append(Spread.of(run.error() for run in of_method).show(2))
        cells.append(show_time(Spread.of(run.outside for run in of_method)))
        lines.append(cells)
    lines.append(
        [f"{THEIRS} / {OURS}", *(_ratio(runs, level) for level in problem.levels), *[""] * 3]
    )
    headers = [problem.name, *(f"to loss {level:g}" for level in problem.levels)]
    return table([*headers, "least loss", "l2 error", "outside closure, an evaluation"], lines)


def _ratio(runs: Runs, level: float) -> str:
    """By hand over FusePV from the same starts: medians of evaluations and of seconds."""
    ours, theirs = ([run.reached(level) for run in runs[name]] for name in (OURS, THEIRS))
    both = [(a, b) for a, b in zip(theirs, ours, strict=True) if a and b]
    parts = []
    if both:
        evaluations = statistics.median(a[0] / b[0] for a, b in both)
        seconds = statistics.median(a[1] / b[1] for a, b in both)
        parts.append(f"{evaluations:.2f}x, {seconds:.2f}x" + " **lost**" * (seconds < 1))
    # Without this the medians would be of the survivors.
    for name, missing, other in ((OURS, ours, theirs), (THEIRS, theirs, ours)):
        alone = sum(a is None and b is not None for a, b in zip(missing, other, strict=True))
        if alone:
            parts.append(f"{name} alone missed it {alone} of {len(ours)} times")
    return "; ".join(parts)


def draw(results: list[tuple[pinn.Problem, Runs]]) -> Figure:
    """Loss against evaluations and against time; median and range of the seeds."""
    with style():
        figure, panels = plt.subplots(
            len(results), 2, figsize=(10, 3.5 * len(results)), layout="constrained", squeeze=False
        )
        for row, (problem, runs) in zip(panels, results, strict=True):
            end = max(run.seconds[-1] for of_method in runs.values() for run in of_method)
            for name, of_method in runs.items():
                _, color, line = METHODS[name]
                curves = np.array([run.best for run in of_method])
                evaluations = np.arange(1, curves.shape[1] + 1)
                _draw_curves(row[0], evaluations, curves, name, color, line)
                times = np.linspace(end / 400, end, 400)
                timed = [_at_times(run, times) for run in of_method]
                _draw_curves(row[1], times, np.array(timed), name, color, line)
            row[0].set_xlabel("gradient evaluations")
            row[1].set_xlabel("seconds")
            for panel in row:
                panel.set(yscale="log", ylabel="least loss so far", title=problem.name)
        panels[0][0].legend(loc="best")
    return figure


def _at_times(run: Run, times: Any) -> Any:
    """The least loss known at each time, until the run ended."""
    known = np.searchsorted(run.seconds, times, side="right")
    best = np.array([np.nan, *run.best])[known]
    return np.where(times <= run.seconds[-1], best, np.nan)


def _draw_curves(panel: Axes, x: Any, curves: Any, label: str, color: str, line: str) -> None:
    whole = ~np.isnan(curves).any(axis=0)  # where all seeds still run
    x, curves = x[whole], curves[:, whole]
    panel.plot(x, np.median(curves, axis=0), line, color=color, label=label)
    panel.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12, lw=0)


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("time_to_loss", __doc__, SEEDS, THREADS)
    facts = machine.facts(args)
    budget = args.budget or BUDGET[args.quick]
    points = POINTS[args.quick]
    problems = [pinn.burgers(points[0]), pinn.poisson(points[1])]
    results = [
        (problem, solve(problem, widths, args.rounds, args.quick, budget))
        for problem, widths in zip(problems, WIDTHS, strict=True)
    ]
    text = "\n\n".join(
        [
            f"{args.rounds} starts each, {budget} gradient evaluations, {points[0]} collocation "
            f"points for Burgers and {points[1]} for Poisson; m = {HISTORY_SIZE}; by hand and "
            f"FusePV leave Adam (lr {ADAM_LR:g}) after {budget * ADAM_SHARE // 100} steps; Adam "
            f"alone has lr {ADAM_ALONE_LR:g}. Medians over the starts that got there; in the last "
            "line how many times as many evaluations, and as much time, the recipe by hand takes.",
            *(as_table(problem, runs) for problem, runs in results),
        ]
    )
    json = {problem.name: _as_json(problem, runs) for problem, runs in results}
    saving.save(args, "time_to_loss", facts, {"problems": json}, text, draw(results))


def _as_json(problem: pinn.Problem, runs: Runs) -> dict[str, Any]:
    return {
        name: [
            {
                "seed": seed,
                "least_loss": run.best[-1],
                "l2_error": run.error(),
                "seconds": run.seconds[-1],
                "evaluations": len(run.losses),
                "seconds_outside_per_evaluation": run.outside,
                "evaluations_and_seconds_to": {
                    level: run.reached(level) for level in problem.levels
                },
            }
            for seed, run in enumerate(of_method)
        ]
        for name, of_method in runs.items()
    }


if __name__ == "__main__":
    main()
