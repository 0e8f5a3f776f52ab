"""Which problems each L-BFGS solves, and with how many evaluations, in float64 and float32.

The problems are those of Moré, Garbow and Hillstrom with their standard starts, Rosenbrock's
valley in more dimensions, ill-conditioned quadratics and logistic regressions. All solvers have
history_size = 10 and the same budget of evaluations, and none may stop by a tolerance. A problem
counts as solved to a tolerance tau at the first evaluation with f - f* <= tau (f0 - f*) (Moré and
Wild 2009); f is evaluated anew in float64 for this, wherever the solver asked.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

import fuse_ext
from benchmarks.harness import command, machine, rounds, saving
from benchmarks.harness.pictures import COLORS, performance_profile, style
from benchmarks.harness.tables import number, table
from tests.cases.problems import Problem, large_problem_set

THREADS = 1
BUDGET = {True: 300, False: 1000}  # evaluations
HISTORY_SIZE = 10
# Of f0 - f*. What float32 can resolve of a loss that is a sum ends near the last.
TOLERANCES = {torch.float64: (1e-3, 1e-6, 1e-9), torch.float32: (1e-2, 1e-4, 1e-6)}


class BudgetSpentError(Exception):
    """The closure was called once too often."""


class Run:
    """One problem under one solver.

    Args:
        problem: What to minimise.
        dtype: Of the solver's parameters.
        budget: Calls of the closure; the next one raises :class:`BudgetSpentError`.

    Attributes:
        x: The parameter.
        gaps: f - f* in float64 at each evaluation, over its value at the start.
        reason: Why the solver stopped, if it says so.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, budget: int) -> None:
        self._problem, self._budget = problem, budget
        self._scale = problem.f(problem.x0).item() - problem.least
        self.x = problem.x0.to(dtype, copy=True).requires_grad_()
        self.gaps: list[float] = []
        self.reason = ""

    def __call__(self) -> Tensor:
        """The closure."""
        if len(self.gaps) == self._budget:
            raise BudgetSpentError
        with torch.no_grad():
            exact = self._problem.f(self.x.double()).item()
        self.gaps.append((exact - self._problem.least) / self._scale)
        self.x.grad = None
        loss = self._problem.f(self.x)
        loss.backward()
        return loss.detach()

    def exhaust(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps until the optimizer neither moves nor has more to evaluate than the start."""
        while True:
            evaluations, before = len(self.gaps), self.x.detach().clone()
            optimizer.step(self)
            if len(self.gaps) <= evaluations + 1 and torch.equal(before, self.x):
                return

    def reached(self, tolerance: float) -> float:
        """Evaluations until the gap was at most this; inf if never."""
        for i, gap in enumerate(self.gaps):
            if gap <= tolerance:
                return i + 1
        return math.inf


def scipy_lbfgsb(run: Run) -> None:
    """scipy.optimize.minimize: x in float64, rounded to the problem's dtype before each call."""
    import scipy.optimize

    def evaluate(x: Any) -> tuple[float, Any]:
        with torch.no_grad():
            run.x.copy_(torch.as_tensor(x))
        loss = run()
        assert run.x.grad is not None
        return loss.item(), run.x.grad.double().numpy()

    options = {"maxcor": HISTORY_SIZE, "ftol": 0, "gtol": 0, "maxfun": 10**9, "maxiter": 10**9}
    start = run.x.detach().double().numpy()
    found = scipy.optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options=options)
    run.reason = found.message


def _options(iterations: int) -> dict[str, Any]:
    return {
        "max_iter": iterations,
        "max_eval": 10**9,
        "tolerance_grad": 0.0,
        "tolerance_change": 0.0,
        "history_size": HISTORY_SIZE,
    }


def torch_lbfgs(run: Run, iterations: int = 10**9) -> None:
    """torch.optim.LBFGS with strong Wolfe."""
    run.exhaust(torch.optim.LBFGS([run.x], line_search_fn="strong_wolfe", **_options(iterations)))


def our_lbfgs(run: Run, line_search: str, iterations: int = 10**9) -> None:
    """fuse_ext.LBFGS."""
    optimizer = fuse_ext.LBFGS(
        [run.x], line_search_fn=line_search, deterministic=True, **_options(iterations)
    )
    run.exhaust(optimizer)
    run.reason = optimizer.report().stop_reason


def fuse_pv(run: Run, **options: Any) -> None:
    """fuse_ext.FusePV in its second phase: one iteration a step."""
    optimizer = fuse_ext.FusePV(
        [run.x], switch=0, deterministic=True, history_size=HISTORY_SIZE, **options
    )
    run.exhaust(optimizer)
    run.reason = optimizer.report().stop_reason


@dataclass(frozen=True)
class Solver:
    """A solver and how it is drawn."""

    name: str
    solve: Callable[[Run], None]
    color: str
    line: str = "-"


SOLVERS = (
    Solver("scipy", scipy_lbfgsb, COLORS["other"]),
    Solver("torch", torch_lbfgs, COLORS["torch"]),
    Solver("torch, steps of 1", lambda run: torch_lbfgs(run, 1), COLORS["torch alone"], "--"),
    Solver("strong Wolfe", lambda run: our_lbfgs(run, "strong_wolfe"), COLORS["ours"]),
    Solver(
        "approximate Wolfe", lambda run: our_lbfgs(run, "approximate_wolfe"), COLORS["ours bf16"]
    ),
    Solver("Armijo", lambda run: our_lbfgs(run, "armijo"), COLORS["grey"], ":"),
    Solver("FusePV, steps of 1", fuse_pv, COLORS["ours int8"], "--"),
)
SCIPY, TORCH, STEPS = "scipy", "torch", "FusePV, steps of 1"
ONE_CALL = ("strong Wolfe", "approximate Wolfe")


# Runs of each solver by name, one a problem.
Runs = dict[str, list[Run]]


def solve_all(problems: list[Problem], dtype: torch.dtype, budget: int) -> Runs:
    """Every solver on every problem."""
    runs: Runs = {solver.name: [] for solver in SOLVERS}
    name = str(dtype).removeprefix("torch.")
    with rounds.progress(len(problems) * len(SOLVERS), name) as bar:
        for problem in problems:
            for solver in SOLVERS:
                run = Run(problem, dtype, budget)
                with contextlib.suppress(BudgetSpentError):
                    solver.solve(run)
                runs[solver.name].append(run)
                bar.update()
    return runs


# --- tables and pictures --------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a solver did to one tolerance, over all problems.

    Attributes:
        solved: Problems.
        median: Of the evaluations over scipy's, where both got there.
        mean: The same, geometric mean.
    """

    solved: int
    median: float
    mean: float

    @staticmethod
    def of(runs: list[Run], scipys: list[Run], tolerance: float) -> Score:
        """Scores one solver's runs."""
        ours, theirs = ([run.reached(tolerance) for run in of] for of in (runs, scipys))
        both = [a / b for a, b in zip(ours, theirs, strict=True) if max(a, b) < math.inf]
        mean = math.exp(statistics.fmean(map(math.log, both)))
        return Score(sum(map(math.isfinite, ours)), statistics.median(both), mean)


def scores(runs: Runs, dtype: torch.dtype) -> dict[float, dict[str, Score]]:
    """By tolerance and solver."""
    return {
        tolerance: {name: Score.of(of, runs[SCIPY], tolerance) for name, of in runs.items()}
        for tolerance in TOLERANCES[dtype]
    }


def targets(by_dtype: dict[torch.dtype, dict[float, dict[str, Score]]]) -> list[dict[str, Any]]:
    """What was asked for, and whether it was met at every tolerance."""
    double, single = by_dtype[torch.float64], by_dtype[torch.float32]
    found = []
    for name in (*ONE_CALL, STEPS):
        rows = list(double.values())
        least = [max(row[SCIPY].solved, row[TORCH].solved) for row in rows]
        solved = [row[name].solved for row in rows]
        limit = 1.2 if name == STEPS else 1.1
        median = max(row[name].median for row in rows)
        more = [(row[name].solved, row[TORCH].solved) for row in single.values()]
        shown = "; ".join(f"{ours} to {theirs}" for ours, theirs in more)
        found += [
            (
                name,
                "float64: solves as many as scipy and torch",
                f"{solved} to {least}",
                all(a >= b for a, b in zip(solved, least, strict=True)),
            ),
            (
                name,
                f"float64: median of evaluations <= {limit:g} times scipy's",
                number(median),
                median <= limit,
            ),
            (name, "float32: solves more than torch", shown, all(a > b for a, b in more)),
        ]
    return [
        {"solver": a, "target": b, "measured": c, "verdict": "met" if d else "**missed**"}
        for a, b, c, d in found
    ]


def summary(by_dtype: dict[torch.dtype, dict[float, dict[str, Score]]], problems: int) -> str:
    """Markdown: problems solved, and evaluations beside scipy's."""
    columns = [(dtype, tau) for dtype, by_tau in by_dtype.items() for tau in by_tau]
    rows = []
    for solver in SOLVERS:
        cells = [solver.name]
        for dtype, tau in columns:
            score = by_dtype[dtype][tau][solver.name]
            cells.append(f"{score.solved}, {score.median:.2f}, {score.mean:.2f}")
        rows.append(cells)
    heads = [f"{str(dtype).removeprefix('torch.')}, {tau:g}" for dtype, tau in columns]
    return table([f"solved of {problems}, evaluations / scipy's", *heads], rows)


def details(problems: list[Problem], by_dtype: dict[torch.dtype, Runs]) -> str:
    """Markdown: evaluations to the last tolerance, float64 and float32."""
    rows = []
    for i, problem in enumerate(problems):
        cells = [f"{problem.name}, n = {len(problem.x0)}"]
        for solver in SOLVERS:
            counts = [
                runs[solver.name][i].reached(TOLERANCES[dtype][-1])
                for dtype, runs in by_dtype.items()
            ]
            cells.append(" / ".join(f"{c:.0f}" if c < math.inf else "-" for c in counts))
        rows.append(cells)
    return table(["problem", *(solver.name for solver in SOLVERS)], rows)


def draw(by_dtype: dict[torch.dtype, Runs]) -> Figure:
    """Performance profiles of the evaluations to the last tolerance."""
    with style():
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
        for panel, (dtype, runs) in zip(panels, by_dtype.items(), strict=True):
            tau = TOLERANCES[dtype][-1]
            counts = {name: [run.reached(tau) for run in of] for name, of in runs.items()}
            performance_profile(panel, counts, {s.name: (s.color, s.line) for s in SOLVERS})
            panel.set(title=f"{str(dtype).removeprefix('torch.')}, to {tau:g} of f - f*")
        panels[0].set_ylabel("share of the problems")
        panels[1].legend(loc="lower right")
    return figure


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("robustness", __doc__, None, THREADS)
    facts = machine.facts(args)
    budget = args.budget or BUDGET[args.quick]
    problems = [p for p in large_problem_set() if len(p.x0) <= args.largest]
    runs = {dtype: solve_all(problems, dtype, budget) for dtype in TOLERANCES}
    by_dtype = {dtype: scores(of, dtype) for dtype, of in runs.items()}
    found = targets(by_dtype)
    text = "\n\n".join(
        [
            f"{len(problems)} problems, {budget} evaluations each, m = {HISTORY_SIZE}. Solved is "
            "f - f* <= tau (f0 - f*), tau in the column's head.",
            table([*found[0]], ([*target.values()] for target in found)),
            "Problems solved, and median and geometric mean of the evaluations over scipy's:",
            summary(by_dtype, len(problems)),
            "Evaluations to the last tolerance, in float64 / float32:",
            details(problems, runs),
        ]
    )
    json = {
        str(dtype).removeprefix("torch."): {
            problem.name: {
                name: {
                    "evaluations_to": {tau: of[i].reached(tau) for tau in TOLERANCES[dtype]},
                    "evaluations": len(of[i].gaps),
                    "least_gap": float(np.nanmin(of[i].gaps)),
                    "reason": of[i].reason,
                }
                for name, of in by_solver.items()
            }
            for i, problem in enumerate(problems)
        }
        for dtype, by_solver in runs.items()
    }
    saving.save(args, "robustness", facts, {"targets": found, "problems": json}, text, draw(runs))


if __name__ == "__main__":
    main()
