"""``fuse_ext.minimize`` beside scipy's L-BFGS-B: evaluations, without bounds and within them.

The problems are those of ``robustness``, in float64 from their standard starts, each three times:
free; in a wide box, x0 +- 10 (1 + max |x* - x0|), which stops nothing; and in a tight one, whose
bounds stand half way from x0 to x* for every other element, the first one included (x* is where the
best of long runs without bounds ended). Nobody may stop by a tolerance. A run counts as
solved to tau at the first evaluation with f - f* <= tau (f0 - f*), f* the least value that is known
or that anybody saw in that box (Moré and Wild 2009).
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
BUDGET = {True: 300, False: 3000}  # evaluations
TOLERANCES = (1e-3, 1e-6, 1e-9)
MIDDLE = 1e-6  # what single problems and the profiles are judged by
LONGEST = 10  # of a wide box, beside the way to the solution
BOXES = ("free", "wide", "tight")
HEADS = {
    "free": "without bounds",
    "wide": "within bounds that stop nothing",
    "tight": "within bounds that stop every other element",
}

Box = tuple[Tensor, Tensor] | None


class BudgetSpentError(Exception):
    """The function was called once too often."""


class Run:
    """One problem under one solver.

    Args:
        problem: What to minimise.
        box: Lower and upper bounds, or None.
        budget: Calls; the next one raises :class:`BudgetSpentError`.

    Attributes:
        losses: Of all evaluations, within the box.
        best: Where the least of them was.
    """

    def __init__(self, problem: Problem, box: Box, budget: int) -> None:
        self.problem, self.box, self.budget = problem, box, budget
        self.losses: list[float] = []
        self.best = problem.x0

    @property
    def least(self) -> float:
        """The least loss; NaN is none."""
        return min((loss for loss in self.losses if not math.isnan(loss)), default=math.inf)

    def __call__(self, x: Tensor) -> Tensor:
        """The function, for autograd."""
        if len(self.losses) == self.budget:
            raise BudgetSpentError
        if self.box is not None:
            assert (self.box[0] <= x).all() and (x <= self.box[1]).all(), "left the box"
        loss = self.problem.f(x)
        if loss.item() < self.least:
            self.best = x.detach().clone()
        self.losses.append(loss.item())
        return loss

    def reached(self, tolerance: float, least: float) -> float:
        """Evaluations to this share of f0 - f*; inf if never."""
        enough = least + tolerance * (self.losses[0] - least)
        return next((i for i, loss in enumerate(self.losses, 1) if loss <= enough), math.inf)


def scipy_lbfgsb(run: Run, pairs: int) -> None:
    """scipy.optimize.minimize(method="L-BFGS-B")."""
    import scipy.optimize

    def evaluate(values: Any) -> tuple[float, Any]:
        x = torch.from_numpy(values.copy()).requires_grad_()
        loss = run(x)
        loss.backward()
        assert x.grad is not None
        return loss.item(), x.grad.numpy()

    options = {"maxcor": pairs, "ftol": 0, "gtol": 0, "maxfun": 10**9, "maxiter": 10**9}
    bounds = None if run.box is None else scipy.optimize.Bounds(*(b.numpy() for b in run.box))
    scipy.optimize.minimize(
        evaluate,
        run.problem.x0.numpy(),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options=options,
    )


def ours(run: Run, pairs: int) -> None:
    """fuse_ext.minimize."""
    fuse_ext.minimize(
        run,
        run.problem.x0,
        bounds=run.box,
        gtol=0.0,
        maxiter=10**9,
        maxfun=10**9,
        history_size=pairs,
    )


@dataclass(frozen=True)
class Solver:
    """A solver, how many pairs it keeps and how it is drawn."""

    name: str
    solve: Callable[[Run, int], None]
    pairs: int
    color: str
    line: str = "-"


SOLVERS = (
    Solver("L-BFGS-B, 10 pairs", scipy_lbfgsb, 10, COLORS["other"]),
    Solver("minimize, 10 pairs", ours, 10, COLORS["ours"]),
    Solver("L-BFGS-B, 100 pairs", scipy_lbfgsb, 100, COLORS["other"], "--"),
    Solver("minimize, 100 pairs (default)", ours, 100, COLORS["ours"], "--"),
)
# Which is held to which.
PAIRED = ((SOLVERS[1], SOLVERS[0]), (SOLVERS[3], SOLVERS[2]))

Runs = dict[str, Run]


def solve(problem: Problem, box: Box, budget: int) -> Runs:
    """All solvers in one box."""
    runs = {}
    for solver in SOLVERS:
        runs[solver.name] = run = Run(problem, box, budget)
        with contextlib.suppress(BudgetSpentError):
            solver.solve(run, solver.pairs)
    return runs


def boxes_around(problem: Problem, solution: Tensor) -> dict[str, Box]:
    """The boxes that need to know where the solution is."""
    x0, way = problem.x0, solution - problem.x0
    far = LONGEST * (1.0 + float(way.abs().max()))
    half, every_other = x0 + 0.5 * way, torch.arange(len(x0)) % 2 == 0
    infinite = torch.full_like(x0, math.inf)
    upper = torch.where(every_other & (way > 0), half, infinite)
    lower = torch.where(every_other & (way < 0), half, -infinite)
    return {"wide": (x0 - far, x0 + far), "tight": (lower, upper)}


@dataclass(frozen=True)
class Case:
    """A problem in a box.

    Attributes:
        problem: The problem.
        runs: By solver.
        least: f* in it.
    """

    problem: Problem
    runs: Runs
    least: float

    def reached(self, solver: Solver, tolerance: float) -> float:
        """Evaluations of a solver; inf if it never came there."""
        return self.runs[solver.name].reached(tolerance, self.least)


def solve_all(problems: list[Problem], budget: int) -> dict[str, list[Case]]:
    """Every solver on every problem in every box."""
    cases: dict[str, list[Case]] = {box: [] for box in BOXES}
    with rounds.progress(len(problems) * len(BOXES), "minimize") as bar:
        for problem in problems:
            runs = solve(problem, None, budget)
            best = min(runs.values(), key=lambda run: run.least)
            cases["free"].append(Case(problem, runs, min(problem.least, best.least)))
            bar.update()
            for name, box in boxes_around(problem, best.best).items():
                runs = solve(problem, box, budget)
                least = min(run.least for run in runs.values())
                cases[name].append(Case(problem, runs, least))
                bar.update()
    return cases


# --- tables and pictures --------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a solver did to one tolerance.

    Attributes:
        solved: Problems.
        mean: Geometric mean of its evaluations, on those that every solver solved.
        total: Their sum.
    """

    solved: int
    mean: float
    total: float


def scores(cases: list[Case], tolerance: float) -> dict[str, Score]:
    """By solver."""
    counts = {s.name: [case.reached(s, tolerance) for case in cases] for s in SOLVERS}
    common = [
        i for i, all_ in enumerate(zip(*counts.values(), strict=True)) if max(all_) < math.inf
    ]
    found = {}
    for name, of in counts.items():
        both = [of[i] for i in common]
        mean = math.exp(statistics.fmean(map(math.log, both))) if both else math.nan
        found[name] = Score(sum(map(math.isfinite, of)), mean, sum(both))
    return found


Scores = dict[str, dict[float, dict[str, Score]]]


def targets(by_box: Scores) -> list[dict[str, Any]]:
    """What is asked of ours beside scipy's with the same pairs, and whether it was met."""
    found = []
    for box, by_tolerance in by_box.items():
        for one, other in PAIRED:
            rows = [(row[one.name], row[other.name]) for row in by_tolerance.values()]
            worst = max(a.mean / b.mean for a, b in rows)
            for target, measured, met in (
                (
                    "solves as many",
                    f"{[a.solved for a, _ in rows]} to {[b.solved for _, b in rows]}",
                    all(a.solved >= b.solved for a, b in rows),
                ),
                (
                    "geometric mean of evaluations <= 1.1 times scipy's",
                    number(worst),
                    worst <= 1.1,
                ),
            ):
                found.append(
                    {
                        "box": box,
                        "solver": one.name,
                        "target": target,
                        "measured": measured,
                        "verdict": "met" if met else "**missed**",
                    }
                )
    return found


def summary(by_box: Scores, problems: int) -> str:
    """Markdown: problems solved, and geometric mean and sum of the evaluations."""
    rows = []
    for box, by_tolerance in by_box.items():
        for solver in SOLVERS:
            cells = [box, solver.name]
            for row in by_tolerance.values():
                score = row[solver.name]
                cells.append(f"{score.solved}, {number(score.mean)}, {score.total:,.0f}")
            rows.append(cells)
    heads = [f"{tau:g}" for tau in TOLERANCES]
    return table(["box", f"solved of {problems}, mean, sum", *heads], rows)


def details(cases: dict[str, list[Case]]) -> str:
    """Markdown: evaluations of each problem to the middle tolerance, free / wide / tight."""
    rows = []
    for same in zip(*cases.values(), strict=True):
        problem = same[0].problem
        cells = [f"{problem.name}, n = {len(problem.x0)}"]
        for solver in SOLVERS:
            counts = [case.reached(solver, MIDDLE) for case in same]
            cells.append(" / ".join(f"{c:.0f}" if c < math.inf else "-" for c in counts))
        rows.append(cells)
    return table(["problem", *(solver.name for solver in SOLVERS)], rows)


def draw(cases: dict[str, list[Case]]) -> Figure:
    """Performance profiles of the evaluations."""
    with style():
        figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
        for panel, (box, of) in zip(panels, cases.items(), strict=True):
            counts = {s.name: [case.reached(s, MIDDLE) for case in of] for s in SOLVERS}
            performance_profile(panel, counts, {s.name: (s.color, s.line) for s in SOLVERS})
            panel.set(title=HEADS[box])
        panels[0].set_ylabel(f"share of the problems, to {MIDDLE:g} of f - f*")
        panels[-1].legend(loc="lower right")
    return figure


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("minimize", __doc__, None, THREADS)
    facts = machine.facts(args)
    budget = args.budget or BUDGET[args.quick]
    problems = [p for p in large_problem_set() if len(p.x0) <= args.largest]
    cases = solve_all(problems, budget)
    by_box = {box: {tau: scores(of, tau) for tau in TOLERANCES} for box, of in cases.items()}
    found = targets(by_box)
    short = "\n\n".join(
        [
            f"{len(problems)} problems, each free, in a wide and in a tight box; at most {budget} "
            "evaluations, float64. Solved is f - f* <= tau (f0 - f*). Nothing else ends a run, but "
            "that rounding does.",
            table([*found[0]], ([*target.values()] for target in found)),
            "Problems solved to tau, and geometric mean and sum of the evaluations on those that "
            "all four solved:",
            summary(by_box, len(problems)),
        ]
    )
    text = f"{short}\n\nEvaluations to {MIDDLE:g}, free / wide / tight:\n\n{details(cases)}"
    json = {
        box: {
            case.problem.name: {
                "least": case.least,
                "solvers": {
                    solver.name: {
                        "evaluations_to": {tau: case.reached(solver, tau) for tau in TOLERANCES},
                        "evaluations": len(case.runs[solver.name].losses),
                        "least": case.runs[solver.name].least,
                    }
                    for solver in SOLVERS
                },
            }
            for case in of
        }
        for box, of in cases.items()
    }
    results = {"targets": found, "problems": json}
    saving.save(args, "minimize", facts, results, text, draw(cases), short)


if __name__ == "__main__":
    main()
