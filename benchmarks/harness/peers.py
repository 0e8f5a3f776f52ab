"""L-BFGS of other libraries, timed on the same quadratic outside their function calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.workloads import Quadratic

FILL = 13  # iterations that fill a history of 10, before the clock runs
COUNTED = 5

# One repeat: seconds an iteration, and function evaluations an iteration.
Run = Callable[[], tuple[float, float]]


class _Stopwatch:
    """Time and evaluations between the iterations FILL and FILL + COUNTED of one run."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.evaluations = 0
        self.iterations = 0
        self._marks: list[tuple[float, float, int]] = []

    def iteration(self, *_: Any) -> None:
        """To be called after every iteration."""
        self.iterations += 1
        if self.iterations in (FILL, FILL + COUNTED):
            self._marks.append((time.perf_counter(), self.inside, self.evaluations))

    def result(self) -> tuple[float, float]:
        """Seconds outside the function and evaluations, an iteration."""
        if len(self._marks) != 2:
            raise RuntimeError(f"the run ended after {self.iterations} iterations")
        (start, before, first), (end, after, last) = self._marks
        return (end - start - (after - before)) / COUNTED, (last - first) / COUNTED


def scipy_lbfgsb(problem: Quadratic, history_size: int) -> Run | None:
    """scipy's L-BFGS-B: bounds and a Cauchy point come with it; float64, one thread.

    None where scipy is missing.
    """
    if find_spec("scipy") is None:
        return None
    from scipy.optimize import minimize

    start = torch.cat([p.detach() for p in problem.params]).double().numpy()
    curvature = torch.cat(problem.curvature).double().numpy()

    def run() -> tuple[float, float]:
        watch = _Stopwatch()

        def function(x: Any) -> tuple[float, Any]:
            begin = time.perf_counter()
            grad = curvature * x
            loss = 0.5 * float(x @ grad)
            watch.evaluations += 1
            watch.inside += time.perf_counter() - begin
            return loss, grad

        minimize(
            function,
            start,
            jac=True,
            method="L-BFGS-B",
            callback=watch.iteration,
            options={"maxcor": history_size, "maxiter": FILL + COUNTED, "ftol": 0.0, "gtol": 0.0},
        )
        return watch.result()

    return run


class _TimedQuadratic(torch.autograd.Function):
    """1/2 x.D x for autograd, on the stopwatch in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curvature: Tensor, watch: _Stopwatch) -> Tensor:
        """The loss; keeps its gradient."""
        begin = time.perf_counter()
        ctx.grad = curvature * x
        loss = 0.5 * torch.dot(x, ctx.grad)
        watch.evaluations += 1
        watch.inside += time.perf_counter() - begin
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradient: ``upstream`` is 1."""
        return ctx.grad, None, None


def pytorch_minimize(problem: Quadratic, history_size: int) -> Run | None:
    """pytorch-minimize's L-BFGS, on one flat tensor; None where it is missing."""
    if find_spec("torchmin") is None:
        return None
    from torchmin import minimize

    start = torch.cat([p.detach() for p in problem.params])
    curvature = torch.cat(problem.curvature)

    def run() -> tuple[float, float]:
        watch = _Stopwatch()
        minimize(
            lambda x: _TimedQuadratic.apply(x, curvature, watch),
            start,
            method="l-bfgs",
            max_iter=FILL + COUNTED,
            callback=watch.iteration,
            options={"history_size": history_size, "gtol": 0.0, "xtol": 0.0, "gtd_tol": 0.0},
        )
        return watch.result()

    return run
