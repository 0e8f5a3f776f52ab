"""What others do: torch's Adam, and Adam followed by torch's L-BFGS.

Nothing here imports fuse_ext, so these runs are not repeated when fuse_ext changes.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.published import course
from benchmarks.published.course import Course

HISTORY_SIZE = 100  # as in arXiv 2402.01868; torch's default too
ENDLESS = 10**9


def adam(run: Course, lr: float, steps: int = ENDLESS) -> None:
    """torch.optim.Adam."""
    optimizer = torch.optim.Adam(run.params, lr=lr, fused=True)
    for _ in range(steps):
        optimizer.step(run)
        run.resample_if_due()


def adam_then_lbfgs(run: Course, lr: float, steps: int, every: int | None) -> None:
    """Adam for so many steps, then torch.optim.LBFGS with strong Wolfe.

    One call of ``step`` goes on until new points are due: each call evaluates once more and starts
    the search anew, and many short ones are far behind one long one (``benchmarks.switching``).
    """
    adam(run, lr, steps)
    optimizer = torch.optim.LBFGS(
        run.params,
        max_iter=every or ENDLESS,
        max_eval=every or ENDLESS,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=HISTORY_SIZE,
        line_search_fn="strong_wolfe",
    )
    while True:
        optimizer.step(run)
        run.resample_if_due()


def solve(
    method: str,
    problem: str,
    options: dict[str, Any],
    seed: int,
    budget: int,
    lr: float,
    adam_steps: int,
) -> dict[str, Any]:
    """A cell.

    Args:
        method: "adam" or "adam_lbfgs".
        problem: See :func:`benchmarks.published.course.run`; also options, seed, budget.
        options: Of the problem.
        seed: Of initialisation and points.
        budget: Evaluations.
        lr: Adam's.
        adam_steps: Before L-BFGS; at most a third of the budget.
    """

    def train(run: Course) -> None:
        if method == "adam":
            adam(run, lr)
        else:
            adam_then_lbfgs(run, lr, min(adam_steps, budget // 3), options.get("every"))

    return course.run(problem, options, seed, budget, train)
