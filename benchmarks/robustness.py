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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

import fuse_ext
from benchmarks import harness, machine
from benchmarks.harness import COLORS, number, table
from tests.problems import Problem, large_problem_set

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
    found = scipy.optimize.minimize(
        evaluate, start, jac=True, method="L-BFGS-B", options=options
    )
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
    run.exhaust(
        torch.optim.LBFGS([run.x], line_search_fn="strong_wolfe", **_options(iterations))
    )


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
    with harness.progress(len(problems) * len(SOLVERS), name) as bar:
        for problem in problems:
            for solver in SOLVERS:
                run = Run(problem, dtype, budget)
                with contextlib.suppress(BudgetSpentError):
                    solver.solve(run)
                runs[solver.name].append(run)
                bar.update()
    return runs


def main() -> None:
    for dtype in (torch.float64, torch.float32):
        probs = large_problem_set()
        runs = solve_all(probs, dtype, 1000)
        for tol in TOLERANCES[dtype]:
            print(dtype, tol)
            sc = [r.reached(tol) for r in runs[SCIPY]]
            for n, rs in runs.items():
                v = [r.reached(tol) for r in rs]
                both = [a / b for a, b in zip(v, sc) if a < math.inf and b < math.inf]
                print(f"  {n:22s} solved {sum(x<math.inf for x in v)} of {len(v)}  median evals/scipy {statistics.median(both):.3f} geomean {math.exp(statistics.mean(map(math.log,both))):.3f} median {statistics.median(v)}", [p.name for p, x in zip(probs, v) if x == math.inf])
        if True:
            tol = TOLERANCES[dtype][-1]
            for i, p in enumerate(probs):
                print(f"{p.name:26s}", *(f"{runs[n][i].reached(tol):6.0f}" for n in runs), *(runs[n][i].reason[:14] for n in ('scipy', 'strong Wolfe', 'approximate Wolfe')))

if __name__ == "__main__":
    main()
