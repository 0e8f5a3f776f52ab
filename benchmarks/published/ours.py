"""What we do: FusePV that is told nothing, and with the promise of one function, two matrices."""

from __future__ import annotations

from typing import Any

import fuse_ext
from benchmarks.published import course
from benchmarks.published.course import Course

OPTIONS: dict[str, dict[str, Any]] = {
    "silent": {},
    "pairs": {"deterministic": True, "curvature": "pairs"},
    "dense": {"deterministic": True, "curvature": "dense"},
}
LOOK = 50  # steps after which we ask whether it has converged


def fuse_pv(run: Course, method: str, lr: float, at_once: bool, resampled: bool) -> None:
    """FusePV, one iteration a step.

    Told of new points by ``batch_id``, but for the method that is told nothing. It may end before
    the budget, converged, where the points stay.
    """
    switch = fuse_ext.AtOnce() if at_once else None
    optimizer = fuse_ext.FusePV(run.params, lr, switch, **OPTIONS[method])
    told = resampled and method != "silent"
    points = 0
    while not optimizer.report().converged or resampled:
        for _ in range(LOOK):
            optimizer.step(run, batch_id=points if told else None)
            points += run.resample_if_due()


def solve(
    method: str,
    problem: str,
    options: dict[str, Any],
    seed: int,
    budget: int,
    lr: float,
    at_once: bool,
) -> dict[str, Any]:
    """A cell.

    Args:
        method: One of ``OPTIONS``.
        problem: See :func:`benchmarks.published.course.run`; also options, seed, budget.
        options: Of the problem.
        seed: Of initialisation and points.
        budget: Evaluations.
        lr: Adam's.
        at_once: No Adam steps; else FusePV decides when to switch.
    """

    def train(run: Course) -> None:
        fuse_pv(run, method, lr, at_once, "every" in options)

    return course.run(problem, options, seed, budget, train)
